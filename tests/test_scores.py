"""`fsp.scores` against hand-worked networks, autograd, finite differences, exact Hessians; models stay untouched."""

import copy
import inspect
from itertools import pairwise

import pytest
import torch
from torch import inf, nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.functional import cross_entropy, one_hot

from fsp.masks import keep_top, prunable
from fsp.models import build
from fsp.scores import SCORES, grasp, magnitude, random, snip, synflow

ON_DATA = {"snip": snip, "grasp": grasp}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ones_of(model):
    return {name: torch.ones_like(p, dtype=torch.bool) for name, p in prunable(model).items()}


def half_of(model, seed=0):
    rng = generator(seed)
    return {name: torch.rand(p.shape, generator=rng) < 0.6 for name, p in prunable(model).items()}


def examples(shape=(3,), n=8, classes=3, seed=1, dtype=torch.float64):
    rng = generator(seed)
    return torch.randn(n, *shape, generator=rng, dtype=dtype), torch.arange(n) % classes


def drawn(model, seed=0):
    """The model with every parameter, biases and norms included, drawn anew from a seed."""
    rng = generator(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64))
    return model


def two_layers(seed=0):
    return drawn(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), seed)


def normed(dropout=0.0):
    """Convolution, batch norm with used statistics, dropout, linear."""
    model = drawn(
        nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.BatchNorm2d(3),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(3 * 4, 3),
        ).double()
    )
    model[1].running_mean.copy_(torch.tensor([0.5, -0.3, 0.1]))
    model[1].running_var.copy_(torch.tensor([2.0, 0.5, 1.5]))
    return model


def loss_of(model, batches, temperature=1.0):
    """Mean cross entropy over all examples, from the definition."""
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    logits = model(x) / temperature
    return -(logits.log_softmax(1) * one_hot(y, logits.shape[1])).sum() / len(y)


def near(a, b, **tolerance):
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


def masked_copy(model, kept):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in kept:
                p.copy_(torch.where(kept[name], p, torch.zeros_like(p)))
    return model


# ---- random and magnitude ----------------------------------------------------------------------------------------


def test_random_scores_are_standard_normal_and_depend_only_on_the_generator():
    model = nn.Linear(300, 200)
    torch.manual_seed(1)
    s = random(model, ones_of(model), generator=generator(2))["weight"]
    torch.manual_seed(3)
    assert torch.equal(s, random(model, ones_of(model), generator=generator(2))["weight"])
    assert not torch.equal(s, random(model, ones_of(model), generator=generator(3))["weight"])
    assert abs(s.mean()) < 0.02  # 60,000 draws: five standard errors
    assert abs(s.var() - 1) < 0.03
    assert abs((s.abs() < 1).double().mean() - 0.6827) < 0.01


def test_magnitude_is_the_absolute_weight():
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[0.3, -0.8], [0.0, -0.1]])
    s = magnitude(layer, {"weight": torch.tensor([[True, True], [True, False]])})["weight"]
    assert torch.equal(s, torch.tensor([[0.3, 0.8], [0.0, -inf]]))


# ---- SNIP --------------------------------------------------------------------------------------------------------


def test_snip_is_the_absolute_weight_times_its_gradient():
    model, batches = two_layers(), [examples()]
    s = snip(model, ones_of(model), batches=batches)
    loss_of(model, batches).backward()
    near(s, {name: (p * p.grad).detach().abs() for name, p in prunable(model).items()})
    assert all((scores > 0).all() for scores in s.values())


def test_snip_is_the_slope_of_the_loss_in_the_mask():
    model, batches, step = two_layers(), [examples()], 1e-6
    weights = {name: p.detach() for name, p in prunable(model).items()}

    def loss(name, index, entry):
        mask = torch.ones_like(weights[name])
        mask.view(-1)[index] = entry
        return loss_of(lambda x: functional_call(model, {name: weights[name] * mask}, (x,)), batches).item()

    slopes = {
        name: torch.tensor(
            [(loss(name, i, 1 + step) - loss(name, i, 1 - step)) / (2 * step) for i in range(w.numel())],
            dtype=torch.float64,
        ).view_as(w)
        for name, w in weights.items()
    }
    near(snip(model, ones_of(model), batches=batches), {n: s.abs() for n, s in slopes.items()}, rtol=1e-5, atol=1e-9)


def test_snip_of_a_linear_classifier_has_its_closed_form():
    # logits (0, 0): both probabilities 1/2, so the gradient of row c is (1/2 - [c is the label]) x
    layer = nn.Linear(2, 2, bias=False).double()
    layer.weight.data = torch.tensor([[2.0, -1.0], [4.0, -2.0]], dtype=torch.float64)
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    s = snip(layer, ones_of(layer), batches=[(x, torch.tensor([0]))])["weight"]
    assert s.tolist() == [[1.0, 1.0], [2.0, 2.0]]


# ---- GraSP -------------------------------------------------------------------------------------------------------


def exact_grasp(model, batches, temperature):
    """Weight times (Hessian times gradient), from the full Hessian of the loss in the prunable weights alone."""
    weights = {name: p.detach() for name, p in prunable(model).items()}
    sizes = [w.numel() for w in weights.values()]

    def loss(flat):
        parts = {n: part.view_as(weights[n]) for n, part in zip(weights, flat.split(sizes), strict=True)}
        return loss_of(lambda x: functional_call(model, parts, (x,)), batches, temperature)

    flat = torch.cat([w.flatten() for w in weights.values()]).requires_grad_()
    gradient = torch.autograd.grad(loss(flat), flat)[0]
    s = flat.detach() * (hessian(loss, flat.detach()) @ gradient)
    return {n: part.view_as(weights[n]) for n, part in zip(weights, s.split(sizes), strict=True)}


@pytest.mark.parametrize("temperature", [1.0, 7.0, 200.0])
@pytest.mark.parametrize("sizes", [[8], [5, 3]])
def test_grasp_is_the_weight_times_the_exact_hessian_times_the_gradient(temperature, sizes):
    model, (x, y) = two_layers(), examples()
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    s = grasp(model, ones_of(model), batches=batches, temperature=temperature)
    near(s, exact_grasp(model, batches, temperature), rtol=1e-7, atol=1e-18)
    assert any((scores > 0).any() for scores in s.values())  # signed
    assert any((scores < 0).any() for scores in s.values())


def test_grasp_at_masked_weights_is_that_of_the_masked_network():
    model, batches = two_layers(), [examples()]
    kept = half_of(model)
    s = grasp(model, kept, batches=batches, temperature=1.0)
    expected = exact_grasp(masked_copy(model, kept), batches, 1.0)
    near({n: v[kept[n]] for n, v in s.items()}, {n: v[kept[n]] for n, v in expected.items()})


def test_the_lowest_grasp_score_is_where_removal_raises_gradient_flow_most():
    model, batches = two_layers(), [examples()]
    weights = {name: p.detach() for name, p in prunable(model).items()}

    def flow(name=None, index=0, entry=1.0):
        parts = {n: w.clone() for n, w in weights.items()}
        if name is not None:
            parts[name].view(-1)[index] *= entry
        leaves = {n: w.requires_grad_() for n, w in parts.items()}
        loss = loss_of(lambda x: functional_call(model, leaves, (x,)), batches)
        return sum((g**2).sum().item() for g in torch.autograd.grad(loss, list(leaves.values()))) / 2

    # shrink every weight by a millionth: removal to first order
    rise = {n: torch.tensor([flow(n, i, 1 - 1e-6) - flow() for i in range(w.numel())]) for n, w in weights.items()}
    s = grasp(model, ones_of(model), batches=batches, temperature=1.0)
    near(
        {n: v.flatten() * -1e-6 for n, v in s.items()}, {n: r.double() for n, r in rise.items()}, rtol=1e-3, atol=1e-11
    )
    pruned = ~torch.cat([m.flatten() for m in keep_top(s, 0.95).values()])  # the lowest of 24
    assert pruned.nonzero().item() == torch.cat(list(rise.values())).argmax()


def test_temperature_divides_the_logits():
    # for a linear classifier the loss depends on W / T alone, so s_T(W) = s_1(W / T) / T^2
    model, batches = drawn(nn.Linear(3, 3, bias=False).double()), [examples()]
    cooled = copy.deepcopy(model)
    cooled.weight.data /= 5
    s = grasp(model, ones_of(model), batches=batches, temperature=5.0)["weight"]
    torch.testing.assert_close(s, grasp(cooled, ones_of(model), batches=batches, temperature=1.0)["weight"] / 25)


def test_the_temperature_is_200_and_changes_the_order_of_weights():
    model, batches = two_layers(), [examples()]
    default = grasp(model, ones_of(model), batches=batches)
    near(default, grasp(model, ones_of(model), batches=batches, temperature=200.0), rtol=0, atol=0)
    hot, cold = keep_top(default, 0.5), keep_top(grasp(model, ones_of(model), batches=batches, temperature=1.0), 0.5)
    assert any(not torch.equal(hot[name], cold[name]) for name in hot)  # D19: no mere rescaling


@pytest.mark.parametrize("temperature", [0, -200.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    model = two_layers()
    with pytest.raises(ValueError, match=f"temperature {temperature} is not positive"):
        grasp(model, ones_of(model), batches=[examples()], temperature=temperature)


class Recorder(nn.Module):
    """Passes its input on and notes one random number a call."""

    def __init__(self):
        super().__init__()
        self.draws = []

    def forward(self, x):
        self.draws.append(torch.rand(()).item())
        return x


def test_both_passes_of_grasp_see_the_same_dropout_and_batches_differ_in_it():
    recorder = Recorder()
    model, (x, y) = nn.Sequential(nn.Linear(3, 3), recorder), examples(dtype=torch.float32)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    grasp(model, ones_of(model), batches=batches, generator=generator(1))
    first, second, again, once_more = recorder.draws
    assert (first, second) == (again, once_more)
    assert first != second
    grasp(model, ones_of(model), batches=batches, generator=generator(2))
    assert recorder.draws[4] != first


# ---- SNIP and GraSP together -------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
@pytest.mark.parametrize("sizes", [[4, 4], [5, 3], [1] * 8])
def test_batches_add_up_to_the_gradient_of_all_examples(score, sizes):
    model, (x, y) = two_layers(), examples()
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    near(score(model, ones_of(model), batches=[(x, y)]), score(model, ones_of(model), batches=parts), rtol=1e-8, atol=0)


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
def test_in_eval_mode_batches_add_up_even_under_batch_norm(score):
    model, (x, y) = normed(), examples((2, 4, 4))
    parts = [(x[:3], y[:3]), (x[3:], y[3:])]
    whole = score(model, ones_of(model), batches=[(x, y)], training=False)
    near(whole, score(model, ones_of(model), batches=parts, training=False), rtol=1e-8, atol=0)


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
def test_the_order_of_examples_does_not_matter(score):
    model, (x, y) = normed(), examples((2, 4, 4))
    order = torch.randperm(8, generator=generator())
    near(
        score(model, ones_of(model), batches=[(x, y)]),
        score(model, ones_of(model), batches=[(x[order], y[order])]),
        rtol=1e-8,
        atol=1e-16,
    )


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_takes_its_statistics_from_the_batch_or_from_its_buffers(training):
    model, batches = normed(), [examples((2, 4, 4))]
    expected = {"snip": {}, "grasp": exact_grasp(copy.deepcopy(model).train(training), batches, 1.0)}
    oracle = copy.deepcopy(model).train(training)
    loss_of(oracle, batches).backward()
    expected["snip"] = {name: (p * p.grad).detach().abs() for name, p in prunable(oracle).items()}
    for flag in (True, False):  # whatever mode the model happens to be in
        model.train(flag)
        near(snip(model, ones_of(model), batches=batches, training=training), expected["snip"])
        found = grasp(model, ones_of(model), batches=batches, training=training, temperature=1.0)
        near(found, expected["grasp"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
def test_norms_are_in_train_mode_by_default(score):
    model, batches = normed(), [examples((2, 4, 4))]
    default = score(model.eval(), ones_of(model), batches=batches)
    near(default, score(model, ones_of(model), batches=batches, training=True), rtol=0, atol=0)
    other = score(model, ones_of(model), batches=batches, training=False)
    assert not torch.allclose(default["0.weight"], other["0.weight"])


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
def test_dropout_follows_the_generator_in_train_mode_and_is_off_in_eval_mode(score):
    model, batches = normed(dropout=0.5), [examples((2, 4, 4))]

    def scored(seed, training):
        s = score(model, ones_of(model), batches=batches, training=training, generator=generator(seed))
        return torch.cat([v.flatten() for v in s.values()])

    torch.manual_seed(1)
    first = scored(1, True)
    torch.manual_seed(2)
    assert torch.equal(first, scored(1, True))
    assert not torch.allclose(first, scored(2, True))
    assert torch.equal(scored(1, False), scored(2, False))


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
def test_turning_a_hidden_unit_around_changes_no_score(score):
    # tanh is odd: with all signs around a unit turned, the network is the same function
    model, batches = two_layers(), [examples()]
    turned = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (turned[0].weight[1], turned[0].bias[1:2], turned[2].weight[:, 1]):
            tensor.neg_()
    near(score(model, ones_of(model), batches=batches), score(turned, ones_of(model), batches=batches))


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
def test_a_weight_that_is_used_twice_gets_the_gradient_of_both_uses(score):
    torch.manual_seed(0)
    shared = nn.Linear(3, 3, bias=False).double()
    model, (x, y) = nn.Sequential(shared, nn.Tanh(), shared), examples()
    found = score(model, ones_of(model), batches=[(x, y)], **({"temperature": 1.0} if score is grasp else {}))
    w = shared.weight.detach().clone().requires_grad_()

    def loss(w):
        return cross_entropy(torch.tanh(x @ w.T) @ w.T, y)

    gradient = torch.autograd.grad(loss(w), w)[0]
    if score is snip:
        expected = (w * gradient).abs()
    else:
        expected = w * torch.einsum("abcd,cd->ab", hessian(loss, w.detach()), gradient)
    near(found, {"0.weight": expected.detach()})


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
def test_a_computation_in_float64_refines_a_float32_model(score):
    model, (x, y) = normed().float(), examples((2, 4, 4), dtype=torch.float32)
    fine = score(model, ones_of(model), batches=[(x, y)], dtype=torch.float64)
    oracle = score(copy.deepcopy(model).double(), ones_of(model), batches=[(x.double(), y)])
    assert all(s.dtype == torch.float64 for s in fine.values())
    near(fine, oracle, rtol=0, atol=0)
    coarse = score(model, ones_of(model), batches=[(x, y)])
    assert all(s.dtype == torch.float32 for s in coarse.values())
    near(
        {n: s.double() for n, s in coarse.items()},
        fine,
        rtol=1e-3,
        atol=1e-6 * max(s.abs().max() for s in fine.values()).item(),
    )


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
@pytest.mark.parametrize("batches", [None, []])
def test_scores_on_data_ask_for_batches(score, batches):
    model = two_layers()
    with pytest.raises(ValueError, match="pass batches"):
        score(model, ones_of(model), batches=batches)


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
def test_an_iterator_of_batches_is_refused_or_scored_in_full(score):
    model, batch = two_layers(), examples()
    try:
        found = score(model, ones_of(model), batches=iter([batch]))
    except (TypeError, ValueError):
        return
    near(found, score(model, ones_of(model), batches=[batch]))


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
def test_inputs_that_are_token_numbers_stay_whole_numbers(score):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 3))
    tokens, labels = torch.randint(5, (6, 3), generator=generator()), torch.arange(6) % 3
    assert score(model, ones_of(model), batches=[(tokens, labels)])["2.weight"].any()


# ---- SynFlow -----------------------------------------------------------------------------------------------------


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_synflow_of_a_two_layer_linear_network_by_hand():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -2.0], [-3.0, 0.5]])
    model[1].weight.data = torch.tensor([[-4.0, 2.0]])
    # hidden (3, 3.5), R = 4 * 3 + 2 * 3.5 = 19
    s = synflow(model, ones_of(model), shape=(2,))
    assert s["0.weight"].tolist() == [[4.0, 8.0], [6.0, 1.0]]
    assert s["1.weight"].tolist() == [[12.0, 7.0]]


def test_synflow_takes_the_absolute_value_of_biases_too():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    for p, value in zip(model.parameters(), (-2.0, -3.0, 5.0, -7.0), strict=True):
        p.data.fill_(value)
    s = synflow(model, ones_of(model), shape=(1,))  # R = 5 (2 + 3) + 7
    assert s["0.weight"].item() == 10
    assert s["1.weight"].item() == 25


def test_synflow_takes_the_absolute_value_of_scale_shift_and_running_statistics():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, eps=0.0), nn.Linear(1, 1, bias=False))
    model[0].weight.data.fill_(-7.0)
    model[1].weight.data.fill_(-2.0)
    model[1].bias.data.fill_(-3.0)
    model[1].running_mean.fill_(-5.0)
    model[1].running_var.fill_(4.0)
    model[2].weight.data.fill_(-3.0)
    s = synflow(model.train(), ones_of(model), shape=(1,))  # R = 3 (2 (7 - 5) / 2 + 3)
    assert s["0.weight"].item() == 21
    assert s["2.weight"].item() == 15


def test_synflow_is_blind_to_signs():
    model = normed()
    turned, rng = copy.deepcopy(model), generator(5)
    for name, t in turned.state_dict().items():
        if t.is_floating_point() and "running_var" not in name:
            t.mul_(torch.randint(2, t.shape, generator=rng) * 2 - 1)
    near(synflow(model, ones_of(model), shape=(2, 4, 4)), synflow(turned, ones_of(model), shape=(2, 4, 4)))


def total_flow(model, shape):
    """R by its definition: absolute state, eval mode, one input of ones, the sum of the outputs; float64."""
    model = copy.deepcopy(model).double().eval()
    for t in model.state_dict().values():
        t.abs_()
    with torch.no_grad():
        return model(torch.ones(1, *shape, dtype=torch.float64)).sum().item()


def test_flux_is_conserved_through_every_layer_and_every_hidden_unit_of_an_mlp():
    model = build("mlp", (1, 4, 4), 10, hidden=(12, 9))  # all biases are 0 at initialisation
    s = synflow(model, ones_of(model), shape=(1, 4, 4))
    flow = total_flow(model, (1, 4, 4))
    for scores in s.values():
        assert scores.sum().item() == pytest.approx(flow, rel=1e-12)
    layers = list(s.values())
    for into, out_of in pairwise(layers):
        torch.testing.assert_close(into.sum(1), out_of.sum(0), rtol=1e-12, atol=0)


def test_flux_is_conserved_through_every_layer_and_every_channel_of_a_vgg_16():
    # max pools included; batch norm is a factor at initialisation
    model = build("vgg16", (3, 32, 32), 10)
    s = synflow(model, ones_of(model), shape=(3, 32, 32))
    flow = total_flow(model, (3, 32, 32))
    assert 1e21 < flow < 1e24  # others.md §1.8 has 3e22 for this initialiser
    layers = list(s.values())
    for scores in layers:
        assert scores.sum().item() == pytest.approx(flow, rel=1e-10)
    for into, out_of in pairwise(layers):
        torch.testing.assert_close(into.flatten(1).sum(1), out_of.transpose(0, 1).flatten(1).sum(1), rtol=1e-10, atol=0)


def test_flux_is_conserved_under_masks():
    model = build("mlp", (1, 4, 4), 10, hidden=(12, 9))
    kept = half_of(model)
    s = synflow(model, kept, shape=(1, 4, 4))
    flow = total_flow(masked_copy(model, kept), (1, 4, 4))
    for name, scores in s.items():
        assert scores[kept[name]].sum().item() == pytest.approx(flow, rel=1e-12)


def test_a_convolution_inside_a_residual_block_carries_less_than_the_whole_flow():
    model = build("resnet8", (3, 8, 8), 10)
    s = synflow(model, ones_of(model), shape=(3, 8, 8))
    flow = total_flow(model, (3, 8, 8))
    for name, scores in s.items():
        if name in ("stem.conv.weight", "classifier.weight"):  # no way around these
            assert scores.sum().item() == pytest.approx(flow, rel=1e-10)
        else:
            assert 0 < scores.sum() < 0.999 * flow


def test_shrinking_one_layer_of_a_sequence_scales_all_scores_alike():
    model = build("mlp", (1, 4, 4), 10, hidden=(12, 9))
    small = copy.deepcopy(model)
    small.linear2.weight.data /= 8
    s = synflow(model, ones_of(model), shape=(1, 4, 4))
    near({n: v / 8 for n, v in s.items()}, synflow(small, ones_of(model), shape=(1, 4, 4)), rtol=1e-12, atol=0)


def test_synflow_uses_no_data_and_no_randomness():
    model = normed(dropout=0.5)
    s = synflow(model.train(), ones_of(model), shape=(2, 4, 4))
    for seed in (1, 2):
        batches = [examples((2, 4, 4), seed=seed, n=5), examples((2, 9, 9), seed=seed)]
        near(s, synflow(model, ones_of(model), batches=batches), rtol=0, atol=0)
    near(s, synflow(model.eval(), ones_of(model), shape=[2, 4, 4]), rtol=0, atol=0)


@pytest.mark.parametrize("batches", [None, []])
def test_synflow_asks_for_the_shape_of_an_input(batches):
    model = two_layers()
    with pytest.raises(ValueError, match="shape="):
        synflow(model, ones_of(model), batches=batches)


def test_a_resnet_34_has_finite_flow_in_float64_and_is_refused_in_float32():
    model = build("resnet34", (3, 32, 32), 10, init="kaiming_normal_fan_out")
    s = synflow(model, ones_of(model), shape=(3, 32, 32))
    assert all(scores.isfinite().all() for scores in s.values())
    assert 1e53 < s["classifier.weight"].sum().item() < 1e56  # others.md §1.8: 4e54
    coarse = synflow(model, ones_of(model), shape=(3, 32, 32), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"nan or inf.*dtype=torch\.float64"):
        keep_top(coarse, 0.1)


# ---- every score -------------------------------------------------------------------------------------------------


class Whole(nn.Module):
    """What a user's model may hold: norms, dropout, frozen parameters, a plain buffer, an unused layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.norm2 = nn.BatchNorm2d(4, momentum=None)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(64, 3)
        self.unused = nn.Linear(3, 3)
        self.register_buffer("shift", torch.full((4, 1, 1), -0.5), persistent=False)
        self.conv2.requires_grad_(False)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)) + self.shift)
        x = torch.relu(x + self.norm2(self.conv2(x)))
        return self.head(self.drop(x).flatten(1))


def whole():
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = Whole()
    model.norm.eval()  # flags differ by module
    model.conv.weight.grad = torch.randn(model.conv.weight.shape, generator=generator())
    return model


def arguments(score, model=None, **more):
    """What a score takes of masks, batches, shape and generator."""
    x, y = examples((2, 4, 4), dtype=torch.float32)
    offered = {"batches": [(x[:5], y[:5]), (x[5:], y[5:])], "generator": generator(6), **more}
    return {name: value for name, value in offered.items() if name in inspect.signature(score).parameters}


def everything_about(model):
    """Bits, identities, versions and flags of all that a model holds, and the global random state."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        "bits": {n: t.detach().clone() for n, t in tensors.items()} | {"random": torch.get_rng_state()},
        "objects": {n: (id(t), t._version, t.requires_grad, t.data_ptr()) for n, t in tensors.items()},
        "grads": {n: None if p.grad is None else (id(p.grad), p.grad.tolist()) for n, p in model.named_parameters()},
        "flags": {n: m.training for n, m in model.named_modules()},
        "keys": list(model.state_dict()),
    }


def assert_unchanged(model, before):
    after = everything_about(model)
    assert all(torch.equal(after["bits"][n], t) for n, t in before.pop("bits").items())
    assert all(after[key] == value for key, value in before.items())


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_the_model_and_the_global_random_state_bit_identical(name, training):
    model = whole()
    before = everything_about(model)
    SCORES[name](model, half_of(model), **arguments(SCORES[name], training=training))
    assert_unchanged(model, before)


class Breaks(nn.Module):
    """Draws a random number and passes its input on, until the given call."""

    def __init__(self, call):
        super().__init__()
        self.left = call

    def forward(self, x):
        torch.rand(3)
        self.left -= 1
        if self.left == 0:
            raise ArithmeticError("in the middle")
        return x


@pytest.mark.parametrize(("name", "call"), [("snip", 1), ("snip", 2), ("grasp", 2), ("grasp", 4), ("synflow", 1)])
def test_scoring_that_breaks_off_in_a_forward_pass_leaves_the_model_as_it_was(name, call):
    model = whole()
    model.drop = nn.Sequential(nn.Dropout(0.5), Breaks(call))
    before = everything_about(model)
    with pytest.raises(ArithmeticError) as held:  # the traceback is still alive when we look
        SCORES[name](model, half_of(model), **arguments(SCORES[name]))
    assert_unchanged(model, before)
    assert held.value is not None


class Gradient(torch.autograd.Function):
    """Identity as a gradient, without a gradient of its own."""

    @staticmethod
    def forward(ctx, gradient):
        return gradient.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("in the second derivative")


class Identity(torch.autograd.Function):
    """Identity that can be differentiated once."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return Gradient.apply(gradient)


class Once(nn.Module):
    def forward(self, x):
        return Identity.apply(x)


def test_scoring_that_breaks_off_in_the_second_derivative_leaves_the_model_as_it_was():
    model = whole()
    model.drop = nn.Sequential(nn.Dropout(0.5), Once())
    before = everything_about(model)
    with pytest.raises(ArithmeticError) as held:
        grasp(model, half_of(model), **arguments(grasp))
    assert_unchanged(model, before)
    assert held.value is not None


@pytest.mark.parametrize("name", SCORES)
def test_scores_have_the_masks_names_shapes_and_device_and_only_pruned_weights_are_minus_infinity(name):
    model = whole()
    kept = half_of(model)
    s = SCORES[name](model, kept, **arguments(SCORES[name]))
    assert list(s) == list(kept) == ["conv.weight", "conv2.weight", "head.weight", "unused.weight"]
    for key, mask in kept.items():
        assert s[key].shape == mask.shape
        assert s[key].device == mask.device
        assert s[key].is_floating_point()
        assert not s[key].requires_grad
        assert (s[key][~mask] == -inf).all()
        assert s[key][mask].isfinite().all()
    assert s["conv2.weight"][kept["conv2.weight"]].any()  # frozen is not worthless
    if name in ("snip", "grasp", "synflow"):
        assert not s["unused.weight"][kept["unused.weight"]].any()  # an unused layer is


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow"])
def test_scores_are_taken_at_the_masked_weights(name):
    model = whole()
    kept, score = half_of(model), SCORES[name]
    s = score(model, kept, **arguments(score))
    expected = score(masked_copy(model, kept), ones_of(model), **arguments(score))
    for key, mask in kept.items():
        torch.testing.assert_close(s[key][mask], expected[key][mask], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", SCORES)
def test_masks_of_some_tensors_leave_the_others_dense(name):
    model, score = whole(), SCORES[name]
    everything = score(model, ones_of(model), **arguments(score))
    kept = {"head.weight": torch.ones(3, 64, dtype=torch.bool)}
    s = score(model, kept, **arguments(score))
    assert list(s) == ["head.weight"]
    if name in ("magnitude", "snip", "synflow"):  # GraSP's flow is that of the masked tensors alone
        torch.testing.assert_close(s["head.weight"], everything["head.weight"], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow"])
def test_scoring_works_where_gradients_are_switched_off(name):
    model, score = whole(), SCORES[name]
    expected = score(model, ones_of(model), **arguments(score))
    with torch.no_grad():
        near(score(model, ones_of(model), **arguments(score)), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", SCORES)
def test_scores_on_a_gpu_are_those_of_the_cpu_and_leave_its_random_state(name):
    model, score = whole().double(), SCORES[name]
    model.drop.p = 0.0  # dropout draws on the device
    kept = half_of(model)
    expected = score(model, kept, **arguments(score))
    model.cuda()
    more = arguments(score)
    if "batches" in more:
        more["batches"] = [(x.cuda(), y.cuda()) for x, y in more["batches"]]
    before, random_state = everything_about(model), torch.cuda.get_rng_state()
    s = score(model, {n: m.cuda() for n, m in kept.items()}, **more)
    assert_unchanged(model, before)
    assert torch.equal(random_state, torch.cuda.get_rng_state())
    assert all(v.device.type == "cuda" for v in s.values())
    near({n: v.cpu() for n, v in s.items()}, expected, rtol=1e-6, atol=1e-12)
