"""Ensembles: children of one parent, and all members at once against one after the other."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fsp.data import load
from fsp.masks import children
from fsp.models import build
from fsp.training import fit
from fsp.training import predict as predict_one
from fsp.training.ensemble import PRESETS, bagged, combine, member_logits, predict, tune
from fsp.training.probabilities import quality
from fsp.training.train import TrainConfig


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("FSP_PROGRESS", "0")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def task():
    """70 training, 10 validation and 20 test images of three classes, 8x8."""
    return load("synthetic", shape=(1, 8, 8), classes=3, size=100, validation=0.125)


def small(seed=0):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten())
    net.append(nn.Linear(144, 3))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4, generator=seeded(seed + parameter.numel()))
    return net


def state(net):
    return {name: t.detach().clone() for name, t in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- members -----------------------------------------------------------------------------------------------------


def test_a_child_is_the_parent_under_its_mask_trained_on_and_the_parent_stays_as_it_is():
    net, data = small(), task()
    net.train()
    before, kept = state(net), children(net, "antirandom", 2, generator=seeded())[0]
    config = TrainConfig(2, 16, schedule="one_cycle", seed=3)
    torch.manual_seed(5)
    child, history = tune(net, kept, data, config)
    assert net.training
    assert same(state(net), before)
    assert (child[0].weight[~kept["0.weight"]] == 0).all()
    assert len(history.epochs) == 2
    twin = small()
    with torch.no_grad():
        twin[0].weight.mul_(kept["0.weight"])
    torch.manual_seed(5)
    fit(twin, data, config, masks=kept)
    assert same(state(child), state(twin)), "all but the pruned weights is inherited"
    still, _ = tune(net, kept, data, TrainConfig(1, 1000, 1e-30, weight_decay=0, seed=3))
    assert torch.equal(still[5].weight, net[5].weight)


def test_a_mask_of_another_network_is_refused_before_training():
    with pytest.raises(ValueError, match=r"mask '9\.weight' belongs to no parameter"):
        tune(small(), {"9.weight": torch.ones(3, dtype=torch.bool)}, task(), TrainConfig(1))


def test_bagging_leaves_nine_tenths_of_the_training_examples_and_nothing_else():
    data = task()
    bags = [bagged(data, generator=seeded(seed)) for seed in (0, 0, 1)]
    images = data.train.images.flatten(1)
    places = []
    for bag in bags:
        assert len(bag.train.labels) == 63
        same_image = (bag.train.images.flatten(1)[:, None] == images).all(-1)
        assert (same_image.sum(1) == 1).all()
        assert (same_image.sum(0) <= 1).all(), "without replacement"
        places.append(same_image.int().argmax(1))
        assert torch.equal(places[-1], places[-1].sort().values), "in their old order"
        assert torch.equal(bag.train.labels, data.train.labels[places[-1]])
        assert bag.test is data.test
        assert bag.validation is data.validation
    assert torch.equal(places[0], places[1])
    assert not torch.equal(places[0], places[2])
    for share in (0, 1.1, 0.001, True, "0.9"):
        with pytest.raises(ValueError, match="share="):
            bagged(data, share, generator=seeded())


def test_the_presets_spend_the_published_epochs():
    spent = {name: r.parent.epochs + r.children * r.tuning.epochs for name, r in PRESETS.items()}
    assert spent == {"large": 200, "small": 16}


# ---- prediction --------------------------------------------------------------------------------------------------


def logits_one_by_one(members, data):
    with torch.no_grad():
        return torch.stack([net.eval()(data.normalise(data.test.images)) for net in members])


def members_of(name):
    """Three trained-looking members with their own running statistics, and data that fit them."""
    if name == "small":
        return [small(seed) for seed in (0, 10, 20)], task()
    data = load("synthetic", shape=(1, 8, 8), classes=3, size=60)
    nets = [build(name, data.shape, data.classes, generator=seeded(seed)) for seed in range(3)]
    for seed, net in enumerate(nets):
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                nn.init.uniform_(module.running_mean, -0.5, 0.5, generator=seeded(seed))
                nn.init.uniform_(module.running_var, 0.5, 2, generator=seeded(seed))
    return nets, data


@pytest.mark.parametrize("at_once", [True, None])
@pytest.mark.parametrize("name", ["small", "mlp", "cnn", "resnet8"])
def test_all_members_at_once_predict_what_they_do_one_by_one(name, at_once):
    nets, data = members_of(name)
    for net in nets[:2]:
        net.train()
    before = [state(net) for net in nets]
    found = member_logits(nets, data, "test", batch_size=7, at_once=at_once)
    assert (found.shape, found.dtype, found.requires_grad) == ((3, len(data.test.labels), 3), torch.float32, False)
    assert not any(net.training for net in nets)
    assert all(same(state(net), old) for net, old in zip(nets, before, strict=True))
    assert all(p.requires_grad for net in nets for p in net.parameters())
    torch.testing.assert_close(found, logits_one_by_one(nets, data), rtol=1e-6, atol=1e-5)
    one_by_one = torch.stack([predict_one(net, data, "test") for net in nets])
    torch.testing.assert_close(found.softmax(-1), one_by_one, rtol=0, atol=1e-6)
    assert (one_by_one[0] - one_by_one[1]).abs().max() > 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_all_members_predict_at_once_what_they_do_on_the_cpu():
    nets, data = members_of("cnn")
    expected = logits_one_by_one(nets, data)
    found = member_logits([net.cuda() for net in nets], data, data.test.images.cuda(), batch_size=7)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)  # convolutions may be in TF32


def test_what_is_averaged_are_probabilities_or_logits_and_the_parent_counts_if_given():
    nets, data = members_of("small")
    logits = logits_one_by_one(nets, data).double().numpy()

    def softmax(z):
        return np.exp(z) / np.exp(z).sum(-1, keepdims=True)

    for by, expected in [("probabilities", softmax(logits[:2]).mean(0)), ("logits", softmax(logits[:2].mean(0)))]:
        np.testing.assert_allclose(predict(nets[:2], data, "test", by=by), expected, rtol=1e-4)
        assert torch.equal(
            predict(nets[:2], data, data.test.images, by=by, parent=nets[2]), predict(nets, data, "test", by=by)
        )
    np.testing.assert_allclose(predict(nets, data, "test"), softmax(logits).mean(0), rtol=1e-4)


def test_the_mean_probability_is_no_less_likely_than_the_members_on_average():
    for seed in range(5):
        logits = 3 * torch.randn(4, 50, 6, generator=seeded(seed))
        labels = torch.randint(6, (50,), generator=seeded(seed))
        members = [quality(member.softmax(-1), labels)["nll"] for member in logits]
        for by in ("probabilities", "logits"):
            assert quality(combine(logits, by), labels)["nll"] <= np.mean(members)


def test_no_members_and_members_of_different_architectures_are_refused_by_name():
    data, net = task(), small()
    wider, strided, longer = small(), small(), copy.deepcopy(net)
    wider[5] = nn.Linear(144, 4)
    strided[0].padding_mode = "reflect"
    longer.append(nn.ReLU())
    for members, message in [
        ([], "members is empty: expected at least one network"),
        ([net, net, wider], r"'5\.weight' has shape \(4, 144\) in member 2 and \(3, 144\) in member 0"),
        ([net, strided], r"member 1 has '.*padding_mode=reflect.*' where member 0 has '.*Conv2d.*'"),
        ([net, longer], r"member 1 has '\(6\): ReLU\(\)' where"),
    ]:
        for call in (member_logits, predict):
            with pytest.raises(ValueError, match=message):
                call(members, data, "test")
    with pytest.raises(ValueError, match="by='votes'"):
        predict([net], data, "test", by="votes")
    for wrong in (torch.zeros(2, 3), torch.zeros(0, 2, 3)):
        with pytest.raises(ValueError, match="expected \\(members, N, classes\\)"):
            combine(wrong)
