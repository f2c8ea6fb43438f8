"""From shard sets to this rank's micro-batches, step by step, from any position.

Step t of an epoch, its global batch, is the t-th micro-batch of every lane. Rank r of R serves the lanes r, r + R, …
The position in the data is {"epoch": e, "step": t}: with the seed and the lanes it fixes every batch to come, for any
number of ranks that divides the lanes and any number of loader workers.
"""

import logging
import os
import signal
import threading
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import webdataset
from pydantic import Field, field_validator, model_validator
from torch.utils.data import DataLoader, get_worker_info

from mspt.chemistry.spectra import LINE_SHAPES, SPECTRA, LineShape
from mspt.data import keyed, order, packing
from mspt.data.batch import MoleculeBatch
from mspt.data.block import DamagedBlock, DamagedRows
from mspt.data.gather import Held
from mspt.data.shardset import BadBlock, ShardSet
from mspt.data.store import StoreSettings
from mspt.errors import UserError
from mspt.settings import Settings

log = logging.getLogger("mspt")


class Part(Settings):
    """One shard set of a mixture. weight: its share of the records of an epoch, beside the other weights."""

    path: str
    weight: float = Field(gt=0)


class Split(Settings):
    """A set in three parts by an order that seed fixes: the first `train` records to train on, the next `validation` to
    choose by, the rest is held out.
    """

    train: int = Field(ge=1)
    validation: int = Field(0, ge=0)
    seed: int = Field(0, ge=0)

    def numbers(self, shardset, part):
        """The numbers of a part's records in that order. part: train, validation or heldout. Raises UserError where
        the set has fewer records than train and validation together.
        """
        ends = {"train": (0, self.train), "validation": (self.train, self.train + self.validation)}
        begin, end = ends.get(part, (self.train + self.validation, len(shardset)))
        if self.train + self.validation > len(shardset):
            raise UserError(
                f"data.split takes {self.train} and {self.validation} records, but {shardset.folder} has "
                f"{len(shardset)}; lower data.split.train"
            )
        return order.permutation(len(shardset), "split", self.seed)[begin:end]


class DataSettings(Settings):
    """train: the folder or URL of a shard set; or mixture: several with weights. heldout: of another, to measure on at
    the end. validation: of another, to measure on meanwhile (evaluation). split: cut out of train what is not given of
    these. limit: train on the first so many records in the order of split's seed (0 without a split): those of a
    smaller limit are among those of a larger one.

    lanes: fixed streams that the data is dealt to; each gives one micro-batch a step, so a rank accumulates lanes /
    ranks of them. workers: loader processes a rank; 0 loads in the trainer. window: blocks that are shuffled together.
    budget: of one micro-batch. store: how sets behind URLs are read. on_bad_block: stop at a damaged block, or leave
    its records out. line_shapes: how lines become spectra; what is not named keeps its default. spectra: those that are
    used; others count as missing.
    """

    train: str | None = None
    mixture: tuple[Part, ...] = ()
    heldout: str | None = None
    validation: str | None = None
    split: Split | None = None
    limit: int | None = Field(None, ge=1)
    lanes: int = Field(ge=1)
    workers: int = Field(0, ge=0)
    window: int = Field(16, ge=1)
    budget: packing.Budget
    store: StoreSettings = StoreSettings()
    on_bad_block: Literal["error", "skip"] = "error"
    line_shapes: dict[Literal[SPECTRA], LineShape] = LINE_SHAPES
    spectra: tuple[Literal[SPECTRA], ...] = SPECTRA

    @field_validator("line_shapes")
    @classmethod
    def _completed(cls, line_shapes):
        return LINE_SHAPES | line_shapes

    @model_validator(mode="after")
    def _one_source(self):
        if (self.train is None) == (not self.mixture):
            raise ValueError("give either train, one shard set, or mixture, a list of path and weight")
        if self.mixture and (self.split or self.limit):
            raise ValueError("split and limit choose among the records of train, one shard set; mixture has several")
        if self.split and self.validation:
            raise ValueError("split cuts the validation set out of train; leave data.validation out, or split")
        return self

    @property
    def parts(self):
        """The sets to train on, of which there may be one."""
        return self.mixture or (Part(path=self.train, weight=1.0),)

    def check_ranks(self, ranks):
        """Raise UserError where so many ranks do not divide the lanes."""
        if self.lanes % ranks:
            divisors = [d for d in range(1, self.lanes + 1) if self.lanes % d == 0]
            raise UserError(
                f"data.lanes is {self.lanes}, which {ranks} ranks do not divide; run on "
                f"{', '.join(map(str, divisors))} ranks, or start a new run with data.lanes a multiple of {ranks}"
            )

    def open(self):
        """The ShardSets of parts, with the records that split and limit leave to train on."""
        whole = [ShardSet.open(part.path, self.store) for part in self.parts]
        if self.split is None and self.limit is None:
            return whole
        (shardset,) = whole
        numbers = (self.split or Split(train=len(shardset))).numbers(shardset, "train")
        if self.limit is not None and self.limit > len(numbers):
            raise UserError(f"data.limit is {self.limit}, but there are {len(numbers)} records to train on; lower it")
        return [shardset.select(numbers[: self.limit])]

    def open_part(self, name):
        """The ShardSet of "validation" or "heldout"; None where there is none.

        Raises UserError where a molecule of it is over the budget.
        """
        path, cut = getattr(self, name), False
        if path is None and self.split:
            path, cut = self.train, True
        if path is None:
            return None
        shardset = ShardSet.open(path, self.store)
        if cut:
            shardset = shardset.select(self.split.numbers(shardset, name))
        packing.check(shardset.manifest["largest"], self.budget, path)
        return shardset if len(shardset) else None


class Lane:
    """One lane in one epoch (an EpochOrder): the order of its records and the cuts of its micro-batches.

    labels: names of the targets that the micro-batches carry, and whether they carry forces.
    """

    def __init__(self, shardsets, settings, epoch_order, lane, labels=((), False)):
        self.shardsets, self.settings, self.labels = shardsets, settings, labels
        self.order = epoch_order.lane(lane, settings.lanes, settings.window)
        pieces, self.rows = self.order.pieces, self.order.rows
        self.atoms = np.empty(len(pieces), np.int32)
        for number, shardset in enumerate(shardsets):
            own = self.order.sets[pieces] == number if len(shardsets) > 1 else slice(None)
            blocks = self.order.blocks[pieces[own]]
            records = shardset.first[blocks] + self.rows[own]
            self.atoms[own] = shardset.atoms[records]
            if shardset.chosen is not None:
                self.rows[own] = shardset.rows(records, blocks)
        self.starts = packing.cut(self.atoms, settings.budget)

    def __len__(self):
        """The number of its micro-batches."""
        return len(self.starts) - 1

    def batches(self, start, stop):
        """Yield micro-batches start to stop; empty ones past the lane's end. Each block is read once."""
        held, where = Held(*self.labels), np.full(len(self.order.blocks), -1, np.int32)
        lost = False  # a block is damaged and left out
        begin, end = self.starts[[min(start, len(self)), min(stop, len(self))]]
        uses, first, last = self.order.pieces[begin:end], np.full(len(where), end), np.full(len(where), -1)
        # Of several values that numpy is given for one place, the last one stays.
        last[uses] = np.arange(begin, end)
        first[uses[::-1]] = np.arange(end, begin, -1) - 1
        # The pieces in the order in which they are first needed, and in that in which they are done with.
        opening, closing = np.argsort(first).tolist(), np.argsort(last).tolist()
        first, last = np.sort(first).tolist(), np.sort(last).tolist()
        count = len(where)
        opened = closed = 0
        for step in range(start, stop):
            if step >= len(self):
                yield MoleculeBatch.empty()
                continue
            low, high = self.starts[step], self.starts[step + 1]
            while opened < count and first[opened] < high:
                slot = _hold(held, *self._block(opening[opened]), self.settings.on_bad_block)
                where[opening[opened]], lost = slot, lost or slot < 0
                opened += 1
            yield self._batch(held, where, slice(low, high), lost)
            while closed < count and last[closed] < high:
                if where[closing[closed]] >= 0:
                    held.drop(int(where[closing[closed]]))
                closed += 1

    def _block(self, piece):
        """The ShardSet and the number in it of the block that a piece is of."""
        return self.shardsets[self.order.sets[piece]], int(self.order.blocks[piece])

    def _batch(self, held, where, own, lost):
        """A stretch of the lane's records, without those whose blocks or spectra are damaged."""
        pieces, rows, atoms = self.order.pieces[own], self.rows[own], self.atoms[own]
        bad = self.settings.on_bad_block
        batch, kept = _whole(held, where[pieces], rows, atoms, pieces, self._block, lost, bad)
        missing = len(pieces) - len(batch.keys)
        if len(self.shardsets) > 1:
            # An epoch may pass over a small set several times: a record gets other noise each time.
            records = keyed.mix(batch.records, torch.from_numpy(self.order.passes[pieces[kept]]))
            batch = replace(batch, records=records)
        return replace(batch, missing=missing) if missing else batch


def _hold(held, shardset, number, on_bad_block):
    """Read a block -> its slot; -1 where it is damaged and to be left out. Raises BadBlock where it may not."""
    try:
        try:
            return held.put(shardset.view(number), int(shardset.head[number]))
        except DamagedBlock as error:
            raise shardset.bad(number, str(error)) from error
    except BadBlock as error:
        _leave_out(error, on_bad_block)
        return -1


def _leave_out(error, on_bad_block):
    """Say so of records that a BadBlock is about, or raise it where none may be left out."""
    if on_bad_block == "error":
        raise error
    log.warning("mspt: left out, as data.on_bad_block says: %s", error)


def _whole(held, slots, rows, atoms, pieces, block_of, lost, on_bad_block):
    """What is whole of the records at rows [m] of the blocks at slots [m], which have so many atoms [m].

    lost: whether a slot is -1, that of a block that is left out. pieces [m]: by which block_of tells a record's
    ShardSet and block. -> their MoleculeBatch, and what picks them out of the m. Raises BadBlock where none may be left
    out.
    """
    kept = np.flatnonzero(slots >= 0) if lost else slice(None)
    while True:
        try:
            return held.batch(slots[kept], rows[kept], int(atoms[kept].sum())), kept
        except DamagedRows as error:
            kept = np.arange(len(slots))[kept]
            damaged = pieces[kept[error.rows]]
            for piece in np.unique(damaged).tolist():
                shardset, number = block_of(piece)
                bad = shardset.bad(number, f"{error}, {np.sum(damaged == piece)} rows")
                _leave_out(bad, on_bad_block)
            kept = np.delete(kept, error.rows)


def sequences(shardsets, budget, seed):
    """The order.Sequence of each set."""
    works = [packing.work(each.block_records, each.block_atoms, budget) for each in shardsets]
    return [
        order.Sequence(each.block_records, work, seed, number)
        for number, (each, work) in enumerate(zip(shardsets, works, strict=True))
    ]


class Stream:
    """This rank's part of the training data. shardsets: one for each of settings.parts. labels: as Lane's.

    Raises UserError where the ranks do not divide the lanes or a molecule is over the budget.
    """

    def __init__(self, shardsets, settings, seed, rank=0, world_size=1, labels=((), False)):
        settings.check_ranks(world_size)
        for shardset in shardsets:
            packing.check(shardset.manifest["largest"], settings.budget, shardset.folder)
        self.shardsets, self.settings, self.seed, self.labels = shardsets, settings, seed, labels
        self.sequences = sequences(shardsets, settings.budget, seed)
        self.lanes = range(rank, settings.lanes, world_size)
        # A worker serves whole lanes, so that no block is read twice: as many as divide the lanes evenly.
        self.workers = max((w for w in range(1, settings.workers + 1) if len(self.lanes) % w == 0), default=0)
        self.planned = (None, [])

    def _plan(self, epoch):
        """This rank's lanes in an epoch, worked out once."""
        if self.planned[0] != epoch:
            weights = [part.weight for part in self.settings.parts]
            epoch_order = order.EpochOrder(self.sequences, weights, self.seed, epoch)
            lanes = [Lane(self.shardsets, self.settings, epoch_order, lane, self.labels) for lane in self.lanes]
            self.planned = (epoch, lanes)
        return self.planned[1]

    def steps(self, epoch):
        """How many steps this rank's lanes need for an epoch; the epoch has the most that any rank's need."""
        return max(map(len, self._plan(epoch)))

    def batches(self, epoch, start, stop):
        """Yield, for each of the steps start to stop, the list of this rank's micro-batches, one a lane."""
        pipeline = webdataset.DataPipeline(partial(_serve, self._plan(epoch), start, stop))
        if self.workers:
            # A generator of its own, so that how often a run was resumed does not show in torch's global random state.
            options = {"num_workers": self.workers, "prefetch_factor": 4, "generator": torch.Generator()}
            pipeline = DataLoader(pipeline, batch_size=None, worker_init_fn=_heed_the_trainer_alone, **options)
        served = iter(pipeline)
        for _ in range(start, stop):
            yield [_unwrap(next(served)) for _ in self.lanes]


def _heed_the_trainer_alone(_):
    """In a worker: signals to all processes of a job are for the trainer, which needs its data for one more step."""
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer():
    """Wait for a SIGTERM from the trainer itself, by which it ends workers that it leaves behind."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


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


def sequential(shardset, budget, targets=(), forces=False, on_bad_block="error"):
    """Yield all records of a set in the order in which they lie there, in micro-batches under budget.

    targets: names of those that the batches carry; forces: whether they carry forces. on_bad_block: of DataSettings.
    """
    packing.check(shardset.manifest["largest"], budget, shardset.folder)
    starts = packing.cut(shardset.atoms, budget).tolist()
    held, slots = Held(targets, forces), {}
    for begin, end in zip(starts[:-1], starts[1:], strict=True):
        number = np.arange(begin, end)
        block = np.searchsorted(shardset.first, number, side="right") - 1
        for done in [b for b in slots if b < block[0]]:
            if (slot := slots.pop(done)) >= 0:
                held.drop(slot)
        for b in np.unique(block).tolist():
            if b not in slots:
                slots[b] = _hold(held, shardset, b, on_bad_block)
        which = np.array([slots[b] for b in block.tolist()], np.int32)
        rows, atoms = shardset.rows(number, block), shardset.atoms[begin:end]
        yield _whole(held, which, rows, atoms, block, lambda b: (shardset, b), which.min() < 0, on_bad_block)[0]
