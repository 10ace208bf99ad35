"""One population of masks that several notebooks look at: a mask or a control of it, its graph, what it trains to.

A run is known by its config, so a mask that two notebooks ask for is trained once.
"""

import math
from collections.abc import Iterable
from itertools import product
from types import SimpleNamespace

import torch
from torch import nn

from fsp import masks, models, spectrum
from fsp.compendium.study import TRAINING, begin, chosen, prune, train, train_config
from fsp.data import Data
from fsp.masks import Masks
from fsp.pruning import diagnose
from fsp.training import Snapshots, steps

ITSELF = {"variant": "itself"}
SHUFFLED = {"variant": "shuffled", "share": 1.0}  # positions drawn anew inside each layer
REWIRED = {"variant": "rewired", "share": 1.0}  # edges drawn anew with every degree of every vertex kept
ICLR = ("gap_normalised", "imdb_normalised", "imdb_stable", "narc_iclr2023", "narc_iclr2023_undirected")
DENSITY_SCALED = "density_scaled"


def members(
    given: SimpleNamespace,
    methods: Iterable[str],
    densities: Iterable[float],
    seeds: Iterable[int],
    ways: Iterable[dict] = (ITSELF,),
    **changed: object,
) -> list[dict]:
    """Configs of `member`: every method at every density with every seed, in every way.

    Parameters
    ----------
    given : namespace
        Parameters of a notebook, with the entries `fsp.compendium.study.TRAINING` and ``early_steps``.
    methods, densities, seeds
    ways : iterable of dict
        `ITSELF`, `SHUFFLED`, `REWIRED`, or one of the last two with another ``share``.
    **changed
        What else is to be so in all of these configs, such as ``epochs=6``.

    Returns
    -------
    list of dict
    """
    shared = {"experiment": "population"} | chosen(given, *TRAINING, "early_steps") | changed
    return [
        shared | {"method": method, "density": density, "seed": seed} | way
        for method, density, seed, way in product(methods, densities, seeds, ways)
    ]


def member(config: dict) -> dict[str, object]:
    """One mask of the population, or a control of it, and what it trains to.

    Parameters
    ----------
    config : dict
        ``method``, ``density``, ``seed``, ``variant`` ("itself", "shuffled" or "rewired"; then with ``share``), those
        of `fsp.compendium.study.begin` and `fsp.compendium.study.train`, and ``early_steps``.  With ``mask_seed`` the
        mask is made on the network of that seed.  ``init``, if given, is the initialiser; with "density_scaled" the
        weights are drawn anew, scaled to the density of each layer, once the mask is there.

    Returns
    -------
    dict of str to number or str
        * ``accuracy`` on the test split after the last epoch, ``validation`` accuracy, ``training`` status
        * ``ramanujan_gap``, ``weighted_gap``, ``imdb``, ``imsg``: means over the layers where they are defined, whose
          numbers are ``layers_ramanujan_gap`` ...; ``spectrum_norm``; ``layers``
        * the quantities `ICLR`: means over layers, of `fsp.spectrum.layer_table`
        * ``distance_init``, ``early_weighted_gap``, ``early_imsg``, ``early_spectrum_norm``: after ``early_steps``
        * ``effective_density``, ``live_units`` (share of units with an incoming weight), ``degree_right`` (mean number
          of weights into such a unit), ``weight_norm`` (of the kept weights), ``empty_layers``
        * ``moved``: share of the kept weights of the mask itself that this variant does not keep
    """
    scaled = config.get("init") == DENSITY_SCALED  # which needs the mask: until then the network has its own weights
    setting = {name: value for name, value in config.items() if not (scaled and name == "init")}
    data, network, _ = start = begin(setting)
    if "mask_seed" in config:
        start = begin(setting | {"seed": config["mask_seed"]})
    own = prune(config, *start)
    kept = _varied(config, own, network)
    if scaled:
        models.initialise_(network, DENSITY_SCALED, generator=_aside(config, 1), masks=kept)
    at_start = spectrum.coordinates(kept, network)
    row = _graph(kept, network, data) | _quantities(at_start)
    row["moved"] = sum(int((own[name] & ~kept[name]).sum()) for name in own) / sum(int(m.sum()) for m in own.values())
    row |= {f"layers_{name}": count for name, count in spectrum.coverage(at_start)._asdict().items()}

    early = min(config["early_steps"], steps(data, train_config(config)))
    moment = Snapshots(network, [early])
    history = train(config, data, network, kept, hooks=[moment])
    after = {f"early_{name}": math.nan for name in ("weighted_gap", "imsg", "spectrum_norm")}
    row["distance_init"] = math.nan
    if history.status == "finished":
        at_early = spectrum.coordinates(kept, moment.states[early])
        row["distance_init"] = spectrum.distance(at_early, at_start)
        after = {name: _quantities(at_early)[name.removeprefix("early_")] for name in after}
    validation = history.epochs[-1]["validation_accuracy"]
    return {"accuracy": history.test_accuracy, "validation": validation, "training": history.status} | row | after


def _varied(config: dict, own: Masks, network: nn.Module) -> Masks:
    """The mask itself, or the control that the config asks for."""
    drawn = {"generator": _aside(config, 0), "share": config.get("share")}
    match config["variant"]:
        case "itself":
            return own
        case "shuffled":
            return masks.shuffle(own, **drawn)
        case "rewired":
            return masks.rewire(own, model=network, **drawn)
    raise ValueError(f"variant={config['variant']!r}: expected itself, shuffled or rewired")


def _aside(config: dict, number: int) -> torch.Generator:
    """A generator that no draw of the run itself uses."""
    return torch.Generator().manual_seed(-1 - 2 * config["seed"] - number)


def _quantities(found: dict[str, spectrum.Coordinate]) -> dict[str, float]:
    """Mean of each quantity over the layers that have it, and the norm."""
    return spectrum.layer_mean(found)._asdict() | {"spectrum_norm": spectrum.spectrum_norm(found)}


def _graph(kept: Masks, network: nn.Module, data: Data) -> dict[str, float]:
    """What else a mask says of its network before training."""
    layers = spectrum.layer_table(kept, network)
    left = diagnose(network, kept, data.shape).network
    weights = masks.used_weights(network, kept)
    squares = sum(weights[name].detach()[mask].double().square().sum().item() for name, mask in kept.items())
    return {
        "layers": len(kept),
        **layers[list(ICLR)].mean().to_dict(),
        "effective_density": left["effective_density"],
        "live_units": layers["n_right"].sum() / layers["n_outputs"].sum(),
        "degree_right": layers["degree_right"].mean(),
        "weight_norm": math.sqrt(squares),
        "empty_layers": left["empty"],
    }
