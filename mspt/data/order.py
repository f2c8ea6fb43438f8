"""Which record comes when: a pure function of (seed, epoch), the same for any number of ranks.

Each set has an endless sequence of records: its passes one after another, each with the blocks in a keyed order. An
epoch of a run takes the sequence's next stretch; of a single set, exactly one pass. Each lane owns a share of the
stretch, equal in work, and shuffles it within windows of blocks. Lanes are fixed in number for a run; ranks and loader
workers only decide who serves which lane.
"""

from dataclasses import dataclass

import numpy as np

from mspt.data import keyed
from mspt.data.gather import library


def permutation(count, *key):
    """A permutation of range(count) fixed by key, the same with any version of any library."""
    # A mix of distinct numbers is distinct, so that the order does not depend on how a sort treats equals.
    return np.argsort(keyed.mix(np.int64(keyed.word(*key)), np.arange(count)))


def shares(total, weights):
    """total dealt out by weights: whole numbers [s] that add up to it, each within 1 of its exact share."""
    exact = total * np.asarray(weights, np.float64) / np.sum(weights)
    counts = np.floor(exact).astype(np.int64)
    # What is left goes to the largest remainders; between equal ones to the first.
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts


def _shuffle(bounds, keys):
    """Every window bounds[w] to bounds[w + 1] permuted by its key, end to end."""
    order, compiled = np.empty(bounds[-1], np.int64), library()
    if compiled is None:
        for first, last, key in zip(bounds[:-1], bounds[1:], keys, strict=True):
            order[first:last] = first + permutation(last - first, *key)
        return order
    states = np.array([keyed.word(*key) for key in keys], np.int64)
    room = np.empty(4 * int(np.diff(bounds).max(initial=0)) + 2, np.int64)
    compiled.shuffle(*(array.ctypes.data for array in (states, bounds)), len(keys), order.ctypes.data, room.ctypes.data)
    return order


class Sequence:
    """The endless sequence of one set. block_records [B]: how many records each block holds; block_work [B]: what part
    of a micro-batch they take; key: of its order.

    A pass costs a sort of the blocks, not of the records.
    """

    def __init__(self, block_records, block_work, *key):
        self.block_records, self.block_work, self.key = np.asarray(block_records), np.asarray(block_work), key
        self.records = int(self.block_records.sum(dtype=np.int64))
        self.passes = {}

    def _pass(self, number):
        """The blocks of a pass in order, and how many records and how much work lie before each [B + 1]."""
        if number not in self.passes:
            blocks = permutation(len(self.block_records), *self.key, number, "blocks")
            starts = np.concatenate([[0], np.cumsum(self.block_records[blocks], dtype=np.int64)])
            work = np.concatenate([[0.0], np.cumsum(self.block_work[blocks], dtype=np.float64)])
            # A stretch touches neighbouring passes only; the ones before are done with.
            self.passes = {n: kept for n, kept in self.passes.items() if n >= number - 1}
            self.passes[number] = (blocks, starts, work)
        return self.passes[number]

    def bounds(self, begin, end, lanes):
        """Where the stretch begin to end is cut for lanes of equal work [lanes + 1]; within a block, as if all its
        records took the same.
        """
        if begin == end:
            return np.full(lanes + 1, begin)
        places, works, done = [], [], 0.0
        for number in range(begin // self.records, -(-end // self.records)):
            _, starts, work = self._pass(number)
            places.append(starts + number * self.records)
            works.append(work + done)
            done += work[-1]
        places, works = np.concatenate(places), np.concatenate(works)
        first, last = np.interp([begin, end], places, works)
        cuts = np.interp(np.linspace(first, last, lanes + 1), works, places)
        # Rounding must not move the ends.
        return np.concatenate([[begin], np.rint(cuts[1:-1]).astype(np.int64), [end]])

    def pieces(self, begin, end):
        """The stretch begin to end: (pass, block, first row, row after the last) of each block it reads, int64 [p, 4].

        Blocks that hold no record are left out.
        """
        parts = [np.zeros((0, 4), np.int64)]
        # An empty stretch may lie within a block, or where many blocks of a selection begin that hold none of it.
        passes = range(begin // self.records, -(-end // self.records)) if begin < end else ()
        for number in passes:
            blocks, starts, _ = self._pass(number)
            low, high = max(begin - number * self.records, 0), min(end - number * self.records, self.records)
            first, last = np.searchsorted(starts, low, side="right") - 1, np.searchsorted(starts, high, side="left")
            bounds, own = np.clip(starts[first : last + 1], low, high), starts[first:last]
            part = [np.full(last - first, number), blocks[first:last], bounds[:-1] - own, bounds[1:] - own]
            parts.append(np.stack(part, 1))
        pieces = np.concatenate(parts)
        return pieces[pieces[:, 2] < pieces[:, 3]]


@dataclass(frozen=True)
class LaneOrder:
    """The records of a lane in the order in which they are seen.

    sets, passes, blocks [p]: of each piece, the part of a block that is read for them. pieces, rows, int32 [k]: of each
    record, the piece it comes from and its row in the block.
    """

    sets: np.ndarray
    passes: np.ndarray
    blocks: np.ndarray
    pieces: np.ndarray
    rows: np.ndarray


class EpochOrder:
    """The order of one epoch over sequences by weights; lanes are cut from it one by one.

    An epoch has as many records as all sets together, dealt out by weight, so that of a single set it is one pass.
    """

    def __init__(self, sequences, weights, seed, epoch):
        self.sequences, self.seed, self.epoch, self.cuts = sequences, seed, epoch, {}
        self.counts = shares(sum(sequence.records for sequence in sequences), weights).tolist()

    def lane(self, lane, lanes, window):
        """A lane's LaneOrder.

        window: how many blocks are shuffled together; a reader needs to hold no more than two windows of each set.
        """
        parts = [self._share(number, lane, lanes, window) for number in range(len(self.sequences))]
        tables, pieces, rows = zip(*parts, strict=True)
        shift = np.cumsum([0, *map(len, tables)])
        pieces = np.concatenate([own + first for own, first in zip(pieces, shift, strict=False)])
        rows = np.concatenate(rows)
        if len(parts) > 1:
            # Record j of a set's k stands near (j + ½)/k of the lane, so that any stretch of it is mixed by weight.
            places = [self._places(number, lane, len(own)) for number, (_, own, _) in enumerate(parts)]
            order = np.argsort(np.concatenate(places), kind="stable")
            pieces, rows = pieces[order], rows[order]
        table = np.concatenate(tables)
        sets = np.repeat(np.arange(len(tables)), [len(own) for own in tables])
        return LaneOrder(sets, table[:, 0], table[:, 1], pieces.astype(np.int32), rows.astype(np.int32))

    def _share(self, number, lane, lanes, window):
        """A lane's part of one set's stretch: its pieces [p, 4], and of each record in order the piece and the row."""
        count, begin = self.counts[number], self.epoch * self.counts[number]
        bounds = self._bounds(number, begin, begin + count, lanes)
        table = self.sequences[number].pieces(*bounds[lane : lane + 2].tolist())
        lengths = table[:, 3] - table[:, 2]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        piece = np.repeat(np.arange(len(table)), lengths)
        row = np.arange(starts[-1]) - np.repeat(starts[:-1] - table[:, 2], lengths)
        bounds = starts[[*range(0, len(table), window), len(table)]]
        keys = [(self.seed, self.epoch, "window", number, lane, at) for at in range(len(bounds) - 1)]
        order = _shuffle(bounds, keys)
        return table, piece[order], row[order]

    def _bounds(self, number, begin, end, lanes):
        """The cuts of one set's stretch, worked out once for all lanes."""
        if (number, lanes) not in self.cuts:
            self.cuts[number, lanes] = self.sequences[number].bounds(begin, end, lanes)
        return self.cuts[number, lanes]

    def _places(self, number, lane, count):
        """Where in the lane, from 0 to 1, the records of one set stand: in order, evenly but for a keyed jitter."""
        words = keyed.mix(np.int64(keyed.word(self.seed, self.epoch, "places", number, lane)), np.arange(count))
        return (np.arange(count) + (words & 0xFFFF) / 65536) / max(count, 1)
