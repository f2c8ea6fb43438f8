"""One rank of the gradient of a fixed global batch; rank 0 writes it, parameter by parameter.

gradients.py CONFIG SHARDS MICRO_BATCHES DTYPE OUT
"""

import sys

import safetensors.torch
import torch

from mspt import config
from mspt.data.batch import MoleculeBatch
from mspt.data.keyed import Keyed
from mspt.data.shardset import ShardSet
from mspt.objectives import Pretraining
from mspt.training.engine import Engine, initialise
from mspt.training.trainer import accumulate

path, shards, micro_batches, dtype, out, *overrides = sys.argv[1:]
loaded = config.load(path, overrides)
# Uneven on purpose, as packed micro-batches are; and one that is empty, as at the end of an epoch.
sizes = {"1": [11], "4": [1, 0, 7, 3]}[micro_batches]
process = initialise()
torch.manual_seed(0)
module = Pretraining(loaded.model, loaded.objectives).to(getattr(torch, dtype))
engine = Engine(module, loaded.engine, loaded.schedule, steps=10, accumulation=len(sizes) // process.world_size)
records = list(ShardSet.open(shards).records(range(sum(sizes))))
batches, at = [], 0
for size in sizes:
    batch = MoleculeBatch.from_records(records[at : at + size]).to(getattr(torch, dtype))
    batches.append(batch.broadened(loaded.data.line_shapes))
    at += size
means = accumulate(engine, module, batches[process.rank :: process.world_size], Keyed(0, 0))
gradients = engine.gradients()
if process.rank == 0:
    gradients["means"] = torch.tensor(list(means.values()), dtype=torch.float64)
    safetensors.torch.save_file({name: gradient.contiguous() for name, gradient in gradients.items()}, out)
