"""`fsp.pruning.scores` against hand-worked networks, autograd, finite differences, exact Hessians."""

import copy
import inspect
import itertools
import warnings
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from networks import all_kept, generator, random_masks
from torch import inf, nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.functional import cross_entropy, one_hot

from fsp.masks import keep_top, prunable
from fsp.models import build
from fsp.pruning.scores import force, grasp, magnitude, snip, synflow, synflow_l2, taylor

AVERAGED = {"snip": snip, "force": force, "grasp": grasp}  # over all examples
ON_DATA = {"snip": snip, "taylor": taylor, "force": force, "grasp": grasp}
FLOW = {"synflow": synflow, "synflow_l2": synflow_l2}
SCORES = {"magnitude": magnitude, **ON_DATA, **FLOW}


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
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(3 * 4, 3)
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


flow_may_be_lost = pytest.mark.filterwarnings("ignore:synaptic flow is not conserved")


# ---- magnitude ---------------------------------------------------------------------------------------------------


def test_magnitude_is_the_absolute_weight():
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[0.3, -0.8], [0.0, -0.1]])
    s = magnitude(layer, {"weight": torch.tensor([[True, True], [True, False]])})["weight"]
    assert torch.equal(s, torch.tensor([[0.3, 0.8], [0.0, -inf]]))


# ---- SNIP --------------------------------------------------------------------------------------------------------


def test_snip_is_the_absolute_weight_times_its_gradient():
    model, batches = two_layers(), [examples()]
    s = snip(model, all_kept(model), batches=batches)
    loss_of(model, batches).backward()
    near(s, {name: (p * p.grad).detach().abs() for name, p in prunable(model).items()})
    assert all((scores > 0).all() for scores in s.values())


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
    s = grasp(model, all_kept(model), batches=batches, temperature=temperature)
    near(s, exact_grasp(model, batches, temperature), rtol=1e-7, atol=1e-18)
    assert any((scores > 0).any() for scores in s.values())  # signed
    assert any((scores < 0).any() for scores in s.values())


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
    s = grasp(model, all_kept(model), batches=batches, temperature=1.0)
    near(
        {n: v.flatten() * -1e-6 for n, v in s.items()}, {n: r.double() for n, r in rise.items()}, rtol=1e-3, atol=1e-11
    )
    pruned = ~torch.cat([m.flatten() for m in keep_top(s, 0.95).values()])  # the lowest of 24
    assert pruned.nonzero().item() == torch.cat(list(rise.values())).argmax()


class Attention(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.query, self.value, self.fused = nn.Linear(3, 4), nn.Linear(3, 4), fused

    def forward(self, x):
        q, v = self.query(x), self.value(x)
        if self.fused:
            return nn.functional.scaled_dot_product_attention(q[:, None], q[:, None], v[:, None])[:, 0].mean(1)
        return ((q @ q.mT / 2).softmax(-1) @ v).mean(1)


def test_grasp_takes_second_derivatives_of_fused_attention():
    fused, plain = (drawn(Attention(f).double()) for f in (True, False))
    batches = [examples((5, 3))]
    near(*(grasp(model, all_kept(model), batches=batches, temperature=1.0) for model in (fused, plain)))


def test_grasp_takes_second_derivatives_of_hard_sigmoids():
    fused = drawn(nn.Sequential(nn.Linear(3, 4), nn.Hardsigmoid(inplace=True), nn.Linear(4, 3)).double())
    plain = copy.deepcopy(fused)
    plain[1] = nn.Identity()
    batches, more = [examples()], {"temperature": 1.0}

    def by_hand(model, x):
        return model[2]((model[0](x) / 6 + 0.5).clamp(0, 1))

    found = grasp(fused, all_kept(fused), batches=batches, **more)
    near(found, grasp(plain, all_kept(plain), batches=batches, forward=by_hand, **more))
    assert all(s.any() for s in found.values())


def test_the_temperature_is_200_and_changes_the_order_of_weights():
    model, batches = two_layers(), [examples()]
    default = grasp(model, all_kept(model), batches=batches)
    near(default, grasp(model, all_kept(model), batches=batches, temperature=200.0), rtol=0, atol=0)
    hot, cold = keep_top(default, 0.5), keep_top(grasp(model, all_kept(model), batches=batches, temperature=1.0), 0.5)
    assert any(not torch.equal(hot[name], cold[name]) for name in hot)  # D19: no mere rescaling


@pytest.mark.parametrize("temperature", [0, -200.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    model = two_layers()
    with pytest.raises(ValueError, match=f"temperature {temperature} is not positive"):
        grasp(model, all_kept(model), batches=[examples()], temperature=temperature)


class Recorder(nn.Module):
    """Passes its input on and notes one random number a call."""

    def __init__(self, note):
        super().__init__()
        self.note = note

    def forward(self, x):
        self.note(torch.rand(()).item())
        return x


def test_both_passes_of_grasp_see_the_same_dropout_and_batches_differ_in_it():
    draws = []  # outside of the model, which is left as it was
    model, (x, y) = nn.Sequential(nn.Linear(3, 3), Recorder(draws.append)), examples(dtype=torch.float32)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    grasp(model, all_kept(model), batches=batches, generator=generator(1))
    first, second, again, once_more = draws
    assert (first, second) == (again, once_more)
    assert first != second
    grasp(model, all_kept(model), batches=batches, generator=generator(2))
    assert draws[4] != first


# ---- Taylor and FORCE --------------------------------------------------------------------------------------------


def gradient_of(model, batches):
    model = copy.deepcopy(model)
    loss_of(model, batches).backward()
    return {name: p.grad for name, p in prunable(model).items()}


def test_taylor_sums_the_gradients_of_batches_whatever_their_sizes():
    model, (x, y) = two_layers(), examples()
    parts = list(zip(x.split([5, 2, 1]), y.split([5, 2, 1]), strict=True))
    gradients = [gradient_of(model, [part]) for part in parts]
    expected = {n: (p * sum(g[n] for g in gradients)).detach().abs() for n, p in prunable(model).items()}
    near(taylor(model, all_kept(model), batches=parts), expected)


def test_force_is_the_dense_weight_times_the_gradient_of_the_pruned_network_off_the_mask_too():
    model, batches = two_layers(), [examples()]
    kept = random_masks(model, 0.6)
    gradients = gradient_of(masked_copy(model, kept), batches)
    near(
        force(model, kept, batches=batches), {n: (p * gradients[n]).detach().abs() for n, p in prunable(model).items()}
    )


# ---- scores on data together -------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", AVERAGED.values(), ids=AVERAGED)
@pytest.mark.parametrize("sizes", [[4, 4], [5, 3], [1] * 8])
def test_batches_add_up_to_the_gradient_of_all_examples(score, sizes):
    model, (x, y) = two_layers(), examples()
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    near(
        score(model, all_kept(model), batches=[(x, y)]), score(model, all_kept(model), batches=parts), rtol=1e-8, atol=0
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
        near(snip(model, all_kept(model), batches=batches, training=training), expected["snip"])
        found = grasp(model, all_kept(model), batches=batches, training=training, temperature=1.0)
        near(found, expected["grasp"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
def test_norms_are_in_train_mode_by_default(score):
    model, batches = normed(), [examples((2, 4, 4))]
    default = score(model.eval(), all_kept(model), batches=batches)
    near(default, score(model, all_kept(model), batches=batches, training=True), rtol=0, atol=0)
    other = score(model, all_kept(model), batches=batches, training=False)
    assert not torch.allclose(default["0.weight"], other["0.weight"])


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
def test_dropout_follows_the_generator_in_train_mode_and_is_off_in_eval_mode(score):
    model, batches = normed(dropout=0.5), [examples((2, 4, 4))]

    def scored(seed, training):
        s = score(model, all_kept(model), batches=batches, training=training, generator=generator(seed))
        return torch.cat([v.flatten() for v in s.values()])

    torch.manual_seed(1)
    first = scored(1, True)
    torch.manual_seed(2)
    assert torch.equal(first, scored(1, True))
    assert not torch.allclose(first, scored(2, True))
    assert torch.equal(scored(1, False), scored(2, False))


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
def test_a_weight_that_is_used_twice_gets_the_gradient_of_both_uses(score):
    torch.manual_seed(0)
    shared = nn.Linear(3, 3, bias=False).double()
    model, (x, y) = nn.Sequential(shared, nn.Tanh(), shared), examples()
    before = everything_about(model)
    found = score(model, all_kept(model), batches=[(x, y)], **({"temperature": 1.0} if score is grasp else {}))
    w = shared.weight.detach().clone().requires_grad_()

    def loss(w):
        return cross_entropy(torch.tanh(x @ w.T) @ w.T, y)

    gradient = torch.autograd.grad(loss(w), w)[0]
    if score is grasp:
        expected = w * torch.einsum("abcd,cd->ab", hessian(loss, w.detach()), gradient)
    else:
        expected = (w * gradient).abs()
    near(found, {"0.weight": expected.detach()})
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", SCORES)
def test_layers_and_parameters_in_two_places_are_scored_once_and_stay_shared(name):
    first, middle, last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False)
    last.weight = first.weight  # one parameter of two layers, and layers that are called twice
    model = nn.Sequential(first, middle, nn.ReLU(), first, middle, last, nn.Linear(4, 3))
    before = everything_about(model)
    more = arguments(SCORES[name], batches=[examples((4,), dtype=torch.float32)])
    kept = random_masks(model, 0.6)
    assert list(SCORES[name](model, kept, **more)) == list(kept) == ["0.weight", "6.weight"]
    assert_unchanged(model, before)
    assert model[0].weight is model[3].weight is model[5].weight
    assert isinstance(model[0].weight, nn.Parameter)


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
def test_a_computation_in_float64_refines_a_float32_model(score):
    model, (x, y) = normed().float(), examples((2, 4, 4), dtype=torch.float32)
    fine = score(model, all_kept(model), batches=[(x, y)], dtype=torch.float64)
    oracle = score(copy.deepcopy(model).double(), all_kept(model), batches=[(x.double(), y)])
    assert all(s.dtype == torch.float64 for s in fine.values())
    near(fine, oracle, rtol=0, atol=0)
    coarse = score(model, all_kept(model), batches=[(x, y)])
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
        score(model, all_kept(model), batches=batches)


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
def test_an_iterator_of_batches_is_refused_or_scored_in_full(score):
    model, batch = two_layers(), examples()
    try:
        found = score(model, all_kept(model), batches=iter([batch]))
    except (TypeError, ValueError):
        return
    near(found, score(model, all_kept(model), batches=[batch]))


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
def test_inputs_that_are_token_numbers_stay_whole_numbers(score):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 3))
    tokens, labels = torch.randint(5, (6, 3), generator=generator()), torch.arange(6) % 3
    assert score(model, all_kept(model), batches=[(tokens, labels)])["2.weight"].any()


# ---- batches that are no pair of tensors -------------------------------------------------------------------------


def two_headed_loss(outputs, targets):
    return cross_entropy(outputs, targets["class"]) + cross_entropy(outputs * 2, targets["class"])


LABELS = {
    "dict": (lambda y: {"class": y, "again": y}, two_headed_loss),
    "pair": (lambda y: (y, y), lambda outputs, pair: cross_entropy(outputs, pair[0])),
    "list of dicts": (
        lambda y: [{"class": label} for label in y],
        lambda outputs, found: cross_entropy(outputs, torch.stack([one["class"] for one in found])),
    ),
    "object": (lambda y: SimpleNamespace(y=y), lambda outputs, held: cross_entropy(outputs, held.y)),
}


@pytest.mark.parametrize("score", AVERAGED.values(), ids=AVERAGED)
@pytest.mark.parametrize("kind", LABELS)
def test_batches_weigh_by_their_examples_whatever_the_labels_are(score, kind):
    (x, y), model = examples(n=40), two_layers()
    wrapped, loss = LABELS[kind]
    parts = [(x[:36], wrapped(y[:36])), (x[36:], wrapped(y[36:]))]
    whole = score(model, all_kept(model), batches=[(x, wrapped(y))], loss=loss)
    near(score(model, all_kept(model), batches=parts, loss=loss), whole, rtol=1e-8, atol=0)


@pytest.mark.parametrize("kind", ["dict", "pair", "time first", "packed"])
def test_batches_weigh_by_their_examples_whatever_the_inputs_are(kind):
    (x, y), model = examples(n=40), two_layers()

    def wrapped(x):
        if kind == "time first":
            return x[None].expand(2, -1, -1)
        if kind == "packed":
            return nn.utils.rnn.pack_sequence([row[None].expand(2, -1) for row in x])
        return {"x": x} if kind == "dict" else (x, x)

    def forward(model, inputs):
        unpacked = nn.utils.rnn.pad_packed_sequence(inputs)[0] if kind == "packed" else inputs
        return model(unpacked["x" if kind == "dict" else 0])

    kept, expected = all_kept(model), snip(model, all_kept(model), batches=[(x, y)])
    parts = [(wrapped(x[:36]), {"class": y[:36]}), (wrapped(x[36:]), {"class": y[36:]})]
    if kind == "time first":  # the labels alone know
        parts = [(inputs, labels["class"]) for inputs, labels in parts]
        found = snip(model, kept, batches=parts, forward=forward)
    else:
        parts_loss = lambda outputs, targets: cross_entropy(outputs, targets["class"])  # noqa: E731
        found = snip(model, kept, batches=parts, forward=forward, loss=parts_loss)
    near(found, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((torch.zeros(4, 3), None), TypeError, r"labels .* None: .*batches=\[\(inputs, inputs\)\]"),
        ((torch.zeros(0, 3), torch.zeros(0)), ValueError, r"no example .*\(0, 3\).*: leave it out"),
        (([], {}), TypeError, "neither inputs nor labels .* hold a tensor"),
        ((torch.zeros(3), torch.tensor(1)), ValueError, r"inputs of shape \(3,\) .* inputs\[None\]"),
        ((torch.zeros(4, 3), torch.zeros(4), torch.zeros(4)), TypeError, r"tuple of 3: expected batches=\[\("),
        ({"x": torch.zeros(4, 3)}, TypeError, r"a batch is dict.*: expected batches=\[\("),
    ],
)
def test_batches_that_cannot_be_weighed_are_refused_with_the_remedy(score, batch, error, message):
    model = two_layers()
    with pytest.raises(error, match=message):
        score(model, all_kept(model), batches=[examples(), batch])


def test_an_error_inside_a_model_says_in_which_batch():
    model = two_layers()
    with pytest.raises(RuntimeError, match=r"(?s)cannot be multiplied.*inputs of shape \(8, 5\) .* shape \(8,\)"):
        snip(model, all_kept(model), batches=[examples(), examples((5,))])


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
def test_a_batch_of_one_under_batch_norm_is_refused_with_the_remedy(score):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    x, y = examples(n=5)
    parts = [(x[:4], y[:4]), (x[4:], y[4:])]
    with pytest.raises(ValueError, match=r"one example .* batch norm.* training=False"):
        score(model, all_kept(model), batches=parts)
    assert score(model, all_kept(model), batches=parts, training=False)["0.weight"].isfinite().all()


# ---- other outputs, other losses ---------------------------------------------------------------------------------


class TwoHeads(nn.Module):
    """Logits and something else."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return {"logits": self.body(x), "norm": x.norm()}


@pytest.mark.parametrize("name", [*ON_DATA, *FLOW])
def test_forward_says_which_output_counts_and_masks_keep_their_names(name):
    model, score = normed(), SCORES[name]
    more = {"batches": [examples((2, 4, 4))]}
    kept = random_masks(model, 0.6)
    expected = score(model, kept, **more)
    two = TwoHeads(model)
    found = score(
        two, {f"body.{n}": m for n, m in kept.items()}, forward=lambda model, inputs: model(inputs)["logits"], **more
    )
    near(found, {f"body.{n}": s for n, s in expected.items()}, rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"returns dict, not a tensor.*forward=lambda"):
        score(two, {f"body.{n}": m for n, m in kept.items()}, **more)


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
def test_inputs_that_are_no_tensor_reach_forward_as_they_are(score):
    model, (x, y) = two_layers(), examples()
    pair = [((x, 2.0), y)]
    found = score(model, all_kept(model), batches=pair, forward=lambda model, inputs: model(inputs[0] / inputs[1]))
    near(found, score(model, all_kept(model), batches=[(x / 2, y)]))


def squared(outputs, targets):
    return ((outputs - targets) ** 2).mean()


@pytest.mark.parametrize("sizes", [[8], [5, 3], [1] * 8])
def test_a_loss_of_ones_own_is_averaged_over_all_examples(sizes):
    model, x = two_layers(), examples()[0]
    targets = torch.randn(8, 3, generator=generator(9))  # float32 beside float64 weights
    parts = list(zip(x.split(sizes), targets.split(sizes), strict=True))
    oracle = copy.deepcopy(model)
    squared(oracle(x), targets.double()).backward()
    expected = {n: (p * p.grad).detach().abs() for n, p in prunable(oracle).items()}
    for score in (snip, force):
        near(score(model, all_kept(model), batches=parts, loss=squared), expected)


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
@pytest.mark.parametrize("loss", [lambda outputs, _: outputs, lambda outputs, _: 1.0])
def test_a_loss_that_is_no_single_number_is_refused(score, loss):
    model = two_layers()
    with pytest.raises(ValueError, match=r"loss gives (\(8, 3\)|float): expected one number, the mean"):
        score(model, all_kept(model), batches=[examples()], loss=loss)


@pytest.mark.parametrize("score", ON_DATA.values(), ids=ON_DATA)
def test_a_single_pair_in_the_place_of_a_list_of_batches_is_refused(score):
    model = two_layers()
    with pytest.raises(TypeError, match=r"a batch is Tensor: expected batches=\[\(inputs, labels\)"):
        score(model, all_kept(model), batches=examples())


# ---- SynFlow -----------------------------------------------------------------------------------------------------


def test_synflow_and_synflow_l2_of_a_two_layer_linear_network_by_hand():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -2.0], [-3.0, 0.5]])
    model[1].weight.data = torch.tensor([[-4.0, 2.0]])
    s = synflow(model, all_kept(model), shape=(2,))  # hidden (3, 3.5), R = 4 * 3 + 2 * 3.5 = 19
    assert s["0.weight"].tolist() == [[4.0, 8.0], [6.0, 1.0]]
    assert s["1.weight"].tolist() == [[12.0, 7.0]]
    # squares [[1, 4], [9, 1/4]] and [16, 4]: hidden (5, 37/4); the factor is |weight|
    s = synflow_l2(model, all_kept(model), shape=(2,))
    assert s["0.weight"].tolist() == [[16.0, 32.0], [12.0, 2.0]]
    assert s["1.weight"].tolist() == [[20.0, 18.5]]


def test_synaptic_flow_takes_all_parameters_and_buffers_without_their_signs():
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, eps=0.0), nn.Linear(1, 1, bias=False))
    for p, value in zip(model.parameters(), (-6.0, -1.0, -2.0, -3.0, -3.0), strict=True):
        p.data.fill_(value)
    model[1].running_mean.fill_(-5.0)
    model[1].running_var.fill_(4.0)
    s = synflow(model.train(), all_kept(model), shape=(1,))  # R = 3 (2 (6 + 1 - 5) / 2 + 3)
    assert [s["0.weight"].item(), s["2.weight"].item()] == [18, 15]
    s = synflow_l2(model, all_kept(model), shape=(1,))  # R = 9 (4 (36 + 1 - 5) / 2 + 9)
    assert [s["0.weight"].item(), s["2.weight"].item()] == [6 * 18, 3 * 73]


def test_synflow_in_train_mode_normalises_by_the_one_input():
    model = normed()[:2]
    kept, shape = all_kept(model), (2, 5, 5)
    oracle = copy.deepcopy(model)
    for t in oracle.state_dict().values():
        t.abs_()
    oracle.train()(torch.ones(1, *shape, dtype=torch.float64)).sum().backward()
    expected = (oracle[0].weight * oracle[0].weight.grad).detach().abs()
    torch.testing.assert_close(synflow(model, kept, shape=shape, training=True)["0.weight"], expected)
    assert not torch.allclose(synflow(model, kept, shape=shape)["0.weight"], expected)


def test_the_log_softmax_of_the_benchmark_is_one_forward_away():
    model = build("mlp", (1, 4, 4), 10, hidden=(6,))
    oracle = copy.deepcopy(model).double()
    for p in oracle.parameters():
        p.data.abs_()
    oracle(torch.ones(1, 1, 4, 4, dtype=torch.float64)).log_softmax(1).sum().backward()
    expected = {n: (p * p.grad).detach().abs() for n, p in prunable(oracle).items()}
    found = synflow(model, all_kept(model), shape=(1, 4, 4), forward=lambda model, x: model(x).log_softmax(1))
    near(found, expected)


@pytest.mark.parametrize("score", FLOW.values(), ids=FLOW)
def test_buffers_of_any_type_survive_synaptic_flow(score):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    expected = score(model, all_kept(model), shape=(3,))
    model.register_buffer("allowed", torch.tensor([True, False]))
    model.register_buffer("steps", torch.tensor(-3))
    near(score(model, all_kept(model), shape=(3,)), expected, rtol=0, atol=0)


HOMOGENEOUS = {"relu": nn.ReLU(), "leaky": nn.LeakyReLU(), "prelu": nn.PReLU(), "pool": nn.MaxPool1d(2)}
OTHERS = [
    *(nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(), nn.Tanh(), nn.ReLU6(), nn.Softplus()),
    *(nn.Softmax(1), nn.Mish(), nn.ELU(), nn.SELU(), nn.LayerNorm(6), nn.GroupNorm(2, 6)),
]


@pytest.mark.parametrize("score", FLOW.values(), ids=FLOW)
@pytest.mark.parametrize("between", HOMOGENEOUS.values(), ids=HOMOGENEOUS)
def test_a_positively_homogeneous_network_is_scored_without_a_warning(score, between):
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), between, nn.Dropout(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(model, all_kept(model), shape=(3,))


@pytest.mark.parametrize("score", FLOW.values(), ids=FLOW)
@pytest.mark.parametrize("between", OTHERS, ids=lambda module: type(module).__name__)
def test_a_network_through_which_flow_is_not_conserved_is_warned_of_once_by_name(score, between):
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), between, nn.Linear(6, 6), between)
    with pytest.warns(UserWarning, match=rf"not positively homogeneous: {type(between).__name__} \(2\)") as caught:
        score(model, all_kept(model), shape=(3,))
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_norms_without_running_statistics_and_attention_are_named_and_long_lists_cut():
    class Self(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    model = nn.Sequential(
        nn.Linear(4, 4), *(nn.Tanh() for _ in range(5)), nn.BatchNorm1d(4, track_running_stats=False), Self(4, 2)
    )
    message = r"Tanh \(1, 2, 3 and 2 more\); BatchNorm1d \(6\); Self \(7\); the scores"
    with pytest.warns(UserWarning, match=message):
        synflow(model, all_kept(model), shape=(4, 4))


def total_flow(model, shape):
    """R by its definition: absolute state, eval mode, one input of ones, the sum of the outputs; float64."""
    model = copy.deepcopy(model).double().eval()
    for t in model.state_dict().values():
        t.abs_()
    with torch.no_grad():
        return model(torch.ones(1, *shape, dtype=torch.float64)).sum().item()


@pytest.mark.parametrize("fraction", [1.1, 0.6])
def test_flux_is_conserved_through_every_layer_and_every_hidden_unit_of_an_mlp_under_masks_too(fraction):
    model = build("mlp", (1, 4, 4), 10, hidden=(12, 9))  # all biases are 0 at initialisation
    kept = random_masks(model, fraction)
    s = synflow(model, kept, shape=(1, 4, 4))
    flow = total_flow(masked_copy(model, kept), (1, 4, 4))
    layers = [scores.where(kept[name], 0.0) for name, scores in s.items()]
    for scores in layers:
        assert scores.sum().item() == pytest.approx(flow, rel=1e-12)
    for into, out_of in pairwise(layers):
        torch.testing.assert_close(into.sum(1), out_of.sum(0), rtol=1e-12, atol=0)


def test_flux_is_conserved_through_every_layer_and_every_channel_of_a_vgg_16():
    # max pools included; batch norm is a factor at initialisation
    model = build("vgg16", (3, 32, 32), 10)
    s = synflow(model, all_kept(model), shape=(3, 32, 32))
    flow = total_flow(model, (3, 32, 32))
    assert 1e21 < flow < 1e24  # 3e22 with other weights of this initialiser
    layers = list(s.values())
    for scores in layers:
        assert scores.sum().item() == pytest.approx(flow, rel=1e-10)
    for into, out_of in pairwise(layers):
        torch.testing.assert_close(into.flatten(1).sum(1), out_of.transpose(0, 1).flatten(1).sum(1), rtol=1e-10, atol=0)


def test_a_convolution_inside_a_residual_block_carries_less_than_the_whole_flow():
    model = build("resnet8", (3, 8, 8), 10)
    s = synflow(model, all_kept(model), shape=(3, 8, 8))
    flow = total_flow(model, (3, 8, 8))
    for name, scores in s.items():
        if name in ("stem.conv.weight", "classifier.weight"):  # no way around these
            assert scores.sum().item() == pytest.approx(flow, rel=1e-10)
        else:
            assert 0 < scores.sum() < 0.999 * flow


@flow_may_be_lost
def test_synflow_uses_no_data_and_no_randomness():
    model = normed(dropout=0.5)
    s = synflow(model.train(), all_kept(model), shape=(2, 4, 4))
    for seed in (1, 2):
        batches = [examples((2, 4, 4), seed=seed, n=5), examples((2, 9, 9), seed=seed)]
        near(s, synflow(model, all_kept(model), batches=batches), rtol=0, atol=0)
    near(s, synflow(model.eval(), all_kept(model), shape=[2, 4, 4]), rtol=0, atol=0)


@pytest.mark.parametrize("batches", [None, []])
def test_synflow_asks_for_the_shape_of_an_input(batches):
    model = two_layers()
    with pytest.raises(ValueError, match="shape="):
        synflow(model, all_kept(model), batches=batches)


def test_a_resnet_34_has_finite_flow_in_float64_and_is_refused_in_float32():
    model = build("resnet34", (3, 32, 32), 10, init="kaiming_normal_fan_out")
    s = synflow(model, all_kept(model), shape=(3, 32, 32))
    assert all(scores.isfinite().all() for scores in s.values())
    assert 1e53 < s["classifier.weight"].sum().item() < 1e56  # 4e54 with other weights of the same law
    coarse = synflow(model, all_kept(model), shape=(3, 32, 32), dtype=torch.float32)
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
    SCORES[name](model, random_masks(model, 0.6), **arguments(SCORES[name], training=training))
    assert_unchanged(model, before)


class Breaks(nn.Module):
    """Draws a random number, notes a plain attribute, and passes its input on, until the given call."""

    def __init__(self, call):
        super().__init__()
        self.call, self.calls, self.seen = call, itertools.count(1), None

    def forward(self, x):
        torch.rand(3)
        self.seen = x
        if next(self.calls) == self.call:
            raise ArithmeticError("in the middle")
        return x


@pytest.mark.parametrize(("name", "call"), [("snip", 1), ("snip", 2), ("grasp", 2), ("grasp", 4), ("synflow", 1)])
def test_scoring_that_breaks_off_in_a_forward_pass_leaves_the_model_as_it_was(name, call):
    model = whole()
    model.drop = nn.Sequential(nn.Dropout(0.5), Breaks(call))
    before = everything_about(model)
    with pytest.raises(ArithmeticError) as held:  # the traceback is still alive when we look
        SCORES[name](model, random_masks(model, 0.6), **arguments(SCORES[name]))
    assert_unchanged(model, before)
    assert model.drop[1].seen is None
    assert held.value is not None


def test_a_pruned_weight_has_no_part_in_scores_whatever_it_is():
    model, kept = whole(), random_masks(whole(), 0.6)
    expected = {n: SCORES[n](model, kept, **arguments(SCORES[n])) for n in (*ON_DATA, *FLOW)}
    with torch.no_grad():
        model.head.weight[~kept["head.weight"]] = inf
    for name, scores in expected.items():
        found = SCORES[name](model, kept, **arguments(SCORES[name]))
        for key, mask in kept.items():
            assert torch.equal(found[key][mask], scores[key][mask])


@pytest.mark.parametrize("name", SCORES)
def test_scores_have_the_masks_names_shapes_and_device_and_only_pruned_weights_are_minus_infinity(name):
    model = whole()
    kept = random_masks(model, 0.6)
    s = SCORES[name](model, kept, **arguments(SCORES[name]))
    assert list(s) == list(kept) == ["conv.weight", "conv2.weight", "head.weight", "unused.weight"]
    for key, mask in kept.items():
        assert s[key].shape == mask.shape
        assert s[key].device == mask.device
        assert s[key].is_floating_point()
        assert not s[key].requires_grad
        assert s[key][mask].isfinite().all()
        if name == "force":  # what is pruned may come back
            assert s[key][~mask].isfinite().all()
        else:
            assert (s[key][~mask] == -inf).all()
    assert s["conv2.weight"][kept["conv2.weight"]].any()  # frozen is not worthless
    if name != "magnitude":
        assert not s["unused.weight"][kept["unused.weight"]].any()  # an unused layer is


@pytest.mark.parametrize("name", ["snip", "taylor", "grasp", "synflow", "synflow_l2"])
def test_scores_are_taken_at_the_masked_weights(name):
    model = whole()
    kept, score = random_masks(model, 0.6), SCORES[name]
    s = score(model, kept, **arguments(score))
    expected = score(masked_copy(model, kept), all_kept(model), **arguments(score))
    for key, mask in kept.items():
        torch.testing.assert_close(s[key][mask], expected[key][mask], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", SCORES)
def test_masks_of_some_tensors_leave_the_others_dense(name):
    model, score = whole(), SCORES[name]
    everything = score(model, all_kept(model), **arguments(score))
    kept = {"head.weight": torch.ones(3, 64, dtype=torch.bool)}
    s = score(model, kept, **arguments(score))
    assert list(s) == ["head.weight"]
    if name != "grasp":  # GraSP's flow is that of the masked tensors alone
        torch.testing.assert_close(s["head.weight"], everything["head.weight"], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", [*ON_DATA, *FLOW])
def test_scoring_works_where_gradients_are_switched_off(name):
    model, score = whole(), SCORES[name]
    expected = score(model, all_kept(model), **arguments(score))
    with torch.no_grad():
        near(score(model, all_kept(model), **arguments(score)), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", SCORES)
def test_scores_on_a_gpu_are_those_of_the_cpu_and_leave_its_random_state(name):
    model, score = whole().double(), SCORES[name]
    model.drop.p = 0.0  # dropout draws on the device
    kept = random_masks(model, 0.6)
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
