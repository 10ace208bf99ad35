"""Whatever numbers, shapes and types public functions are given: what they document, or an error that names it.

Every argument has the kind that is documented, a tensor for a tensor, a number for a number, and anything of that
kind: empty, nan, infinite, huge, of another dtype.  A ValueError or a TypeError has to name the argument.
"""

import ast
import math
import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsp import masks, pruning, spectrum
from fsp.compendium import claims, stats
from fsp.data import Split, augment, batches, corrupt, load
from fsp.models import ecn_plan
from fsp.paths import PACKAGE
from fsp.pruning import allocate, lottery
from fsp.runs import key
from fsp.training import TrainConfig, dynamic, ensemble, probabilities, tost

fuzzed = settings(max_examples=40, deadline=None, derandomize=True, database=None)
DIGITS = load("digits")
NET = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
HUGE = 1e300

# ---- what may be given -------------------------------------------------------------------------------------------

FLOATS = st.floats() | st.sampled_from([0.0, 1.0, 0.5, math.nextafter(1, 0), 5e-324, HUGE])
NUMBERS = FLOATS | st.integers(-3, 12) | st.sampled_from([2**70, -(2**70), True, None, 1j, "0.5", [0.5]])
WORDS = st.sampled_from(["", "layer", "global", "published", "magnitude", None, 3])
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
FILLS = (0.0, 1.0, -1.0, 0.25, math.nan, math.inf, -math.inf, HUGE)


@st.composite
def tensors(draw, *shape: int) -> torch.Tensor:
    """Of this shape mostly, else of any; of any type; random numbers, one number everywhere, or one odd number."""
    sides = list(shape) if draw(st.booleans()) else draw(st.lists(st.integers(0, 4), max_size=5))
    values = torch.rand(sides, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))), dtype=torch.float64)
    fill = draw(st.none() | st.sampled_from(FILLS))
    if fill is not None:
        places = ... if draw(st.booleans()) else values > 0.8
        values[places] = fill
    dtype = draw(st.just(torch.float64) | st.sampled_from((*DTYPES, torch.complex64)))
    if not dtype.is_floating_point and not dtype.is_complex:
        values = values.nan_to_num().clamp(-1, 200)
    return values.to(dtype)


def dicts(*shape: int) -> st.SearchStrategy:
    """One tensor or two by name."""
    return st.dictionaries(st.sampled_from(["a", "b"]), tensors(*shape), min_size=1, max_size=2)


@st.composite
def mostly(draw, *good: object) -> object:
    """A number that is right in three cases of four, else any."""
    return draw(st.sampled_from(good)) if draw(st.integers(0, 3)) else draw(NUMBERS)


def binary(*shape: int) -> st.SearchStrategy:
    """Masks: bool, of this shape."""
    return st.integers(0, 9).map(
        lambda seed: torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < seed / 8
    )


SHAPES = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    st.lists(st.integers(0, 5) | st.sampled_from([2**40, 2.5, math.nan, -1]), max_size=4).map(tuple),
    max_size=3,
)
SAMPLES = st.lists(FLOATS, max_size=5)
KEPT = {"0.weight": torch.eye(5, 6).bool(), "2.weight": torch.eye(4, 5).bool()}


def fresh() -> torch.Generator:
    """A generator in the same state every time."""
    return torch.Generator().manual_seed(0)


# ---- what has to come out ----------------------------------------------------------------------------------------


def spends(found: dict, density: float, shapes: dict, **_) -> bool:
    """Densities of every layer, in [0, 1]."""
    return list(found) == list(shapes) and all(0 <= d <= 1 for d in found.values())


def keeps_all_asked(found: dict, scores: dict, density: float, scope: str, **_) -> bool:
    sizes = [s.numel() for s in scores.values()]
    asked = [masks.kept_count(n, density) for n in (sizes if scope == "layer" else [sum(sizes)])]
    return sum(int(m.sum()) for m in found.values()) == sum(asked)


def is_estimate(found: stats.Estimate, **_) -> bool:
    """The interval holds the value, or there is none."""
    return math.isnan(found.low) or math.isnan(found.high) or found.low <= found.value <= found.high


def is_probability(found: float, **_) -> bool:
    return math.isnan(found) or 0 <= found <= 1


def are_distributions(found: torch.Tensor, **_) -> bool:
    """Rows sum to 1, but for those of logits that are not finite."""
    sums = found.sum(-1)
    return bool((sums.isnan() | ((sums - 1).abs() < 1e-6)).all())


def is_quality(found: dict, **_) -> bool:
    return 0 <= found["accuracy"] <= 1 and found["nll"] >= 0 and 0 <= found["brier"] <= 2.01 and 0 <= found["ece"] <= 1


def same_counts(found: dict, masks: dict, **_) -> bool:
    return all(int(found[name].sum()) == int(mask.sum()) for name, mask in masks.items())


def drops_and_grows(found: list, mask: torch.Tensor, **_) -> bool:
    return all(int(new.sum()) == int(mask.sum()) for new in found)


def is_plan(found: list, layers: int, **_) -> bool:
    return len(found) == layers + 1 and all(step.height >= 1 and step.width >= 1 for step in found)


def falls(found: list, n: int, **_) -> bool:
    """Fewer weights at every level, and one at least."""
    return found[0] == n and all(a > b >= 1 for a, b in pairwise(found))


def is_anything(found: object, **_) -> bool:
    """What has no promise of its own: it came back."""
    return True


# name: function, strategies of its arguments, what the result has to be, other words that name an argument
SUBJECTS: dict[str, tuple[Callable, dict, Callable, tuple[str, ...]]] = {
    "singular_values": (
        spectrum.singular_values,
        {"B": tensors(3, 4), "k": mostly(1, 2, 5).filter(lambda k: abs(k) < 1e6)},  # so many zeros fit into memory
        lambda found, k, **_: len(found) == k and bool((found[:-1] >= found[1:]).all() and found[-1] >= 0),
        ("matrix", "k=", "B holds"),
    ),
    "biadjacency": (spectrum.biadjacency, {"tensor": tensors(3, 4)}, lambda found, **_: found.ndim == 2, ()),
    "coordinate": (
        spectrum.coordinate,
        {"mask": tensors(4, 4), "weight": st.just(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))},
        lambda found, **_: found.norm >= 0,
        (),
    ),
    "keep_top": (
        lambda **given: masks.keep_top(**given),
        {
            "scores": dicts(3, 4) | st.just({}),
            "density": mostly(0.5, 0.1, 1.0),
            "scope": st.sampled_from(["layer", "global", "layer", "global", ""]),
        },
        keeps_all_asked,
        ("weights are to be kept",),
    ),
    "kept_count": (
        masks.kept_count,
        {"n": st.integers(1, 2**70), "density": mostly(0.5, 0.1, 1.0)},
        lambda found, n, **_: 1 <= found <= n,
        (),
    ),
    "shuffle": (
        lambda **given: masks.shuffle(generator=fresh(), **given),
        {
            "masks": st.fixed_dictionaries({"a": binary(3, 4), "b": binary(0)}) | dicts(3, 4),
            "scope": st.sampled_from(["layer", "global", "layer", "global", ""]),
            "share": mostly(0.0, 0.3, 1),
        },
        lambda found, masks, **_: (
            sum(int(m.sum()) for m in found.values()) == sum(int(m.sum()) for m in masks.values())
        ),
        ("mask",),
    ),
    "draw": (
        lambda **given: masks.draw(generator=fresh(), **given),
        {"among": dicts(3, 4), "counts": mostly(0, 3, 12)},
        lambda found, counts, **_: sum(int(m.sum()) for m in found.values()) == counts,
        ("mask", "weights are to be kept"),
    ),
    "rewire": (
        lambda **given: masks.rewire(generator=fresh(), **given),
        {"masks": dicts(3, 4), "share": mostly(0.0, 0.3, 1)},
        same_counts,
        ("mask", "layer's tensor"),
    ),
    "overlapping": (
        lambda **given: masks.overlapping(generator=fresh(), **given),
        {"masks": dicts(3, 4), "share": mostly(0.0, 0.3, 1)},
        same_counts,
        ("mask",),
    ),
    "mask_distances": (
        masks.mask_distances,
        {"members": st.lists(dicts(3, 4), max_size=3)},
        lambda found, members: torch.equal(found, found.T),
        ("mask",),
    ),
    "farthest": (
        masks.farthest,
        {
            "distances": tensors(3, 3).map(
                lambda t: t + t.mT if t.ndim == 2 and t.dtype != torch.bool and t.shape[0] == t.shape[1] else t
            ),
            "count": NUMBERS,
        },
        lambda found, count, **_: len(set(found)) == count,
        (),
    ),
    "children": (
        lambda **given: masks.children(NET, generator=fresh(), **given),
        {
            "kind": st.sampled_from(["random", "antirandom", "partition", "none"]),
            "count": mostly(2, 3, 4).filter(lambda n: n != 2**70),
            "density": mostly(0.5, 0.1, 1.0),
        },
        lambda found, count, **_: len(found) == count,
        (),
    ),
    **{
        f"allocate {name}": (function, {"shapes": SHAPES, "density": mostly(0.5, 0.1, 1.0)}, spends, (name,))
        for name, function in allocate.ALLOCATIONS.items()
        if name != "ratio_of"
    },
    "counts": (
        allocate.counts,
        {
            "densities": st.dictionaries(st.sampled_from(["a", "b", "c"]), mostly(0.5)),
            "shapes": SHAPES,
            "density": mostly(0.5, 0.1, 1.0),
        },
        lambda found, shapes, density, **_: (
            sum(found.values()) == masks.kept_count(sum(math.prod(shape) for shape in shapes.values()), density)
        ),
        ("layer densities", "has density"),
    ),
    "prune": (
        lambda **given: pruning.prune(NET, "synflow", **given),
        {
            "density": mostly(0.5, 0.1, 1.0),
            "rounds": mostly(1, 3).filter(lambda n: n != 2**70),
            "shape": st.just((6,))
            | st.lists(NUMBERS, min_size=1, max_size=1)
            .map(tuple)
            .filter(lambda s: s[0] not in range(1, 13) and s[0] != 2**70),
            "dtype": st.sampled_from([*DTYPES, torch.complex64]),
        },
        lambda found, density, **_: int(sum(m.sum() for m in found.values())) == masks.kept_count(50, density),
        ("scores",),
    ),
    "kept_by_level": (
        lottery.kept_by_level,
        {
            "n": st.integers(-1, 2000) | NUMBERS,
            "rate": mostly(0.2, 0.5),
            "levels": st.none() | mostly(1, 3),
            "density": st.none() | NUMBERS,
        },
        falls,
        ("n=",),
    ),
    "ecn_plan": (
        ecn_plan,
        {
            "shape": st.lists(st.integers(0, 40) | st.sampled_from([2.5, math.nan, 2**70]), min_size=2, max_size=4),
            "layers": mostly(1, 3).filter(lambda n: n != 2**70),
            "width": mostly(8),
            "growth": mostly(0, 8),
            "rate": mostly(0.75, 1),
        },
        is_plan,
        (),
    ),
    "drop_and_grow": (
        lambda **given: dynamic.drop_and_grow(generator=fresh(), **given),
        {
            "weight": tensors(3, 4),
            "mask": tensors(3, 4) | binary(3, 4),
            "fraction": mostly(0, 0.3, 1.0),
            "growths": st.lists(tensors(3, 4), max_size=2),
            "drop": st.sampled_from(["magnitude", "set"]),
        },
        drops_and_grows,
        ("scores",),
    ),
    "zeta": (
        partial(dynamic.zeta, dynamic.PRESETS["set_itop"]),
        {"step": mostly(0, 7, 20), "total_steps": mostly(1, 10)},
        lambda found, **_: 0 <= found <= 0.5,
        (),
    ),
    **{
        config.__name__: (config, {name: NUMBERS | WORDS for name in names}, is_anything, ())
        for config, names in (
            (TrainConfig, ("epochs", "lr", "momentum", "milestones", "warm_up", "seed", "augmented")),
            (dynamic.DynamicConfig, ("update_every", "zeta0", "zeta_min", "t_end_frac", "candidates", "plateau")),
            (tost.Recipe, ("e0", "e1", "activation", "labels")),
        )
    },
    "quality": (
        probabilities.quality,
        {
            "probabilities": tensors(4, 3).map(lambda t: t.softmax(1) if t.ndim == 2 and t.is_floating_point() else t),
            "labels": tensors(4) | st.just(torch.tensor([0, 1, 2, 0])),
            "bins": mostly(1, 15),
        },
        is_quality,
        (),
    ),
    "tempered": (
        partial(probabilities.tempered, torch.tensor([[0.5, 0.5], [1.0, 0.0]])),
        {"temperature": NUMBERS},
        are_distributions,
        (),
    ),
    "diversity": (
        probabilities.diversity,
        {"members": tensors(2, 4, 3).map(lambda t: t.softmax(2) if t.ndim == 3 and t.is_floating_point() else t)},
        lambda found, **_: 0 <= found["disagreement"] <= 1 and found["kl"] >= 0,
        ("probabilities",),
    ),
    "combine": (
        ensemble.combine,
        {
            "logits": tensors(2, 4, 3).filter(lambda t: not t.is_complex()),
            "by": st.sampled_from(["logits", "probabilities", ""]),
        },
        are_distributions,
        (),
    ),
    "normalise": (
        DIGITS.normalise,
        {"images": tensors(2, 1, 8, 8)},
        lambda found, images: found.dtype == torch.float32 and found.shape == images.shape,
        (),
    ),
    "augment": (
        lambda **given: augment(generator=fresh(), **given),
        {
            "images": tensors(2, 1, 4, 4),
            "padding": mostly(0, 2).filter(lambda n: n != 2**70),
            "mode": st.sampled_from(["zeros", "reflect", "edge"]),
        },
        lambda found, images, **_: found.shape == images.shape and found.dtype == images.dtype,
        (),
    ),
    "batches": (
        lambda split, size: sum(len(labels) for _, labels in batches(split, size)),
        {"split": st.tuples(tensors(4, 1, 2, 2), tensors(4)), "size": mostly(1, 3)},
        lambda found, split, **_: found == len(split[1]),
        ("images", "labels"),
    ),
    "corrupt": (
        lambda images, **given: corrupt(
            Split(images, torch.zeros(len(images) if images.ndim else 0)), generator=fresh(), **given
        ),
        {
            "images": tensors(2, 1, 4, 4),
            "name": st.sampled_from(["noise", "blur", "contrast", "shift", "scale", "occlusion", ""]),
            "severity": mostly(1, 5),
        },
        lambda found, images, **_: found.images.shape == images.shape and found.images.dtype == images.dtype,
        ("corruption",),
    ),
    "mean": (stats.mean, {"values": SAMPLES}, is_estimate, ()),
    "paired_difference": (stats.paired_difference, {"a": SAMPLES, "b": SAMPLES}, is_estimate, ("pairs",)),
    "rank_correlation": (
        stats.rank_correlation,
        {"x": SAMPLES, "y": SAMPLES},
        lambda found, **_: math.isnan(found) or -1.0000001 <= found <= 1.0000001,
        ("samples",),
    ),
    "holm": (
        stats.holm,
        {"p_values": SAMPLES | st.lists(st.floats(0, 1) | st.just(math.nan), max_size=5)},
        lambda found, p_values: len(found) == len(p_values) and bool(((found >= 0) & (found <= 1)).all()),
        (),
    ),
    "p_value": (
        stats.p_value,
        {"estimate": st.builds(stats.Estimate, FLOATS, FLOATS, FLOATS, st.integers(0, 5)), "bound": FLOATS},
        is_probability,
        (),
    ),
    "claim": (
        lambda **given: claims.claim("A sentence", paper="P", **given)["holds"],
        {
            "estimate": st.builds(stats.Estimate, FLOATS, FLOATS, FLOATS, st.integers(0, 5)),
            "equivalent": FLOATS | st.tuples(FLOATS, FLOATS),
        },
        lambda found, **_: found in claims.VERDICTS,
        ("bound",),
    ),
    "key": (
        key,
        {
            "config": st.dictionaries(
                st.sampled_from(["a", "ä", "seed", "device"]), NUMBERS | st.lists(NUMBERS, max_size=2), max_size=3
            )
        },
        lambda found, **_: re.fullmatch("[0-9a-f]{64}", found),
        (),
    ),
}


@pytest.mark.parametrize("name", SUBJECTS)
@given(data=st.data())
@fuzzed
def test_anything_gives_what_is_documented_or_an_error_that_names_the_argument(name, data):
    function, strategies, promised, words = SUBJECTS[name]
    given = {argument: data.draw(strategy, label=argument) for argument, strategy in strategies.items()}
    refused = ""
    try:
        found = function(**given)
    except (ValueError, TypeError) as error:
        refused = f"{type(error).__name__}: {error}"
    if refused:
        named = [name for name in given if len(name) > 1] + list(words)  # "a" is in every sentence
        assert any(word in refused for word in named), f"names no argument: {refused}"
    else:
        assert promised(found, **given), f"gave {found!r}"


# ---- safety ------------------------------------------------------------------------------------------------------

FORBIDDEN = {"eval", "exec", "os.system", "os.popen", "torch.load", "subprocess.getoutput"}
MEANT = {
    "runs/cluster.py": ["pickle", "cloudpickle"],  # a sweep's function, which travels to workers and back to no file
    "compendium/planning.py": ["exec", "exec"],  # cells of the notebooks of this repository, as a kernel would
}
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def dangers(source: str) -> list[str]:
    """What code calls or imports that could run what a file or a text says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            unsafe_load = name in ("yaml.load", "np.load") and not {"Loader", "allow_pickle"} & set(options)
            if name in FORBIDDEN or unsafe_load or options.get("shell", "False") != "False":
                found.append(name)
            if options.get("allow_pickle", "False") != "False" or name.endswith(".extractall"):
                found.append(name)
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        modules = [*names, getattr(node, "module", None) or ""] if names else []
        found += [
            name for name in modules if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "marshal", "shelve")
        ]
    return found


def test_the_reader_of_dangers_sees_every_form():
    safe = "a.eval()\nnp.load(p, allow_pickle=False)\nyaml.load(t, Loader=L)\nrun([x], shell=False)\nimport pick\n"
    assert dangers(safe) == []
    for line in (
        *("eval(t)", "exec(t)", "os.system(t)", "run(t, shell=True)", "import pickle", "from pickle import load"),
        *("np.load(p)", "np.load(p, allow_pickle=True)", "yaml.load(t)", "torch.load(p)", "archive.extractall()"),
    ):
        assert len(dangers(line)) >= 1, line


@pytest.mark.parametrize("file", SOURCES)
def test_no_code_runs_what_a_file_or_a_text_says(file):
    assert dangers(SOURCES[file]) == MEANT.get(file, [])


def test_whatever_is_fetched_is_fetched_over_https():
    assert re.findall(r"\b(?:http|ftp)://[^\s\"']+", "\n".join(SOURCES.values())) == []
