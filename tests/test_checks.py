"""`fsp.checks`: what is refused, and what the error says."""

from functools import partial

import numpy as np
import pytest
import torch

from fsp.checks import (
    check_choice,
    check_count,
    check_device,
    check_generator,
    check_options,
    check_shape,
    device_of,
    is_count,
)


def test_a_count_is_a_whole_number_of_at_least_the_bound_and_no_bool():
    assert is_count(3, 3)
    assert is_count(np.int64(3), 0)
    assert not any(is_count(value, 1) for value in (0, True, 2.0, "3", None, float("nan")))


def test_what_is_right_passes():
    check_count("size", 1, 1)
    check_shape([3, 32, 32])
    check_choice("skip", False, (True, False))
    check_options("mlp", ["norm"], ["hidden", "norm"])
    check_generator(torch.Generator())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (partial(check_count, "size", True, 1), ValueError, "size=True: expected an integer of at least 1"),
        (partial(check_shape, (1, 0, 8)), ValueError, r"shape=\(1, 0, 8\): expected \(channels, height, width\)"),
        (partial(check_shape, 64), ValueError, "shape=64"),
        (
            partial(check_choice, "mode", "edge", ["zeros", "reflect"]),
            ValueError,
            "mode='edge': expected one of 'zeros'",
        ),
        (
            partial(check_choice, "mode", "Reflct", ["zeros", "reflect"]),
            ValueError,
            r"mode='Reflct': expected one of 'zeros', 'reflect'; did you mean reflect\?$",
        ),
        (partial(check_options, "mlp", ["nrom"], ["hidden", "norm"]), TypeError, r"hidden, norm; did you mean norm\?$"),
        (partial(check_choice, "skip", 1, (True, False)), ValueError, "skip=1: expected one of True, False"),
        (partial(check_options, "mlp", ["width"], ["norm"]), TypeError, "mlp has no option width; it takes norm"),
        (partial(check_options, "lenet300", ["norm"], []), TypeError, "it takes none"),
        (partial(check_generator, 0), ValueError, "generator=0: expected a torch.Generator on the CPU"),
        (
            partial(check_device, "gpu"),
            ValueError,
            "device='gpu': expected a device of torch that this machine has, of cpu",
        ),
        (partial(check_device, "meta"), ValueError, "device='meta': expected a device of torch"),
        (partial(check_device, 0.5), ValueError, "device=0.5: expected a device of torch"),
        (partial(check_device, f"cuda:{torch.cuda.device_count()}"), ValueError, "that this machine has, of cpu"),
    ],
)
def test_what_is_wrong_is_named_with_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_device_may_be_left_out_and_a_model_without_parameters_computes_on_the_cpu():
    assert check_device(None) == check_device("cpu") == torch.device("cpu")
    assert device_of(torch.nn.Flatten()) == torch.device("cpu")
    assert device_of(torch.nn.Linear(2, 2, device="meta")) == torch.device("meta")
