"""One rank of the gradient of a fixed global batch; rank 0 writes it, parameter by parameter.

gradients.py MICRO_BATCHES OUT DENOISING…: for each denoising objective, beside masked patches and contrast, in float64
at ZeRO 0 to OUT-DENOISING-float64.safetensors, in float32 at ZeRO 2 to OUT-DENOISING-float32, at ZeRO 3 to
OUT-DENOISING-zero3.
"""

import sys
from pathlib import Path

import torch

from mspt import config
from mspt.data.shardset import ShardSet
from mspt.objectives import Pretraining
from mspt.training.engine import initialise
from tests.objectives.made import bonded
from tests.training.workers.cuts import RUNS, SIZES, write_gradients

ROOT = Path(__file__).parents[3]
SMALL = [
    "model.encoder.layers=2",
    "model.encoder.channels=16",
    "model.encoder.heads=2",
    "model.encoder.radial_functions=8",
    "model.specformer.channels=16",
    "model.specformer.heads=2",
    "model.specformer.feed_forward=32",
    "objectives.coord=null",
    "objectives.contrast.negatives=global",
]

sizes, out, denoising = SIZES[int(sys.argv[1])], sys.argv[2], sys.argv[3:]
process = initialise()
shards = ShardSet.open(ROOT / "shards/bundled/qm9-spectra/heldout")
for run, (dtype, stage) in RUNS.items():
    for objective in denoising:
        settings = [*SMALL, f"objectives.{objective}={{}}", f"engine.zero_stage={stage}"]
        loaded = config.load(ROOT / "configs/quickstart.yaml", settings)
        torch.manual_seed(0)
        module = Pretraining(loaded.model, loaded.objectives).to(dtype)
        records = map(bonded, shards.records(range(sum(sizes))))
        write_gradients(module, loaded, records, sizes, process, dtype, f"{out}-{objective}-{run}.safetensors")
