"""``python -m fsp.compendium.gpu``: run the tests that need a GPU, measure what it is for, write both into one table.

Rows are written as they are measured.  What fails or finds no time is a row, too, with the reason in ``note``.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from fsp import models, paths, pruning, search, spectrum, training
from fsp.data import STATISTICS, Data, Split
from fsp.files import replacing
from fsp.masks import Masks
from fsp.progress import command_line
from fsp.runs.provenance import provenance

LIMIT_S = 450  # nothing new begins later, so that all takes eight minutes at most
TESTS_S = 150  # of these for the tests


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the defaults are for a card.

    Attributes
    ----------
    networks : tuple of str
        Keys of `fsp.models.MODELS`, trained one at a time.
    compiled : tuple of str
        Those of them that are measured compiled, too, which takes a minute each.
    member, members : str, int
        Network that is trained many at a time, and how many.
    searched : str
        Network whose masks are measured and searched.
    options : dict
        Of all these networks.
    shape : tuple of int
        Of an image.
    examples, batch_size : int
    density : float
        Of masks under which networks are trained.
    seconds : float
        For each rate, after the first steps.
    population, drawn : int
        Masks to measure, and how many different ones are drawn for it.
    search_density : float
    search_population : int
    side : int
        Of the square matrices whose product gives the peak.
    workers : int, optional
        Processes that load data for the plain loop; default one a core, at most eight.
    """

    networks: tuple[str, ...] = ("resnet18", "resnet34", "vgg16", "wrn28_10")
    compiled: tuple[str, ...] = ("resnet18",)
    member: str = "resnet20"
    members: int = 16
    searched: str = "resnet18"
    options: Mapping[str, object] | None = None
    shape: tuple[int, int, int] = (3, 32, 32)
    examples: int = 12_800
    batch_size: int = 128
    density: float = 0.1
    seconds: float = 2.0
    population: int = 3000
    drawn: int = 20
    search_density: float = 0.01
    search_population: int = 60
    side: int = 8192
    workers: int | None = None


FIRST_STEPS = 20  # not timed: they allocate memory and choose kernels


def measure(device: torch.device, sizes: Sizes, *, limit_s: float = LIMIT_S) -> Iterator[dict]:
    """All measurements, one after the other; one that fails is a row that says why.

    Parameters
    ----------
    device : torch.device
    sizes : Sizes
    limit_s : float
        Seconds after which none begins.

    Yields
    ------
    dict
        ``measured``, ``network``, ``way``, ``value``, ``unit``, ``peak_bytes`` of memory, ``share`` of the bfloat16
        peak (dense arithmetic, also where masks are sparse), ``note``.
    """
    start, peak = time.perf_counter(), math.nan
    todo: list[tuple[dict, Callable[[], dict]]] = [
        ({"measured": "matrix product", "way": "bfloat16"}, lambda: matmul(device, sizes))
    ]
    for network in sizes.networks:
        for way in WAYS:
            if way != "fit, bfloat16, compiled" or network in sizes.compiled:
                found = {"measured": "training", "network": network, "way": way}
                todo.append((found, lambda network=network, way=way: trained(network, way, device, sizes)))
    for way in ("one by one", "together", "one by one, bfloat16", "together, bfloat16"):
        found = {"measured": f"{sizes.members} networks", "network": sizes.member, "way": way}
        todo.append((found, lambda way=way: many(way, device, sizes)))
    found = {"network": sizes.searched, "way": f"erk, density {sizes.search_density}"}
    todo.append(({"measured": "coordinates of masks"} | found, lambda: measured_masks(device, sizes)))
    todo.append(({"measured": "search"} | found, lambda: searched(device, sizes)))
    empty = {"network": "", "value": math.nan, "unit": "", "peak_bytes": math.nan, "share": math.nan, "note": ""}
    for named, work in todo:
        row = empty | named
        if time.perf_counter() - start > limit_s:
            yield row | {"note": "no time left"}
            continue
        try:
            with _memory(device) as memory:
                row |= work()
            row |= memory
        except Exception as error:  # one that fails must not take the others with it
            row["note"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if named["measured"] == "matrix product":
            peak = row["value"]
        flops = row.pop("flops", math.nan)
        if named["measured"] == "training":
            row["share"] = row["value"] * flops / peak
        yield row


# ---- what is measured --------------------------------------------------------------------------------------------


def matmul(device: torch.device, sizes: Sizes) -> dict:
    """Arithmetic of a large matrix product in bfloat16: what the other rates are compared with."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, sizes.side, sizes.side, dtype=torch.float32, device="cpu", generator=generator)
    a, b = drawn.to(device, torch.bfloat16)
    times = _repeated(lambda: a @ b, device, sizes.seconds)
    return {"value": 2 * sizes.side**3 / times, "unit": "operations/s"}


WAYS = ("DataLoader and autocast", "fit", "fit, bfloat16", "fit, bfloat16, compiled")


def trained(network: str, way: str, device: torch.device, sizes: Sizes) -> dict:
    """Images a second that one masked network is trained on."""
    data = _images(sizes)
    model = _network(network, sizes)
    masks = pruning.prune(model, "erk", sizes.density, generator=torch.Generator().manual_seed(0))
    flops = _operations(model, data)
    model.to(device)
    masks = {name: mask.to(device) for name, mask in masks.items()}
    watch = _Stopwatch(device, sizes)
    if way == "DataLoader and autocast":
        _plain_loop(model, masks, data, device, sizes, watch)
    else:
        low = "bfloat16" in way
        options = {"bfloat16": low, "channels_last": low, "compiled": "compiled" in way, "augmented": True}
        config = training.TrainConfig(10_000, sizes.batch_size, lr=0.01, **options)
        with suppress(_Enough):
            training.fit(model, _moved(data, device), config, masks=masks, hooks=[watch])
    return {"value": watch.rate(), "unit": "images/s", "flops": flops}


def many(way: str, device: torch.device, sizes: Sizes) -> dict:
    """Images a second that some small masked networks are trained on, all counted."""
    data = _moved(_images(sizes), device)
    config = training.TrainConfig(1, sizes.batch_size, lr=0.01, bfloat16="bfloat16" in way, augmented=True)

    def once(count: int, data: Data) -> float:
        family = [_network(sizes.member, sizes, seed) for seed in range(count)]
        masks_list = []
        for seed, member in enumerate(family):
            found = pruning.prune(member, "erk", sizes.density, generator=torch.Generator().manual_seed(seed))
            masks_list.append({name: mask.to(device) for name, mask in found.items()})
            member.to(device)
        _wait(device)
        start = time.perf_counter()
        if way.startswith("together"):
            training.fit_many(family, data, config, masks_list=masks_list, seeds=range(count))
        else:
            for member, masks in zip(family, masks_list, strict=True):
                training.fit(member, data, config, masks=masks)
        _wait(device)
        return time.perf_counter() - start

    few = Split(*(part[: 2 * sizes.batch_size] for part in data.train))
    together = way.startswith("together")
    once(sizes.members if together else 1, replace(data, train=few))  # not timed
    count = sizes.members if together else min(4, sizes.members)  # one by one, four of them say it
    return {"value": count * len(data.train.labels) / once(count, data), "unit": "images/s"}


def measured_masks(device: torch.device, sizes: Sizes) -> dict:
    """Coordinates of a population of masks, those of all layers."""
    model = _network(sizes.searched, sizes)
    drawn = [
        pruning.prune(model, "erk", sizes.search_density, generator=torch.Generator().manual_seed(seed))
        for seed in range(sizes.drawn)
    ]
    model.to(device)
    spectrum.population(drawn[:2], model, device=device)
    done, start = 0, time.perf_counter()
    while done < sizes.population and time.perf_counter() - start < 15 * sizes.seconds:
        portion = drawn[: sizes.population - done]
        spectrum.population(portion, model, device=device)
        done += len(portion)
    seconds = time.perf_counter() - start
    return {"value": done / seconds, "unit": "masks/s", "note": f"{done} masks in {seconds:.1f} s"}


def searched(device: torch.device, sizes: Sizes) -> dict:
    """Candidates that a mask search draws and judges."""
    model = _network(sizes.searched, sizes)
    start = time.perf_counter()
    found = search.search(model, "erk", sizes.search_density, population=sizes.search_population, device=device)
    seconds = time.perf_counter() - start
    parts = ", ".join(f"{name} {took:.1f} s" for name, took in found.timing.items())
    note = f"{sizes.search_population} candidates in {seconds:.1f} s: {parts}"
    return {"value": sizes.search_population / seconds, "unit": "masks/s", "note": note}


# ---- the plain loop ----------------------------------------------------------------------------------------------


class _Pictures(Dataset):
    """Images that are cropped, flipped and normalised one at a time, as tutorials do it."""

    def __init__(self, data: Data):
        from torchvision import transforms  # here: it takes seconds

        self.images, self.labels = data.train.images.permute(0, 2, 3, 1).numpy(), data.train.labels
        steps = [transforms.ToPILImage(), transforms.RandomCrop(data.shape[1:], padding=4)]
        steps += [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.transform(np.ascontiguousarray(self.images[number])), self.labels[number]


def _plain_loop(
    model: nn.Module, masks: Masks, data: Data, device: torch.device, sizes: Sizes, watch: "_Stopwatch"
) -> None:
    """Train as a tutorial does, with workers, pinned memory, autocast and masks multiplied after each step."""
    workers = min(8, os.cpu_count() or 1) if sizes.workers is None else sizes.workers
    options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": device.type == "cuda"}
    loader = DataLoader(_Pictures(data), sizes.batch_size, shuffle=True, drop_last=True, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    model.train()
    step = 0
    with suppress(_Enough):
        while True:
            for images, labels in loader:
                images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                optimizer.zero_grad()
                with torch.autocast(device.type, torch.bfloat16):
                    loss = cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    for name, mask in masks.items():
                        model.get_parameter(name).mul_(mask)
                step += 1
                watch.after_step(step, optimizer)


# ---- clocks and data ---------------------------------------------------------------------------------------------


class _Enough(Exception):
    """A training has been timed for long enough."""


class _Stopwatch:
    """A hook that times the steps of a training after the first ones, and ends it."""

    def __init__(self, device: torch.device, sizes: Sizes):
        self.device, self.sizes, self.start, self.seconds, self.steps = device, sizes, math.inf, math.nan, 0

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Look at the clock; the host runs ahead of a GPU, so wait for it at both ends."""
        if step == FIRST_STEPS:
            _wait(self.device)
            self.start = time.perf_counter()
        elif time.perf_counter() - self.start > self.sizes.seconds:
            _wait(self.device)
            self.seconds, self.steps = time.perf_counter() - self.start, step - FIRST_STEPS
            raise _Enough

    def rate(self) -> float:
        """Images a second."""
        return self.steps * self.sizes.batch_size / self.seconds


def _repeated(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds that some work takes, once it has been done three times."""
    for _ in range(3):
        work()
    count, begun = 0, time.perf_counter()
    _wait(device)
    start = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        for _ in range(10):
            work()
        _wait(device)
        count += 10
    return (time.perf_counter() - start) / count


@contextmanager
def _memory(device: torch.device) -> Iterator[dict]:
    """The largest memory that is in use inside, on CUDA, which is freed afterwards."""
    found: dict = {}
    if device.type != "cuda":
        yield found
        return
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield found
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    finally:
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _images(sizes: Sizes) -> Data:
    """Noise of the size and type of CIFAR-10, on the CPU; what it shows does not change what it costs."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        images = torch.randint(256, (count, *sizes.shape), dtype=torch.uint8, generator=generator)
        return Split(images, torch.randint(10, (count,), generator=generator))

    mean, std = (values[: sizes.shape[0]] for values in STATISTICS["cifar10"]["default"])
    return Data("noise", split(sizes.examples), split(0), split(0), 10, mean, std, augmented=True)


def _moved(data: Data, device: torch.device) -> Data:
    """The data on a device."""
    names = ("train", "validation", "test")
    return replace(data, **{name: Split(*(part.to(device) for part in getattr(data, name))) for name in names})


def _network(name: str, sizes: Sizes, seed: int = 0) -> nn.Module:
    """One of ours, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return models.build(name, sizes.shape, 10, generator=generator, **sizes.options or {})


def _operations(model: nn.Module, data: Data) -> float:
    """Floating-point operations that a training step spends on an image, products and sums counted."""
    with FlopCounterMode(display=False) as counter:
        cross_entropy(model(data.normalise(data.train.images[:2])), data.train.labels[:2]).backward()
    model.zero_grad()
    return counter.get_total_flops() / 2


# ---- the command -------------------------------------------------------------------------------------------------


def run_tests(folder: Path, seconds: float) -> dict:
    """Run the tests that need a GPU, in a process of their own.

    Parameters
    ----------
    folder : path
        With the tests.
    seconds : float
        After which they are stopped.

    Returns
    -------
    dict
        A row as of `measure`: its value is the number of tests that failed.
    """
    row = {"measured": "tests", "network": "", "way": "pytest -m gpu", "unit": "failures"}
    row |= {"peak_bytes": math.nan, "share": math.nan}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--no-header", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=paths.PACKAGE.parent)
    except subprocess.TimeoutExpired:
        return row | {"value": math.nan, "note": f"stopped after {seconds:.0f} s"}
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    counts = [int(number) for number in re.findall(r"(\d+) (?:failed|error)", last)]
    if done.returncode not in (0, 1):
        return row | {"value": math.nan, "note": f"pytest ended with {done.returncode}: {last}"}
    if done.returncode:
        print(done.stdout)
    return row | {"value": sum(counts), "note": last.strip("= ")}


def write(rows: list[dict], out: Path) -> None:
    """Write ``gpu.csv`` and, for reading, ``gpu.md``.

    Parameters
    ----------
    rows : list of dict
        Of `measure` and `run_tests`.
    out : path
        Folder.
    """
    made = provenance()
    table = pd.DataFrame(rows)
    for name in ("gpu", "cpu", "torch"):
        table[name] = made[name]
    table["cuda"], table["date"] = torch.version.cuda or "", time.strftime("%Y-%m-%d")
    with replacing(out / "gpu.csv") as file:
        table.to_csv(file, index=False, lineterminator="\n")
    lines = [
        "# On a GPU",
        "",
        f"{made['gpu'] or 'No GPU'}, {made['cpu']}, torch {made['torch']}, Python {made['python']}, commit "
        f"{made['git'][:12] or 'unknown'}, {time.strftime('%Y-%m-%d')}. Written by `make gpu`.",
        "",
        "Share: arithmetic of the dense network a second, divided by that of the matrix product. Networks are masked, "
        "and trained on noise of the size of CIFAR-10.",
        "",
        "| measured | network | way | rate | share | memory, GiB | note |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        rate = "" if math.isnan(row["value"]) else f"{row['value']:.4g} {row['unit']}"
        share = "" if math.isnan(row["share"]) else f"{row['share']:.1%}"
        memory = "" if math.isnan(row["peak_bytes"]) else f"{row['peak_bytes'] / 2**30:.2f}"
        cells = [row["measured"], row["network"], row["way"], rate, share, memory, row["note"].replace("|", "/")]
        lines.append(f"| {' | '.join(cells)} |")
    with replacing(out / "gpu.md") as file:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Test and measure on the GPU; without one say so, which is no failure."""
    parser = argparse.ArgumentParser(prog="python -m fsp.compendium.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=paths.COMMITTED.results, help="folder of gpu.csv and gpu.md")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    given = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("skipped: this needs a CUDA device, and torch finds none here; nothing was measured or written")
        return 0
    device, start = torch.device("cuda"), time.perf_counter()
    torch.zeros(1, device=device)  # from here on provenance knows its name
    rows = [] if given.no_tests else [run_tests(paths.PACKAGE.parent / "tests", TESTS_S)]
    for row in measure(device, Sizes(), limit_s=LIMIT_S - (time.perf_counter() - start)):
        rows.append(row)
        print(
            f"{row['measured']:22} {row['network']:10} {row['way']:26} {row['value']:12.4g} {row['unit']} {row['note']}"
        )
        write(rows, given.out)
    failed = [row for row in rows if math.isnan(row["value"]) or (row["unit"] == "failures" and row["value"])]
    print(f"{len(rows)} rows, {len(failed)} of them failed; written to {given.out / 'gpu.csv'} and gpu.md")
    return 1 if failed else 0


if __name__ == "__main__":
    command_line(main)
