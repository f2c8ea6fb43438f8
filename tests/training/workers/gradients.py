"""One rank of the gradient of a fixed global batch; rank 0 writes it, parameter by parameter.

gradients.py MICRO_BATCHES OUT DENOISING…: for each denoising objective, beside masked patches and contrast, in float64
at ZeRO 0 to OUT-DENOISING-float64.safetensors, in float32 at ZeRO 2 to OUT-DENOISING-float32, at ZeRO 3 to
OUT-DENOISING-zero3.
"""

import sys
from pathlib import Path

import safetensors.torch
import torch

from mspt import config
from mspt.data.batch import MoleculeBatch
from mspt.data.keyed import Keyed
from mspt.data.shardset import ShardSet
from mspt.objectives import Pretraining
from mspt.training.engine import Engine, initialise
from mspt.training.trainer import accumulate
from tests.objectives.made import bonded

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
# Uneven, as packed micro-batches are, and one that is empty, as at the end of an epoch.
SIZES = {1: [11], 4: [1, 0, 7, 3]}
# At ZeRO 3 last, as it patches torch.
RUNS = {"float64": (torch.float64, 0), "float32": (torch.float32, 2), "zero3": (torch.float32, 3)}

sizes, out, denoising = SIZES[int(sys.argv[1])], sys.argv[2], sys.argv[3:]
process = initialise()
shards = ShardSet.open(ROOT / "shards/bundled/qm9-spectra/heldout")
for run, (dtype, stage) in RUNS.items():
    for objective in denoising:
        settings = [*SMALL, f"objectives.{objective}={{}}", f"engine.zero_stage={stage}"]
        loaded = config.load(ROOT / "configs/quickstart.yaml", settings)
        torch.manual_seed(0)
        module = Pretraining(loaded.model, loaded.objectives).to(dtype)
        engine = Engine(
            module,
            loaded.engine,
            loaded.schedule,
            steps=10,
            accumulation=len(sizes) // process.world_size,
            takes_forces=module.takes_forces,
        )
        records = map(bonded, shards.records(range(sum(sizes))))
        batches = [MoleculeBatch.from_records([next(records) for _ in range(size)]).to(dtype) for size in sizes]
        own = [batch.broadened(loaded.data.line_shapes) for batch in batches[process.rank :: process.world_size]]
        accumulate(engine, module, own, Keyed(0, 0))
        gradients = engine.gradients()
        if process.rank == 0:
            gradients = {name: gradient.contiguous() for name, gradient in gradients.items()}
            safetensors.torch.save_file(gradients, f"{out}-{objective}-{run}.safetensors")
