"""Corruptions of our own, beside naive ones."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from fsp.data import CORRUPTIONS, Split, corrupt, load


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def split_of(*shape, seed=0, dtype=torch.float32):
    """Random images; those of 8 bits between 60 and 190, so that little is cut off."""
    images = torch.rand(shape, generator=seeded(seed))
    images = (60 + 130 * images).to(dtype) if dtype == torch.uint8 else images.to(dtype)
    return Split(images, torch.arange(shape[0]) % 10)


def changed(split, name, severity, seed=0):
    return corrupt(split, name, severity, generator=seeded(seed)).images


def amount(name, severity):
    return CORRUPTIONS[name][1][severity - 1]


@pytest.mark.parametrize("source", ["mnist1d", "mnist5k", "digits"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_get_farther_from_the_clean_ones_with_every_severity(source, name):
    test = load(source).test
    images, labels = test.images[:1_000].clone(), test.labels[:1_000]
    distances = [0.0]
    for severity in range(1, 6):
        found = corrupt(Split(images, labels), name, severity, generator=seeded())
        assert found.labels is labels
        assert (found.images.shape, found.images.dtype) == (images.shape, images.dtype)
        distances.append((found.images.float() - images.float()).flatten(1).norm(dim=1).mean().item())
    assert all(nearer < farther for nearer, farther in pairwise(distances))
    assert torch.equal(images, test.images[:1_000])


def test_every_corruption_has_five_severities_that_grow():
    for name, (_, amounts) in CORRUPTIONS.items():
        assert len(amounts) == 5, name
        assert list(amounts) == sorted(set(amounts)), name


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_generator_alone_decides_and_no_image_depends_on_its_neighbours(name, dtype):
    split = split_of(6, 2, 9, 12, dtype=dtype)
    before = torch.random.get_rng_state()
    first, again, other = (changed(split, name, 3, seed) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name in {"blur", "contrast", "scale"})
    if name not in {"noise", "shift", "occlusion"}:
        assert torch.equal(changed(Split(split.images[2:3], split.labels[2:3]), name, 3), first[2:3])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("severity", range(1, 6))
def test_noise_is_white_with_the_stated_share_of_the_pixels_deviation(severity):
    split = split_of(50, 1, 28, 28)
    added = changed(split, "noise", severity) - split.images
    assert added.mean().abs().item() < 0.01
    assert added.std().item() == pytest.approx(amount("noise", severity) * split.images.std().item(), rel=0.02)
    assert np.corrcoef(added[..., 1:].flatten(), added[..., :-1].flatten())[0, 1] == pytest.approx(0, abs=0.02)
    ratio = changed(split, "noise", 1, seed=1) - split.images
    torch.testing.assert_close(
        (changed(split, "noise", 5, seed=1) - split.images) * (amount("noise", 1) / amount("noise", 5)),
        ratio,
        rtol=1e-4,
        atol=1e-5,
    )


def slow_blur(row, deviation):
    """One axis, the edge repeated beyond itself, by definition."""
    reach = int(4 * deviation + 0.5)
    weights = [math.exp(-(step**2) / (2 * deviation**2)) for step in range(-reach, reach + 1)]
    near = [row[np.clip(np.arange(len(row)) + step, 0, len(row) - 1)] for step in range(-reach, reach + 1)]
    return sum(weight * part for weight, part in zip(weights, near, strict=True)) / sum(weights)


@pytest.mark.parametrize("shape", [(3, 1, 1, 40), (2, 3, 12, 20)])
def test_blur_is_a_gaussian_along_every_long_axis(shape):
    split = split_of(*shape)
    expected = split.images.double().numpy()
    for axis in (2, 3):
        if shape[axis] > 1:
            expected = np.apply_along_axis(slow_blur, axis, expected, amount("blur", 4) * shape[axis])
    np.testing.assert_allclose(changed(split, "blur", 4), expected, atol=1e-5)


@pytest.mark.parametrize("severity", range(1, 6))
def test_contrast_keeps_the_mean_of_an_image_and_shrinks_what_differs_from_it(severity):
    split = split_of(4, 3, 5, 6)
    left = 1 - amount("contrast", severity)
    for clean, found in zip(split.images, changed(split, "contrast", severity), strict=True):
        torch.testing.assert_close(found, clean.mean() + left * (clean - clean.mean()))


@pytest.mark.parametrize("height", [1, 100])
def test_shift_moves_every_image_by_the_stated_part_along_its_long_axes_both_ways(height):
    split = split_of(12, 2, height, 100)  # of 100 pixels each part is a whole number of pixels
    step = round(100 * amount("shift", 2))
    seen = set()
    for clean, found in zip(split.images, changed(split, "shift", 2), strict=True):
        fits = []
        for down in (-step, step) if height > 1 else (0,):
            for right in (-step, step):
                moved = torch.zeros_like(clean)
                rows, columns = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), 100 + min(right, 0))
                from_rows = slice(max(-down, 0), height + min(-down, 0))
                from_columns = slice(max(-right, 0), 100 + min(-right, 0))
                moved[:, rows, columns] = clean[:, from_rows, from_columns]
                if torch.allclose(found, moved, atol=1e-4):
                    fits.append((down, right))
        assert len(fits) == 1
        seen |= {*fits}
    assert len(seen) == (2 if height == 1 else 4)


def test_scale_by_one_half_averages_neighbours_in_the_middle_of_zeros():
    assert amount("scale", 5) == 0.5
    split = split_of(3, 2, 12, 20)
    expected = torch.zeros_like(split.images)
    for row in range(6):
        for column in range(10):
            block = split.images[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected[:, :, 3 + row, 5 + column] = block.mean((2, 3))
    torch.testing.assert_close(changed(split, "scale", 5), expected, rtol=0, atol=1e-5)
    signal = split_of(3, 1, 1, 40)
    halves = (signal.images[..., ::2] + signal.images[..., 1::2]) / 2
    found = changed(signal, "scale", 5)
    torch.testing.assert_close(found[..., 10:30], halves, rtol=0, atol=1e-5)
    assert found[..., :10].abs().max() == found[..., 30:].abs().max() == 0


@pytest.mark.parametrize(("height", "width"), [(1, 40), (8, 8), (16, 24)])
@pytest.mark.parametrize("severity", range(1, 6))
def test_occlusion_covers_a_window_somewhere_inside_with_the_mean_of_the_image(height, width, severity):
    split = split_of(300, 2, height, width)
    found = changed(split, "occlusion", severity)
    part = amount("occlusion", severity)
    window = tuple(1 if side == 1 else math.ceil(part * side) for side in (height, width))
    corners = set()
    for clean, image in zip(split.images, found, strict=True):
        covered = (image != clean).all(0)
        rows, columns = covered.any(1).nonzero().flatten(), covered.any(0).nonzero().flatten()
        assert (len(rows), len(columns), covered.sum().item()) == (*window, math.prod(window))
        assert (image != clean).sum().item() == 2 * math.prod(window)
        torch.testing.assert_close(image[:, covered], clean.mean().expand(2, math.prod(window)))
        corners.add((rows[0].item(), columns[0].item()))
    places = (height - window[0] + 1) * (width - window[1] + 1)
    assert len(corners) > min(places, 300) / 2
    assert {row for row, _ in corners} == set(range(height - window[0] + 1))


def test_eight_bit_images_are_rounded_and_stay_in_their_range():
    split = Split(torch.tensor([0, 255], dtype=torch.uint8).repeat(8, 1, 8, 4), torch.zeros(8))
    noisy = changed(split, "noise", 5)
    as_float = changed(Split(split.images.float(), split.labels), "noise", 5)
    assert as_float.min() < 0
    assert torch.equal(noisy.float(), as_float.round().clamp(0, 255))


def test_settings_around_change_nothing():
    split = split_of(4, 1, 8, 8)
    for name in CORRUPTIONS:
        plain = changed(split, name, 3)
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
                around = changed(split, name, 3)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(around, plain), name
        assert not around.is_inference()


FOUR = split_of(4, 1, 5, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(corrupt, FOUR, "fog", 1), "corruption='fog': expected one of 'noise', 'blur'"),
        (partial(corrupt, FOUR, "blur", 0), "severity=0: expected an integer from 1 to 5"),
        (partial(corrupt, FOUR, "blur", 6), "severity=6"),
        (partial(corrupt, FOUR, "blur", True), "severity=True"),
        (partial(corrupt, Split(FOUR.images[0], FOUR.labels), "blur", 1), r"float32 of shape \(1, 5, 5\)"),
        (partial(corrupt, Split(FOUR.images.int(), FOUR.labels), "blur", 1), "images is torch.int32"),
        (partial(corrupt, Split(FOUR.images[:3], FOUR.labels), "blur", 1), "3 images and 4 labels"),
        (partial(corrupt, Split(FOUR.images[:0], FOUR.labels[:0]), "blur", 1), "0 images and 0 labels"),
    ],
)
def test_bad_input_is_refused_with_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call(generator=seeded())


def test_a_generator_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"generator=0: expected a torch\.Generator on the CPU"):
        corrupt(FOUR, "noise", 1, generator=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_device_of_the_images_changes_nothing(name):
    there = Split(FOUR.images.cuda(), FOUR.labels.cuda())
    found = corrupt(there, name, 2, generator=seeded()).images
    assert found.is_cuda
    assert torch.equal(found.cpu(), changed(FOUR, name, 2))
