"""What a step sends, how long that takes and what a rank must hold, by formula. Nothing happens when this is run.

As mspt.training.engine sets DeepSpeed up: gradients travel in float32, nothing is hidden behind computation.

Legend: P parameters, N ranks, A micro-batches a rank and step, w bytes of a working weight (4 in fp32, 2 in bf16),
S bytes of a whole tensor that is reduced or gathered.
"""

import math
from dataclasses import dataclass

import numpy as np

from mspt.training.engine import BUCKET

# Parameters of at most so many elements stay whole between the micro-batches of a step at ZeRO 3, as DeepSpeed has it.
PERSISTENT = 100_000
# How often the weights are gathered for a micro-batch at ZeRO 3, by its forward passes: forwards and for the way back;
# after a pass for the embeddings alone, what DeepSpeed fetches ahead is what the other pass would need next.
GATHERS = {1: 2, 2: 5}


@dataclass(frozen=True)
class Model:
    """parameters: the number of elements of each; precision: fp32 or bf16; ema: a moving average is kept.

    embedding: width of the embeddings that contrast gathers, 0 where it does not. passes: forward passes that need the
    weights, two with negatives from the whole global batch. layers: of the encoder.
    """

    parameters: tuple[int, ...]
    layers: int
    precision: str = "fp32"
    ema: bool = False
    embedding: int = 0
    passes: int = 1

    @property
    def total(self):
        return sum(self.parameters)

    @property
    def width(self):
        return 2 if self.precision == "bf16" else 4


@dataclass(frozen=True)
class Message:
    """So many calls of a collective that reduce or gather so many bytes together."""

    collective: str
    size: float
    calls: int


def messages(model, stage, ranks, micro_batches=1, molecules=0):
    """The Messages of one step. molecules: of a micro-batch.

    Left out are sums of a few numbers. DeepSpeed reduces at ZeRO 1 and 2 by an all-reduce of whole buckets, at 2 and 3
    after every micro-batch.
    """
    total, weight = model.total, model.width
    found = []
    if model.embedding and ranks > 1:
        # Twice an embedding and a sum of float32, once a name of 64 bits.
        rows = ranks * molecules * (2 * (model.embedding + 1) * 4 + 8)
        found.append(Message("all_gather", micro_batches * rows, 5 * micro_batches))
    if stage == 0:
        return [*found, Message("all_reduce", 4 * total, 1)]
    buckets = math.ceil(total / BUCKET)
    if stage < 3:
        reductions = micro_batches if stage == 2 else 1
        found.append(Message("all_reduce", 4 * total * reductions, 2 * buckets * reductions))
        return [*found, Message("all_gather", weight * total, 2)]
    large = sum(count for count in model.parameters if count > PERSISTENT)
    gathers = GATHERS[model.passes] * micro_batches
    gathered = gathers * large + (gathers - micro_batches + 1) * (total - large)
    return [
        *found,
        # One call a submodule that has parameters of its own, as counted at the published size.
        Message("all_gather", weight * gathered, gathers * 6 * model.layers),
        Message("reduce_scatter", 4 * total * micro_batches, buckets * micro_batches),
    ]


def sent(message, ranks):
    """Bytes that each rank sends for it on a ring."""
    part = (ranks - 1) / ranks * message.size
    return 2 * part if message.collective == "all_reduce" else part


@dataclass(frozen=True)
class Interconnect:
    """The α-β model of an interconnect: seconds a step of a ring, and bytes a second that a rank can send.

    Within a node of so many ranks, and between nodes: (within, between). tree: seconds a step of a tree, which NCCL
    takes for an all-reduce where that is faster; None where there are rings alone.
    """

    name: str
    node: int
    ring: tuple[float, float]
    rate: tuple[float, float]
    tree: tuple[float, float] | None = None

    def seconds(self, message, ranks):
        """Time of a Message over so many ranks, whose nodes are full."""
        if ranks == 1:
            return 0.0
        nodes = math.ceil(ranks / self.node)
        between = nodes - 1
        latency = (ranks - 1 - between) * self.ring[0] + between * self.ring[1]
        if message.collective == "all_reduce":
            latency *= 2
            if self.tree and nodes > 1:
                inside = min(ranks, self.node) - 1
                latency = min(latency, 2 * (inside * self.tree[0] + math.log2(nodes) * self.tree[1]))
        return message.calls * latency + sent(message, ranks) / self.rate[nodes > 1]


def fit(sizes, seconds, ranks, collective):
    """Least squares, relative, of α and β in seconds of one collective over sizes in bytes -> (α, bytes a second)."""
    steps = (2 if collective == "all_reduce" else 1) * (ranks - 1)
    rows = np.array([[steps, sent(Message(collective, size, 1), ranks)] for size in sizes], float)
    seconds = np.array(seconds)
    (alpha, inverse), *_ = np.linalg.lstsq(rows / seconds[:, None], np.ones(len(sizes)), rcond=None)
    return max(float(alpha), 0.0), 1 / float(inverse)


# Assumed, from public documents: NVLink 4 carries 900 GB/s both ways together and 8 GPUs make a node; each GPU has a
# 400 Gb/s port (NVIDIA, DGX H100 user guide). Latencies are those of NCCL's own cost model (src/graph/tuning.cc, hwLat,
# protocol Simple).
H100 = Interconnect("8 × H100 SXM a node, NVLink 4, NDR InfiniBand", 8, (3.4e-6, 9.6e-6), (450e9, 50e9), (28e-6, 50e-6))
# Dense rates of the data sheet, FLOP/s; fp32 without TF32.
H100_RATES = {"fp32": 67e12, "bf16": 989e12}


def memory(model, stage, ranks, offload=False):
    """Bytes that a rank holds at the peak of a step, without activations: name -> (bytes, "device" or "host").

    Host: where offload puts the optimiser's state; on a CPU they are one memory.
    """
    total, weight, bf16 = model.total, model.width, model.precision == "bf16"
    stage = max(1, stage) if bf16 else stage
    own = total if stage == 0 else total / ranks
    place = "host" if offload else "device"
    parts = {"moments": (8 * own, place), "moving average": (4 * own * model.ema, place)}
    if stage == 0:
        parts |= {"weights": (4 * total, "device"), "gradients": (4 * total, "device")}
        parts["buckets"] = 4 * total * (ranks > 1), "device"
    elif stage < 3:
        parts |= {"weights": (weight * total, "device"), "masters": (4 * own, place)}
        if stage == 2 or offload:  # gradients go from a bucket to the rank that owns them
            parts["buckets"] = 4 * min(total, BUCKET), "device"
            parts["own gradients"] = 4 * own, "device"
        elif bf16:
            parts["gradients"] = (4 + weight) * total, "device"
        else:
            parts |= {"gradients": (4 * total, "device"), "own gradients": (4 * own, "device")}
        parts["gradients for the optimiser"] = 8 * own * offload, "host"
    else:
        parts |= {"weights": (weight * own, "device"), "masters": (4 * own * (bf16 or offload), place)}
        parts["own gradients"] = 4 * own, place
        parts["gradients for the optimiser"] = 4 * (own if offload else min(own, BUCKET)), place
        parts["gathered weights"] = weight * min(total, BUCKET) * (ranks > 1), "device"
        parts["buckets"] = 2 * 4 * min(total, BUCKET), "device"
    return {name: part for name, part in parts.items() if part[0]}
