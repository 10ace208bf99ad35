"""The quick profile's numbers do not depend on how many threads the machine offers.

Notebooks call ``torch.set_num_threads(1)``; this runs their chain in processes that are started with one and with four.
"""

import json
import os
import subprocess
import sys

import pytest

CHAIN = """
import json, torch
from fsp import models, spectrum
from fsp.data.batching import scoring_batches
from fsp.data import load
from fsp.pruning.methods import prune
from fsp.training.train import TrainConfig, fit

started = torch.get_num_threads()
torch.set_num_threads(1)

def exact(numbers):
    return [float(number).hex() for number in numbers]

found = {}
for model, options in [("mlp", {}), ("resnet8", {"width": 8})]:
    for method in ("snip", "synflow"):
        data = load("digits", seed=1)
        generator = torch.Generator().manual_seed(1)
        net = models.build(model, data.shape, data.classes, generator=generator, **options)
        examples = scoring_batches(data, generator=generator)
        masks = prune(net, method, 0.05, batches=examples, generator=generator)
        coordinates = spectrum.coordinates(masks, net)
        history = fit(net, data, TrainConfig(epochs=2, seed=1), masks=masks)
        found[f"{model} {method}"] = {
            "masks": [mask.flatten().nonzero().flatten().tolist() for mask in masks.values()],
            "coordinates": {name: exact(c) for name, c in coordinates.items()},
            "norm": exact([spectrum.spectrum_norm(coordinates)]),
            "epochs": [exact(entry.values()) for entry in history.epochs],
            "test": exact([history.test_accuracy, history.test_accuracy_best, history.test_loss]),
            "weights": [exact([p.detach().double().sum(), p.detach().abs().max()]) for p in net.parameters()],
        }
print(json.dumps({"started": started, "found": found}))
"""

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@pytest.fixture(scope="module")
def answers():
    """What the chain says, by the number of threads that its process was started with."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    running = {}
    for threads in ("1", "4"):
        given = environment | dict.fromkeys(VARIABLES, threads) | {"FSP_PROGRESS": "0"}
        running[threads] = subprocess.Popen(
            [sys.executable, "-c", CHAIN], env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    found = {}
    for threads, process in running.items():
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        found[threads] = json.loads(out.splitlines()[-1])
    return found


@pytest.mark.skipif(os.cpu_count() == 1, reason="one core starts one thread")
def test_the_processes_are_really_started_with_different_numbers_of_threads(answers):
    assert answers["1"]["started"] == 1
    assert answers["4"]["started"] > 1


@pytest.mark.parametrize("run", ["mlp snip", "mlp synflow", "resnet8 snip", "resnet8 synflow"])
def test_masks_coordinates_and_trainings_are_the_same_to_the_last_bit(answers, run):
    one, many = (answers[number]["found"][run] for number in ("1", "4"))
    for part in one:
        assert many[part] == one[part], part
    assert any(float.fromhex(x) != 0 for layer in one["coordinates"].values() for x in layer)
