"""One rank of the gradient of a fixed global batch of labelled molecules; rank 0 writes it, parameter by parameter.

labelled_gradients.py MICRO_BATCHES OUT: property, forces, predicted spectra and coord together, in float64 at ZeRO 0 to
OUT-float64.safetensors, in float32 at ZeRO 2 to OUT-float32, at ZeRO 3 to OUT-zero3. Some labels are missing.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

from mspt import config
from mspt.data.shardset import ShardSet
from mspt.objectives import Pretraining
from mspt.training.engine import initialise
from tests.training.workers.cuts import RUNS, SIZES, write_gradients

ROOT = Path(__file__).parents[3]
SMALL = [
    "model.encoder.layers=2",
    "model.encoder.channels=16",
    "model.encoder.heads=2",
    "model.encoder.radial_functions=8",
    "objectives.coord={weight: 0.1, sigma: 0.005}",
    "objectives.property={target: mu}",
    "objectives.forces={}",
    "objectives.spectrum_prediction={hidden: 8}",
]


def labelled(record, number):
    """A real molecule, with energy and forces made up; every third has no energy, every fifth no forces and no IR."""
    rng = np.random.default_rng(number)
    targets = record.targets | ({"energy": 0.1 * rng.normal()} if number % 3 else {})
    forces = rng.normal(0, 0.05, record.positions.shape).astype(np.float32) if number % 5 else None
    spectra = {name: own for name, own in record.spectra.items() if name != "ir" or number % 5}
    return dataclasses.replace(record, targets=targets, forces=forces, spectra=spectra)


sizes, out = SIZES[int(sys.argv[1])], sys.argv[2]
process = initialise()
shards = ShardSet.open(ROOT / "shards/bundled/qm9-spectra/heldout")
for run, (dtype, stage) in RUNS.items():
    loaded = config.load(ROOT / "configs/quickstart-stage1.yaml", [*SMALL, f"engine.zero_stage={stage}"])
    torch.manual_seed(0)
    module = Pretraining(loaded.model, loaded.objectives).to(dtype)
    for head in module.objectives["spectrum_prediction"].heads.values():
        torch.nn.init.normal_(head.layers[-1].weight, std=0.1)  # from zero, nothing before it would have a gradient
    for objective, deviation in (("property", 1.5), ("forces", 0.2)):
        module.objectives[objective].statistics.deviation.fill_(deviation)
    records = (labelled(record, number) for number, record in enumerate(shards.records(range(sum(sizes)))))
    write_gradients(module, loaded, records, sizes, process, dtype, f"{out}-{run}.safetensors")
