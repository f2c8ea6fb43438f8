"""What the workers train: a small regression whose global batch is the same however it is cut."""

import torch
from torch import nn

from mspt.training.engine import EngineSettings
from mspt.training.schedule import ScheduleSettings

BATCH, STEPS = 12, 15
SCHEDULE = ScheduleSettings(kind="cosine", warmup=3, peak=0.02, final=0.001)


class Tiny(nn.Module):
    """forward(numbers [n], x [n, 5], y [n]) -> sum of squared errors. Odd sizes, so that shards have padding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 33)
        self.first = nn.Linear(5, 33)
        self.norm = nn.LayerNorm(33)
        self.second = nn.Linear(33, 33)
        self.out = nn.Linear(33, 1)
        self.register_buffer("offset", torch.tensor([0.25]))

    def forward(self, numbers, x, y):
        dtype = self.first.weight.dtype
        h = torch.tanh(self.norm(self.first(x.to(dtype)) + self.embedding(numbers)))
        h = h + torch.tanh(self.second(h))
        return (self.out(h)[:, 0].to(y.dtype) + self.offset - y).square().sum()


def settings(**changes):
    return EngineSettings(**({"clip": 0.5, "weight_decay": 0.1, "betas": (0.9, 0.99), "ema_decay": 0.9} | changes))


def global_batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    numbers = torch.randint(0, 7, (BATCH,), generator=generator)
    x = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64)
    return numbers, x.to(dtype), (x.sin().sum(1) + 0.1 * numbers).to(dtype)


def micro_batches(step, rank, world_size, accumulation, dtype=torch.float32):
    """This rank's uneven cuts of the step's batch."""
    batch, cuts = global_batch(step, dtype), world_size * accumulation
    # Micro-batch i has i + 1 molecules, the last the rest.
    starts = [i * (i + 1) // 2 for i in range(cuts)] + [BATCH]
    for index in range(rank, cuts, world_size):
        yield [part[starts[index] : starts[index + 1]] for part in batch]


def parse(run):
    """STAGE-PRECISION-DTYPE[-offload] -> (engine settings, dtype of the module)."""
    stage, precision, dtype, *offload = run.split("-")
    return settings(zero_stage=int(stage), precision=precision, offload=bool(offload)), getattr(torch, dtype)
