"""One rank of a step over a fixed global batch; rank 0 writes the gradient of every parameter.

    gradients.py CONFIG BATCH_CUTS OUT PRECISION   (BATCH_CUTS: how many micro-batches in all)
"""

import sys
from types import SimpleNamespace

import safetensors.torch
import torch

from mspt import config
from mspt.data.batch import MoleculeBatch
from mspt.data.keyed import Keyed
from mspt.data.shardset import ShardSet
from mspt.objectives import Pretraining
from mspt.training.engine import Engine, initialise
from mspt.training.trainer import Trainer

path, micro_batches, out, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3], getattr(torch, sys.argv[4])
loaded = config.load(path)
process = initialise()
torch.manual_seed(0)
module = Pretraining(loaded.model, loaded.objectives).to(dtype)
per_rank = micro_batches // process.world_size
engine = Engine(module, loaded.engine, loaded.schedule, steps=10, accumulation=per_rank)
records = list(ShardSet.open(loaded.data.train).records(range(11)))
# Uneven on purpose, as packed micro-batches are: with four cuts 1, 2, 3 and 5 molecules.
cuts = {1: [11], 4: [1, 2, 3, 5]}[micro_batches]
starts = [sum(cuts[:i]) for i in range(len(cuts))]
own = range(process.rank, micro_batches, process.world_size)
batches = [MoleculeBatch.from_records(records[starts[i] : starts[i] + cuts[i]]) for i in own]
trainer = SimpleNamespace(module=module, engine=engine, process=process)
trainer.line_shapes = loaded.data.line_shapes
generator = Keyed(loaded.seed, 0)
Trainer.accumulate(trainer, [batch.broadened(loaded.data.line_shapes).to(dtype) for batch in batches], generator)
gradients = engine.gradients()
if process.rank == 0:
    safetensors.torch.save_file({name: gradient.contiguous() for name, gradient in gradients.items()}, out)
