"""Measures of probabilities against sums made example by example."""

import itertools
import math

import numpy as np
import pytest
import torch

from fsp.training.probabilities import calibration_error, diversity, quality, temperature, tempered


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def examples(n=400, classes=5, seed=0, sharpness=2.0, dtype=torch.float64):
    """Probabilities, and labels drawn from them: calibrated but for chance."""
    logits = sharpness * torch.randn(n, classes, generator=seeded(seed), dtype=torch.float64)
    probabilities = logits.softmax(1)
    return probabilities.to(dtype), torch.multinomial(probabilities, 1, generator=seeded(seed + 100))[:, 0]


def by_hand(probabilities, labels, bins):
    """Accuracy, negative log-likelihood, Brier score and calibration error, one example after the other."""
    right, nll, brier, found = 0, 0.0, 0.0, [[] for _ in range(bins)]
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        best = max(range(len(row)), key=row.__getitem__)
        right += best == label
        nll -= math.log(row[label])
        brier += sum((p - (k == label)) ** 2 for k, p in enumerate(row))
        place = next(b for b in range(bins) if b / bins < row[best] <= (b + 1) / bins)
        found[place].append((best == label, row[best]))
    ece = 0.0
    for members in filter(None, found):
        hit, sure = np.mean([m[0] for m in members]), np.mean([m[1] for m in members])
        ece += len(members) / len(labels) * abs(hit - sure)
    n = len(labels)
    return {"accuracy": right / n, "nll": nll / n, "brier": brier / n, "ece": ece}


@pytest.mark.parametrize("bins", [1, 7, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quality_is_what_a_sum_over_examples_gives(bins, dtype):
    probabilities, labels = examples(dtype=dtype)
    assert quality(probabilities, labels, bins=bins) == pytest.approx(by_hand(probabilities, labels, bins), rel=1e-6)


def test_calibration_of_four_examples_made_by_hand_with_confidences_on_the_ends_of_bins():
    confidence = torch.tensor([0.6, 0.6, 0.8, 1.0], dtype=torch.float64)
    probabilities = torch.stack([confidence, 1 - confidence], 1)
    labels = torch.tensor([0, 1, 0, 1])
    # five bins: two of confidence .6, half right, lie in (.4, .6]; .8 right lies in (.6, .8]; 1 wrong in (.8, 1]
    expected = 2 / 4 * abs(0.5 - 0.6) + 1 / 4 * abs(1 - 0.8) + 1 / 4 * abs(0 - 1)
    for dtype in (torch.float32, torch.float64):
        assert calibration_error(probabilities.to(dtype), labels, bins=5) == pytest.approx(expected, rel=1e-6)
    # with a lower end in the bin, .6 and .8 would be together: 3/4 |2/3 - 2/3| + 1/4
    assert expected != pytest.approx(0.25)


@pytest.mark.parametrize("true", [0.3, 1.0, 2.5])
def test_the_temperature_undoes_one_that_was_put_on_calibrated_probabilities(true):
    probabilities, labels = examples(20_000)
    spoilt = tempered(probabilities, true)
    found = temperature(spoilt, labels)
    assert found == pytest.approx(1 / true, rel=0.05)
    losses = {t: quality(tempered(spoilt, t), labels)["nll"] for t in (found, found * 1.01, found / 1.01)}
    assert min(losses, key=losses.get) == found
    test, test_labels = examples(20_000, seed=1)
    result = quality(tempered(test, true), test_labels, validation=(spoilt, labels))
    assert result["temperature"] == found
    assert result["ece_tempered"] < 0.02
    if true != 1:
        assert result["ece"] > 3 * result["ece_tempered"]


def test_tempered_probabilities_are_powers_and_one_changes_nothing():
    probabilities, _ = examples(dtype=torch.float32)
    torch.testing.assert_close(tempered(probabilities, 1.0), probabilities.double(), rtol=1e-6, atol=1e-7)
    powers = probabilities.double() ** 2
    torch.testing.assert_close(tempered(probabilities, 0.5), powers / powers.sum(1, keepdim=True), rtol=1e-6, atol=1e-9)


def test_a_probability_that_is_rounded_to_zero_makes_nothing_infinite():
    probabilities, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 0])
    assert quality(probabilities, labels)["nll"] == pytest.approx(-math.log(torch.finfo(torch.float32).tiny) / 2)
    assert 0.01 <= temperature(probabilities, labels) <= 100
    assert math.isfinite(diversity(torch.stack([probabilities, probabilities.flip(1)]))["kl"])


def test_diversity_is_the_mean_over_all_ordered_pairs_of_members():
    members = torch.stack([examples(50, 3, seed)[0] for seed in range(4)])
    differ, divergence = [], []
    for i, j in itertools.permutations(range(4), 2):
        differ.append(
            np.mean([int(a.argmax()) != int(b.argmax()) for a, b in zip(members[i], members[j], strict=True)])
        )
        divergence.append((members[i] * (members[i] / members[j]).log()).sum(1).mean().item())
    found = diversity(members)
    assert found == pytest.approx({"disagreement": np.mean(differ), "kl": np.mean(divergence)})
    assert diversity(members[[0, 0, 0]]) == pytest.approx({"disagreement": 0, "kl": 0}, abs=1e-12)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), "of at least one example"),
        (torch.tensor([0.5, 0.5]), torch.tensor([0, 1]), r"of shape \(2,\)"),
        (torch.tensor([[1, 0]]), torch.tensor([0]), "torch.int64 of shape"),
        (torch.tensor([[2.0, 3.0]]), torch.tensor([0]), r"expected softmax\(1\) of the logits"),
        (torch.tensor([[1.5, -0.5]]), torch.tensor([0]), r"expected softmax\(1\) of the logits"),
        (torch.tensor([[math.nan, 1.0]]), torch.tensor([0]), r"expected softmax\(1\) of the logits"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([2]), "labels are from 2 to 2: expected them from 0 to 1"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0, 1]), r"expected int64 of shape \(1,\)"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0.0]), "labels are torch.float32"),
        (np.ones((1, 1)), torch.tensor([0]), "'probabilities' is a numpy.ndarray"),
    ],
)
def test_what_are_no_probabilities_or_no_labels_is_refused_by_every_measure(probabilities, labels, message):
    for measure in (quality, calibration_error, temperature):
        with pytest.raises(ValueError, match=message):
            measure(probabilities, labels)


def test_numbers_out_of_range_are_refused_by_name():
    probabilities, labels = examples(10)
    for bins in (0, 1.5, True, 10_001):
        with pytest.raises(ValueError, match=f"bins={bins}"):
            quality(probabilities, labels, bins=bins)
    for value in (0, -1, math.inf, "1"):
        with pytest.raises(ValueError, match="temperature="):
            tempered(probabilities, value)
    for members in (probabilities, probabilities[None]):
        with pytest.raises(ValueError, match="two members or more"):
            diversity(members)
