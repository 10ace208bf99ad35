"""Any network that a user brings: the same masks however its function is written, or a refusal by name."""

import copy
import locale
import warnings

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import all_kept, generator, random_masks, same, total
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from fsp import masks, search, spectrum
from fsp.masks import kept_count, prunable
from fsp.pruning import diagnose, prune
from fsp.pruning.methods import METHODS
from fsp.pruning.scores import force, grasp, magnitude, snip, synflow, synflow_l2, taylor

pytestmark = pytest.mark.filterwarnings("ignore:synaptic flow is not conserved")

SCORES = {f.__name__: f for f in (magnitude, snip, taylor, force, grasp, synflow, synflow_l2)}
ON_DATA = ("snip", "taylor", "force", "grasp")


def examples(shape, n=12, classes=4, seed=1):
    return torch.randn(n, *shape, generator=generator(seed)), torch.arange(n) % classes


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def scored(name, model, kept, shape, **more):
    batch = examples(shape)
    own = {"batches": [batch], "generator": generator(4)} if name != "magnitude" else {}
    return SCORES[name](model, kept, **own, **more)


def assert_same_scores(a, b, **tolerance):
    """Equal but for the names."""
    for x, y in zip(a.values(), b.values(), strict=True):
        torch.testing.assert_close(x, y, **{"rtol": 0, "atol": 0} | tolerance)


def attributes(model):
    """``vars`` of every module, by identity, and what lists, dicts and sets in it hold."""
    found = []
    for module in model.modules():
        for key, value in vars(module).items():
            held = value.items() if isinstance(value, dict) else value if isinstance(value, list | set) else ()
            found.append(
                (id(module), key, id(value), [tuple(map(id, h)) if isinstance(h, tuple) else id(h) for h in held])
            )
    return found


def state(model):
    """Everything that scoring may not change."""
    tensors = {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    return attributes(model), tensors, torch.get_rng_state()


def assert_as_before(model, before):
    after = state(model)
    assert after[0] == before[0]
    assert same(after[1], before[1])
    assert torch.equal(after[2], before[2])


# ---- recomputation in the backward pass --------------------------------------------------------------------------


class Blocks(nn.Module):
    """Three blocks with a norm and dropout, each run plainly or under a checkpoint."""

    def __init__(self, how="plain"):
        super().__init__()
        self.how = how
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2)) for _ in range(2)
        )
        self.head = nn.Linear(8, 4)

    def run(self, block, x):
        if self.how == "plain":
            return block(x)
        return checkpoint(block, x, use_reentrant=self.how == "reentrant")

    def forward(self, x):
        x = self.run(self.stem, x)  # the input needs no gradient: a reentrant checkpoint would give none to the stem
        for block in self.blocks:
            x = self.run(block, x)
        return self.head(x)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", SCORES)
def test_activation_checkpointing_changes_no_score(name, how):
    model = seeded(Blocks)
    kept = random_masks(model, 0.5)
    expected = scored(name, model, kept, (6,))
    model.how = how
    before = state(model)
    assert_same_scores(scored(name, model, kept, (6,)), expected)
    assert_as_before(model, before)


@pytest.mark.parametrize("method", ["iterative_snip", "force", "grasp", "synflow"])
def test_a_densenet_that_saves_memory_gets_the_masks_of_one_that_does_not(method):
    def make(saves):
        return seeded(lambda: torchvision.models.DenseNet(6, (3, 3), 8, 2, num_classes=4, memory_efficient=saves))

    batch = examples((3, 32, 32), n=4)
    rounds = {} if method == "grasp" else {"rounds": 3}
    found, expected = (prune(make(s), method, 0.1, batches=[batch], **rounds) for s in (True, False))
    assert same(found, expected)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_a_diagnosis_counts_a_checkpointed_layer_once(how):
    model = seeded(Blocks)
    kept = random_masks(model, 0.4)
    expected = diagnose(model, kept, (6,))
    model.how = how
    found = diagnose(model, kept, (6,))
    assert found.network == expected.network
    assert found.layers.equals(expected.layers)


class ForeignCheckpoint(torch.autograd.Function):
    """As other libraries have it: run again in the backward pass, which cannot be part of ``autograd.grad``."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("Checkpointing is not compatible with .grad()")


def test_a_foreign_checkpoint_is_refused_saying_what_to_switch_off():
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4)))
    run = {"batches": [examples((3,))], "forward": lambda model, x: model[1](ForeignCheckpoint.apply(model[0](x)))}
    with pytest.raises(ValueError, match="switch its activation checkpointing off"):
        prune(model, "snip", 0.5, **run)


# ---- weights that are computed -----------------------------------------------------------------------------------


def mlp(second=lambda layer: layer):
    return seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), second(nn.Linear(16, 4))))


class Times(nn.Module):
    """An element-wise parametrisation that leaves 0 at 0."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, weight):
        return weight * self.factor


class Cubed(nn.Module):
    def forward(self, weight):
        return weight**3


class Shifted(nn.Module):
    def forward(self, weight):
        return weight + 0.1


class Standardised(nn.Linear):
    """Weight standardisation, in forward."""

    def forward(self, x):
        return nn.functional.linear(x, (self.weight - self.weight.mean(1, keepdim=True)) / self.weight.std(), self.bias)


def parametrised(parametrisation):
    return lambda layer: parametrize.register_parametrization(layer, "weight", parametrisation) or layer


def hooked(layer):
    """A weight that a hook computes from a parameter of another name."""
    layer.source = nn.Parameter(layer.weight.detach().clone())
    del layer.weight
    layer.register_forward_pre_hook(lambda module, _: setattr(module, "weight", module.source * 2))
    return layer


def old(make):
    def with_warning(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return make(layer)

    return with_warning


def qat(layer):
    config = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    layer.qconfig = config
    return torch.ao.nn.qat.Linear.from_float(layer)


REFUSED = {
    "weight_norm": (parametrizations.weight_norm, "parametrisation WeightNorm"),
    "old weight_norm": (old(nn.utils.weight_norm), "WeightNorm in a hook"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrisation SpectralNorm"),
    "old spectral_norm": (nn.utils.spectral_norm, "SpectralNorm in a hook"),
    "orthogonal": (parametrizations.orthogonal, "parametrisation Orthogonal"),
    "shifted": (parametrised(Shifted()), "parametrisation Shifted"),
    "standardised": (lambda layer: Standardised(16, 4), "forward of Standardised"),
    "hooked": (hooked, "no parameter of the layer"),
    "qat": (qat, "forward of Linear"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_weight_that_masks_cannot_follow_is_refused_by_name_and_may_be_left_dense(kind):
    make, by = REFUSED[kind]
    model = mlp(make)
    before = state(model)
    for method in ("magnitude", "erk", "snip"):
        with pytest.raises(ValueError, match=rf"the weight of '2' is computed by .*{by}.*exclude=\['2'\]"):
            prune(model, method, 0.1, batches=[examples((8,))])
    found = prune(model, "snip", 0.1, batches=[examples((8,))], exclude=["2"])
    assert list(found) == ["0.weight"]
    assert_as_before(model, before)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("parametrisation", [Times(-0.5), Cubed(), nn.Identity(), nn.Tanh()])
def test_an_element_wise_parametrisation_is_scored_as_the_weight_it_computes(name, parametrisation):
    model, plain = mlp(parametrised(parametrisation)), mlp()
    plain[2].weight.data = model[2].weight.detach().clone()
    kept = random_masks(plain, 0.6)
    named = dict(zip(prunable(model), kept.values(), strict=True))
    before = state(model)
    assert_same_scores(scored(name, model, named, (8,)), scored(name, plain, kept, (8,)))
    assert_as_before(model, before)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "ratio_of"])
@pytest.mark.parametrize("make", [parametrised(Times(2.0)), parametrised(Cubed()), lambda m: m])
def test_the_forward_pass_of_the_masked_network_has_the_asked_number_of_weights(method, make):
    model = mlp(make)
    more = {"shape": (8,)} if method == "phew" else {}
    more |= {"rounds": 3} if method in ("iterative_snip", "force", "synflow", "synflow_l2") else {}
    found = prune(model, method, 0.3, batches=[examples((8,))], **more)
    masks.apply_(model, found)
    used = sum(int(model[i].weight.count_nonzero()) for i in (0, 2))
    assert used == total(found) == kept_count(192, 0.3)


def pruned_by_torch():
    model = mlp()
    kept = random_masks(model, 0.5, seed=3)
    masks.to_torch_(model, kept)
    return model, kept


@pytest.mark.parametrize("method", ["magnitude", "snip", "iterative_snip", "force", "synflow", "random", "grasp"])
def test_what_torch_has_pruned_stays_pruned_and_is_no_part_of_the_count(method):
    model, kept = pruned_by_torch()
    few = {"rounds": 3} if method in ("force", "iterative_snip", "synflow") else {}
    found = prune(model, method, 0.2, batches=[examples((8,))], **few)
    assert list(found) == ["0.weight_orig", "2.weight_orig"]
    assert total(found) == kept_count(192, 0.2)
    assert all((mask <= old).all() for mask, old in zip(found.values(), kept.values(), strict=True))
    masks.apply_(model, found)
    model(torch.zeros(1, 8))
    assert sum(int(model[i].weight.count_nonzero()) for i in (0, 2)) == total(found)
    with pytest.raises(ValueError, match=r"only \d+ may be"):
        prune(model, method, 0.9, batches=[examples((8,))], **few)


def test_walks_do_not_go_where_torch_has_pruned():
    model, _ = pruned_by_torch()
    with pytest.raises(ValueError, match=r"torch prunes '0\.weight_orig' already"):
        prune(model, "phew", 0.2, shape=(8,))


def test_masks_read_from_torch_fit_the_model_they_were_read_from():
    model, kept = pruned_by_torch()
    found = masks.from_torch(model)
    assert same(found, kept)
    plain = mlp()
    masks.apply_(plain, kept)
    assert repr(spectrum.coordinates(found, model)) == repr(spectrum.coordinates(found, plain))
    assert spectrum.layer_table(found, model).equals(spectrum.layer_table(found, plain))
    here, there = diagnose(model, found, (8,)), diagnose(plain, found, (8,))
    assert here.layers.equals(there.layers)
    assert here.network == there.network
    masks.apply_(model, found)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    masks.hold_(optimiser, model, found)
    model(torch.ones(2, 8)).sum().backward()
    optimiser.step()
    assert all(not model[i].weight_orig[~kept[f"{i}.weight"]].any() for i in (0, 2))
    for name, at in (("0.weight", (8,)), ("0.weight_orig", (8,))):
        one = {name: kept["0.weight"]}
        assert diagnose(model, one, at).network["effective"] <= total(one)


def test_a_parameter_shared_by_layers_that_compute_different_weights_is_refused():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    parametrised(Times(2.0))(model[2])
    model[2].parametrizations.weight.original = model[0].weight
    with pytest.raises(ValueError, match="'0' and '2' compute different weights from one parameter"):
        prune(model, "magnitude", 0.5)


# ---- recurrent modules -------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, recurrent, width):
        super().__init__()
        self.first, self.recurrent, self.last = nn.Linear(6, 5), recurrent, nn.Linear(width, 4)

    def forward(self, x):
        return self.last(self.recurrent(self.first(x))[0])


class Cells(nn.Module):
    """A cell in a loop."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state, found = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            found.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(found, 1), state


RECURRENT = {
    "lstm": (lambda: nn.LSTM(5, 7, batch_first=True), 7),
    "rnn": (lambda: nn.RNN(5, 7, batch_first=True), 7),
    "relu": (lambda: nn.RNN(5, 7, nonlinearity="relu", batch_first=True, bias=False), 7),
    "gru": (lambda: nn.GRU(5, 7, 2, batch_first=True, bidirectional=True), 14),
    "projected": (lambda: nn.LSTM(5, 7, 2, proj_size=3, batch_first=True), 3),
    "lstm cell": (lambda: Cells(nn.LSTMCell(5, 7)), 7),
    "gru cell": (lambda: Cells(nn.GRUCell(5, 7)), 7),
    "rnn cell": (lambda: Cells(nn.RNNCell(5, 7)), 7),
}


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("steps", [1, 9, 100])
def test_a_recurrent_network_is_whole_when_dense_after_any_number_of_steps(kind, steps):
    make, width = RECURRENT[kind]
    model = Recurrent(make(), width)
    before = state(model)
    layers, network = diagnose(model, all_kept(model), (steps, 6))
    assert not network["disconnected"]
    assert layers["effective"].tolist() == layers["weights"].tolist() == [30, 4 * width]
    assert_as_before(model, before)


def test_a_recurrent_network_without_a_path_is_disconnected():
    model = Recurrent(nn.LSTM(5, 7, batch_first=True), 7)
    kept = all_kept(model)
    kept["first.weight"].fill_(False)
    assert diagnose(model, kept, (9, 6)).network["disconnected"]
    kept = all_kept(model)
    kept["last.weight"][:, 2:] = False
    layers, _ = diagnose(model, kept, (9, 6))
    assert layers["effective"].tolist() == [30, 8]


def test_the_last_step_alone_is_reached_by_no_unit_without_weights_from_it():
    # masks of the recurrent weights themselves: unit 0 reads the input, unit 1 reads unit 0, the output reads unit 1
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.RNN(1, 2, batch_first=True), nn.Linear(2, 1)

        def forward(self, x):
            return self.out(self.rnn(x)[0][:, -1])

    kept = {
        "rnn.weight_ih_l0": torch.tensor([[True], [False]]),
        "rnn.weight_hh_l0": torch.tensor([[False, False], [True, False]]),
        "out.weight": torch.tensor([[False, True]]),
    }
    assert diagnose(Last(), kept, (1, 1)).network["disconnected"]
    assert diagnose(Last(), kept, (2, 1)).network["effective"] == 3


def test_a_packed_sequence_is_refused():
    class Packs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.lstm = nn.Linear(6, 5), nn.LSTM(5, 7, batch_first=True)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(self.first(x), [x.shape[1]], batch_first=True)
            return self.lstm(packed)[0].data

    with pytest.raises(ValueError, match="packed sequences"):
        diagnose(Packs(), all_kept(Packs()), (3, 6))


def test_functions_that_saturate_pass_paths_on():
    class Saturates(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.a, self.b, self.function = nn.Linear(900, 3), nn.Linear(3, 2), function

        def forward(self, x):
            return self.b(self.function(self.a(x)))

    for function in (torch.erf, torch.tanh, torch.atan, lambda x: torch.exp(-x), torch.sigmoid, lambda x: torch.exp(x)):
        model = Saturates(function)
        layers, network = diagnose(model, all_kept(model), (900,))
        assert not network["disconnected"]
        assert layers["effective"].tolist() == [2700, 6]


# ---- what a module holds besides parameters and buffers ----------------------------------------------------------


class Keeps(nn.Module):
    """Keeps what it sees in every way that forward may."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.seen, self.named, self.calls, self.mean = [], {}, 0, torch.zeros(8)

    def forward(self, x):
        x = self.inner(x)
        self.seen.append(x)
        self.named["last"] = x
        self.calls += 1
        self.mean.add_(1)
        self.fresh = x
        if "late" not in self._buffers:
            self.register_buffer("late", x.detach())
        return x


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow", "force"])
def test_plain_attributes_are_left_as_they_were(method):
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), Keeps(), nn.Linear(8, 4)))
    before = state(model)
    prune(model, method, 0.5, batches=[examples((8,))], **({"rounds": 2} if method == "synflow" else {}))
    assert_as_before(model, before)
    assert not model[1].mean.any()
    diagnose(model, all_kept(model), (8,))
    assert_as_before(model, before)


def test_a_model_that_torch_prunes_is_left_with_its_weight_and_can_be_copied_and_searched():
    model, _ = pruned_by_torch()
    with torch.no_grad():
        model(torch.ones(1, 8))  # a weight without a history, which can be copied
    weight, before = model[0].weight, state(model)
    prune(model, "synflow", 0.2, shape=(8,))
    diagnose(model, masks.from_torch(model), (8,))
    assert_as_before(model, before)
    assert model[0].weight is weight
    assert model[0].weight.dtype == torch.float32
    found = search.search(copy.deepcopy(model), "synflow", 0.2, population=2, shape=(8,), rounds=2)
    assert total(found.masks) == kept_count(192, 0.2)
    model(torch.ones(1, 8)).sum().backward()  # now its weight has a history
    again = search.search(model, "synflow", 0.2, population=2, shape=(8,), rounds=2)
    assert same(again.masks, found.masks)


# ---- global settings ---------------------------------------------------------------------------------------------


class Setting:
    """A global setting, and how to put it back."""

    def __init__(self, enter, leave):
        self.enter, self.leave = enter, leave

    def __enter__(self):
        self.before = self.enter()

    def __exit__(self, *_):
        self.leave(self.before)


def numbers():
    before = locale.setlocale(locale.LC_ALL)
    for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "C"):
        try:
            locale.setlocale(locale.LC_ALL, name)
            break
        except locale.Error:
            continue
    return before


def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    return before


def default_dtype(dtype):
    return Setting(lambda: torch.set_default_dtype(dtype), lambda _: torch.set_default_dtype(torch.float32))


GLOBAL = {
    "dtype": lambda: Setting(
        lambda: torch.set_default_dtype(torch.float64), lambda _: torch.set_default_dtype(torch.float32)
    ),
    "half": lambda: Setting(
        lambda: torch.set_default_dtype(torch.float16), lambda _: torch.set_default_dtype(torch.float32)
    ),
    "device": lambda: torch.device("meta"),
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": lambda: Setting(
        lambda: torch.use_deterministic_algorithms(True), lambda _: torch.use_deterministic_algorithms(False)
    ),
    "threads": lambda: Setting(threads, torch.set_num_threads),
    "locale": lambda: Setting(numbers, lambda before: locale.setlocale(locale.LC_ALL, before)),
    "seed": lambda: Setting(lambda: torch.manual_seed(77), lambda _: None),
}


def convnet():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.Hardsigmoid(),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.MaxPool2d(2),
        nn.Flatten(),
        parametrised(Times(2.0))(nn.Linear(24, 4)),
    )


def everything(model, batch):
    """Results of prune, coordinates, layer_table, search and diagnose; masks are ordinary tensors."""
    found = {}
    for method in METHODS:
        if method == "ratio_of":
            continue
        rounds = {"rounds": 3} if method in ("iterative_snip", "force", "synflow", "synflow_l2") else {}
        drawn = prune(model, method, 0.4, batches=[batch], generator=torch.Generator("cpu").manual_seed(5), **rounds)
        found |= {(method, name): mask for name, mask in drawn.items()}
    for how in (masks.shuffle, lambda m, generator: masks.keep_top({n: v.int() for n, v in m.items()}, 0.3)):
        found |= {(how, name): m for name, m in how(drawn, generator=torch.Generator("cpu").manual_seed(5)).items()}
    results = [spectrum.coordinates(drawn, model), spectrum.layer_table(drawn, model).to_csv()]
    results += [f.to_csv() if hasattr(f, "to_csv") else f for f in diagnose(model, drawn, (2, 6, 6))]
    for method in ("erk", "synflow"):
        more = {"shape": (2, 6, 6), "rounds": 2} if method == "synflow" else {}
        searched = search.search(model, method, 0.4, population=2, **more)
        results.append(searched.trajectory.to_csv())
        found |= {("search", method, name): mask for name, mask in searched.masks.items()}
    optimised = search.optimise(model, "random", 0.4, population=6)
    results.append(optimised.trajectory.to_csv())
    assert not any(mask.is_inference() for mask in found.values())
    return list(found.values()), [repr(result) for result in results]


@pytest.fixture(scope="module")
def expected():
    """Everything under the settings of this process."""
    return everything(seeded(convnet), examples((2, 6, 6)))


@pytest.mark.parametrize("setting", GLOBAL)
def test_no_global_setting_changes_a_result(setting, expected):
    model, batch = seeded(convnet), examples((2, 6, 6))
    before = state(model)
    with GLOBAL[setting]():
        found = everything(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    assert found[1] == expected[1]
    assert [a == b for a, b in zip(state(model)[:1], before[:1], strict=True)] == [True]


def test_a_model_and_examples_made_in_inference_mode_are_scored_alike():
    expected = prune(seeded(convnet), "grasp", 0.4, batches=[examples((2, 6, 6))])
    with torch.inference_mode():
        model, batch = seeded(convnet), examples((2, 6, 6))
        found = prune(model, "grasp", 0.4, batches=[batch])
    assert same(prune(model, "grasp", 0.4, batches=[batch]), expected)
    assert same(found, expected)


# ---- wrappers ----------------------------------------------------------------------------------------------------


def plain_convnet():
    return seeded(convnet)[:-1].append(seeded(lambda: nn.Linear(24, 4)))


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "data parallel": (nn.DataParallel, "module."),
    "averaged": (AveragedModel, "module."),
    "compiled": (lambda model: torch.compile(model, backend="eager"), "_orig_mod."),
    "distributed": (nn.parallel.DistributedDataParallel, "module."),
    "one in another": (lambda model: nn.DataParallel(nn.Sequential(AveragedModel(model))), "module.0.module."),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_scored_and_diagnosed_as_the_model_inside(wrapper, one_process):
    wrap, prefix = WRAPPERS[wrapper]
    model = plain_convnet()
    wrapped = wrap(model)
    before = state(wrapped)
    for method in ("snip", "grasp", "synflow", "magnitude", "erk"):
        expected = prune(model, method, 0.3, batches=[examples((2, 6, 6))])
        found = prune(wrapped, method, 0.3, batches=[examples((2, 6, 6))])
        assert same(found, {f"{prefix}{name}": mask for name, mask in expected.items()})
    assert diagnose(wrapped, found, (2, 6, 6)).network == diagnose(model, expected, (2, 6, 6)).network
    assert str(list(spectrum.coordinates(found, wrapped).values())) == str(
        list(spectrum.coordinates(expected, model).values())
    )
    assert_as_before(wrapped, before)


@pytest.mark.parametrize("wrapper", ["data parallel", "compiled"])
def test_masks_of_another_wrapping_are_refused_with_the_name_that_they_lack(wrapper):
    wrap, prefix = WRAPPERS[wrapper]
    model = plain_convnet()
    kept = random_masks(model, 0.5)
    with pytest.raises(ValueError, match=rf"'0\.weight' belongs to no .*'{prefix}0\.weight' does: pass the model"):
        diagnose(wrap(model), kept, (2, 6, 6))
    with pytest.raises(ValueError, match=rf"'{prefix}0\.weight' belongs to no .*'0\.weight' does: pass the model"):
        diagnose(model, {f"{prefix}{name}": mask for name, mask in kept.items()}, (2, 6, 6))


# ---- lazy, meta, quantised, NumPy, mixed -------------------------------------------------------------------------


def test_a_lazy_layer_is_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))
    kept = {"0.weight": torch.ones(4, 3, dtype=torch.bool)}
    for run in (lambda: prune(model, "magnitude", 0.5), lambda: prunable(model), lambda: diagnose(model, kept, (3,))):
        with pytest.raises(ValueError, match=r"'1(\.weight)?' has no shape yet: the layer is lazy"):
            run()


@pytest.mark.parametrize("method", ["magnitude", "random", "erk", "snip", "synflow"])
def test_a_model_without_values_is_named(method):
    model = nn.Sequential(nn.Linear(3, 4, device="meta"), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"'0\.weight' is on the meta device"):
        prune(model, method, 0.5, batches=[examples((3,))])
    kept = {"1.weight": torch.ones(2, 4, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"'0\.weight' is on the meta device"):
        diagnose(model, kept, (3,))


def test_masks_and_scores_that_are_no_tensors_are_named():
    model = nn.Linear(3, 4)
    kept = {"weight": np.ones((4, 3), dtype=bool)}
    for run in (
        lambda: masks.apply_(model, kept),
        lambda: spectrum.coordinates(kept, model),
        lambda: diagnose(model, kept, (3,)),
        lambda: masks.to_torch_(model, kept),
    ):
        with pytest.raises(ValueError, match=r"mask 'weight' is a numpy\.ndarray: expected a tensor"):
            run()
    with pytest.raises(ValueError, match=r"score 'weight' is a numpy\.ndarray: expected a tensor"):
        masks.keep_top({"weight": np.ones((4, 3))}, 0.5)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda w: w.to_sparse(), "layout torch.sparse_coo"),
        (lambda w: (w * 10).to(torch.int8), "is torch.int8: expected floating-point"),
    ],
)
def test_weights_of_other_kinds_are_named(weight, message):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].weight = nn.Parameter(weight(model[1].weight.detach()), requires_grad=False)
    with pytest.raises(ValueError, match=rf"'1\.weight' .*{message}"):
        prune(model, "magnitude", 0.5)


class Mixed(nn.Module):
    """A body in another precision than its head."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.body, self.head = nn.Linear(8, 16).to(dtype), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.relu(self.body(x.to(self.body.weight.dtype))).to(self.head.weight.dtype))


@pytest.mark.parametrize("method", [*SCORES, "random", "erk", "phew"])
def test_a_model_of_mixed_precision_gets_the_exact_count(method):
    model = seeded(Mixed)
    shape = {"shape": (8,)} if method == "phew" else {}
    found = prune(model, method, 0.3, batches=[examples((8,))], **shape)
    assert total(found) == kept_count(192, 0.3)
    assert diagnose(model, found, (8,)).network["kept"] == total(found)


def test_a_precision_that_a_model_does_not_run_in_is_named_with_the_remedy():
    class Casts(Mixed):
        def forward(self, x):
            return self.head(torch.relu(self.body(x.double())).float())

    model = seeded(Casts)
    with pytest.raises(ValueError, match=r"does not run with all its tensors in torch\.float64.*pass dtype=None"):
        prune(model, "synflow", 0.3, shape=(8,))
    assert total(prune(model, "synflow", 0.3, shape=(8,), dtype=None)) == kept_count(192, 0.3)
    assert total(prune(model, "snip", 0.3, batches=[examples((8,))])) == kept_count(192, 0.3)


# ---- batches that are no pair of tensors -------------------------------------------------------------------------


def test_batches_weigh_by_their_examples_whatever_labels_are():
    model, (x, y) = mlp(), examples((8,), n=40)

    def loss(outputs, labels):
        return nn.functional.cross_entropy(outputs, labels["class"])

    def many(outputs, labels):
        return nn.functional.cross_entropy(outputs, labels[0])

    def inputs_in_a_dict(model, inputs):
        return model(inputs["x"])

    sizes = [36, 4]
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    kept = all_kept(model)
    for name in ("snip", "force", "grasp"):
        expected = SCORES[name](model, kept, batches=parts)
        for batches, more in (
            ([(x, {"class": y, "box": y, "more": y}) for x, y in parts], {"loss": loss}),
            ([(x, [y]) for x, y in parts], {"loss": many}),
            ([({"x": x}, y) for x, y in parts], {"forward": inputs_in_a_dict}),
        ):
            assert_same_scores(SCORES[name](model, kept, batches=batches, **more), expected)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((torch.zeros(4, 8), None), TypeError, "labels of a batch are None: expected what the loss compares"),
        ((torch.zeros(0, 8), torch.zeros(0).long()), ValueError, r"no example \(.*shape \(0, 8\)\): leave it out"),
        ((torch.zeros(8), torch.tensor([1, 2])), ValueError, r"outputs of shape \(4,\).*expected inputs \(N, ...\)"),
        ((torch.zeros(()), torch.zeros(4).long()), ValueError, "expected several examples along the first dimension"),
        ((torch.zeros(4, 8), torch.zeros(3).long()), ValueError, r"labels of shape \(3,\) .*expected inputs"),
    ],
)
def test_batches_that_cannot_be_scored_are_named_with_the_remedy(batch, error, message):
    with pytest.raises(error, match=message):
        prune(mlp(), "snip", 0.5, batches=[batch])


def test_a_batch_of_one_under_batch_norm_is_named_with_the_remedy():
    model, (x, y) = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)), examples((8,))
    before = state(model)
    with pytest.raises(ValueError, match=r"batch of one example .*join it .*training=False"):
        prune(model, "snip", 0.5, batches=[(x[:11], y[:11]), (x[11:], y[11:])])
    assert_as_before(model, before)


def test_the_shape_of_an_input_is_asked_for_where_inputs_are_several():
    with pytest.raises(ValueError, match="the inputs of a batch are dict, not one tensor: pass shape="):
        prune(mlp(), "synflow", 0.5, batches=[({"x": torch.zeros(4, 8)}, torch.zeros(4))])


# ---- networks at random ------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class First(nn.Module):
    """The output of a recurrent layer without its state, one step long."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x[:, None])[0][:, 0]


BLOCKS = (
    "plain",
    "parametrised",
    "pruned",
    "checkpointed",
    "reentrant",
    "shared",
    "recurrent",
    "wrapped",
    "normed",
    "wide",
)


def block_pair(kind, seed, shared):
    """A block of width 5 written in a special way, and the same function written plainly."""
    plain = seeded(lambda: nn.Linear(5, 5), seed)
    if kind == "parametrised":
        special = parametrised(Times(-2.0))(copy.deepcopy(plain))
        plain.weight.data *= -2
        return special, plain
    if kind == "pruned":
        return torch_prune.identity(copy.deepcopy(plain), "weight"), plain
    if kind in ("checkpointed", "reentrant"):
        return Checkpointed(copy.deepcopy(plain), kind == "reentrant"), plain
    if kind == "shared":
        return shared
    if kind == "recurrent":
        plain = First(seeded(lambda: nn.GRU(5, 5, batch_first=True), seed))
        return copy.deepcopy(plain), plain
    if kind == "wrapped":
        return nn.DataParallel(copy.deepcopy(plain)), plain
    if kind == "normed":
        plain = nn.Sequential(plain, nn.BatchNorm1d(5), nn.ReLU())
        return copy.deepcopy(plain), plain
    if kind == "wide":  # another precision inside
        plain = nn.Sequential(To(torch.float64), plain.double(), To(torch.float32))
        return copy.deepcopy(plain), plain
    return copy.deepcopy(plain), plain


class To(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    kinds=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5),
    method=st.sampled_from(["magnitude", "snip", "grasp", "force", "synflow", "random", "erk"]),
    asked=st.sampled_from([0.3, 0.6]),
)
def test_a_network_of_any_blocks_is_pruned_like_the_plain_network_with_the_same_function(kinds, method, asked):
    tied = seeded(lambda: nn.Linear(5, 5), 50)
    shared = copy.deepcopy(tied), tied
    pairs = [block_pair(kind, seed, shared) for seed, kind in enumerate(kinds)]
    special, plain = (
        nn.Sequential(seeded(lambda: nn.Linear(8, 5), 60), *blocks, seeded(lambda: nn.Linear(5, 4), 61))
        for blocks in zip(*pairs, strict=True)
    )
    more = {"batches": [examples((8,))]}
    if method == "synflow":
        more |= {"rounds": 2} | ({"dtype": None} if "wide" in kinds else {})
    before = state(special)
    found = prune(special, method, asked, **more)
    assert_as_before(special, before)
    expected = prune(plain, method, asked, **more)
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected.values(), strict=True))
    assert (
        diagnose(special, found, (8,)).network == diagnose(plain, expected, (8,)).network if "wide" not in kinds else 1
    )
    masks.apply_(special, found)
    special(examples((8,))[0])
    used = {id(p): masks.used_weights(special, [name])[name] for name, p in special.named_parameters() if name in found}
    assert sum(int(weight.count_nonzero()) for weight in used.values()) == total(found) == total(expected)
