"""A global batch in several cuts, and its gradient as one rank of several finds it."""

import safetensors.torch
import torch

from mspt.data.batch import MoleculeBatch
from mspt.data.keyed import Keyed
from mspt.training.engine import Engine
from mspt.training.trainer import accumulate

# Uneven, as packed micro-batches are, and one that is empty, as at the end of an epoch.
SIZES = {1: [11], 4: [1, 0, 7, 3]}
# At ZeRO 3 last, as it patches torch.
RUNS = {"float64": (torch.float64, 0), "float32": (torch.float32, 2), "zero3": (torch.float32, 3)}


def write_gradients(module, loaded, records, sizes, process, dtype, path):
    """Rank 0 writes the gradient of module, of the configuration loaded, for records cut into sizes, by parameter."""
    engine = Engine(
        module,
        loaded.engine,
        loaded.schedule,
        steps=10,
        accumulation=len(sizes) // process.world_size,
        takes_forces=module.takes_forces,
    )
    batches = [MoleculeBatch.from_records([next(records) for _ in range(size)]).to(dtype) for size in sizes]
    own = [batch.broadened(loaded.data.line_shapes) for batch in batches[process.rank :: process.world_size]]
    accumulate(engine, module, own, Keyed(0, 0))
    gradients = engine.gradients()
    if process.rank == 0:
        safetensors.torch.save_file({name: gradient.contiguous() for name, gradient in gradients.items()}, path)
