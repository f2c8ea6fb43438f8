"""From a shard set to this rank's micro-batches, step by step, from any position.

Step t of an epoch, its global batch, is the t-th micro-batch of every lane. Rank r of R serves the lanes r, r + R, …
The position in the data is {"epoch": e, "step": t}: with the seed and the lanes it fixes every batch to come, for any
number of ranks that divides the lanes and any number of loader workers.
"""

from functools import partial
from typing import Literal

import numpy as np
import torch
import webdataset
from pydantic import Field, field_validator
from torch.utils.data import DataLoader, get_worker_info

from mspt.chemistry.spectra import LINE_SHAPES, SPECTRA, LineShape
from mspt.data import block as blocks
from mspt.data import order, packing
from mspt.data.batch import MoleculeBatch
from mspt.errors import UserError
from mspt.settings import Settings


class DataSettings(Settings):
    """train, heldout: folders of shard sets. lanes: fixed streams that the set is dealt to; each gives one micro-batch
    a step, so a rank accumulates lanes / ranks of them. workers: loader processes a rank; 0 loads in the trainer.
    window: blocks that are shuffled together. budget: of one micro-batch. line_shapes: how lines become spectra; what
    is not named keeps its default.
    """

    train: str
    heldout: str | None = None
    lanes: int = Field(ge=1)
    workers: int = Field(0, ge=0)
    window: int = Field(16, ge=1)
    budget: packing.Budget
    line_shapes: dict[Literal[SPECTRA], LineShape] = LINE_SHAPES

    @field_validator("line_shapes")
    @classmethod
    def _completed(cls, line_shapes):
        return LINE_SHAPES | line_shapes


class Lane:
    """One lane in one epoch (an EpochOrder): the order of its records and the cuts of its micro-batches."""

    def __init__(self, shardset, settings, epoch_order, lane):
        self.shardset = shardset
        self.blocks, self.rows, self.windows = epoch_order.lane(lane, settings.lanes, settings.window)
        self.starts = packing.cut(shardset.atoms[shardset.first[self.blocks] + self.rows], settings.budget)

    def __len__(self):
        """The number of its micro-batches."""
        return len(self.starts) - 1

    def batches(self, start, stop):
        """Yield micro-batches start to stop; empty ones past the lane's end. Each block is read once."""
        held = {}
        for step in range(start, stop):
            if step >= len(self):
                yield MoleculeBatch.empty()
                continue
            own = slice(self.starts[step], self.starts[step + 1])
            needed, inverse = np.unique(self.blocks[own], return_inverse=True)
            # What lies in a window before this micro-batch's first is done with.
            first = self.windows[own].min()
            held = {number: item for number, item in held.items() if item[0] >= first}
            for number, window in zip(self.blocks[own], self.windows[own], strict=True):
                if number not in held:
                    held[number] = (window, blocks.decode(self.shardset.read(number)))
            yield _gather([held[number][1] for number in needed], inverse, self.rows[own])


def _gather(parts, inverse, rows):
    """Rows of parts, row i from parts[inverse[i]], in this order."""
    by_part = np.argsort(inverse, kind="stable")
    pieces = [(part, rows[inverse == i]) for i, part in enumerate(parts)]
    back = np.empty(len(rows), np.int64)
    back[by_part] = np.arange(len(rows))
    return MoleculeBatch.from_blocks(pieces, back)


class Stream:
    """This rank's part of the training data.

    Raises UserError where the ranks do not divide the lanes or a molecule is over the budget.
    """

    def __init__(self, shardset, settings, seed, rank=0, world_size=1):
        if settings.lanes % world_size:
            divisors = [d for d in range(1, settings.lanes + 1) if settings.lanes % d == 0]
            raise UserError(
                f"data.lanes is {settings.lanes}, which {world_size} ranks do not divide; run on "
                f"{', '.join(map(str, divisors))} ranks, or start a new run with data.lanes a multiple of {world_size}"
            )
        packing.check(shardset.manifest["largest"], settings.budget, shardset.folder)
        self.shardset, self.settings, self.seed = shardset, settings, seed
        self.lanes = range(rank, settings.lanes, world_size)
        # A worker serves whole lanes, so that no block is read twice: as many as divide the lanes evenly.
        self.workers = max((w for w in range(1, settings.workers + 1) if len(self.lanes) % w == 0), default=0)
        self.planned = (None, [])

    def _plan(self, epoch):
        """This rank's lanes in an epoch, worked out once."""
        if self.planned[0] != epoch:
            epoch_order = order.EpochOrder(self.shardset.block_records, self.seed, epoch)
            lanes = [Lane(self.shardset, self.settings, epoch_order, lane) for lane in self.lanes]
            self.planned = (epoch, lanes)
        return self.planned[1]

    def steps(self, epoch):
        """How many steps this rank's lanes need for an epoch; the epoch has the most that any rank's need."""
        return max(map(len, self._plan(epoch)))

    def batches(self, epoch, start, stop):
        """Yield, for each of the steps start to stop, the list of this rank's micro-batches, one a lane."""
        pipeline = webdataset.DataPipeline(partial(_serve, self._plan(epoch), start, stop))
        loader = DataLoader(
            pipeline,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            # Of its own, so that how often a run was resumed does not show in torch's global random state.
            generator=torch.Generator(),
        )
        served = iter(loader)
        for _ in range(start, stop):
            yield [_unwrap(next(served)) for _ in self.lanes]


def _serve(lanes, start, stop):
    """The micro-batches of this process's lanes, step by step; the loader takes them from its workers in turn.

    A UserError is passed on as it is: raised in a worker, it would come out as a traceback of many lines.
    """
    info = get_worker_info()
    own = lanes[info.id :: info.num_workers] if info else lanes
    streams = [lane.batches(start, stop) for lane in own]
    try:
        for _ in range(start, stop):
            for stream in streams:
                yield next(stream)
    except UserError as error:
        yield error


def _unwrap(served):
    if isinstance(served, UserError):
        raise served
    return served


def sequential(shardset, budget):
    """Yield all records of a set in the order in which they lie there, in micro-batches under budget."""
    packing.check(shardset.manifest["largest"], budget, shardset.folder)
    starts = packing.cut(shardset.atoms, budget)
    block = np.repeat(np.arange(len(shardset.block_records)), shardset.block_records)
    row = np.arange(len(shardset)) - shardset.first[block]
    held = {}
    for begin, end in zip(starts[:-1], starts[1:], strict=True):
        needed, inverse = np.unique(block[begin:end], return_inverse=True)
        held = {n: held[n] if n in held else blocks.decode(shardset.read(n)) for n in needed}
        yield _gather([held[n] for n in needed], inverse, row[begin:end])
