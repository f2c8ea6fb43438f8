"""Which record comes when: a pure function of (seed, epoch), the same for any number of ranks.

The blocks of an epoch are put in a keyed order. Their records, one after another, are the epoch's sequence, of which
each lane owns an even share. A lane shuffles its records within windows of blocks. Lanes are fixed in number for a
run; ranks and loader workers only decide who serves which lane.
"""

import numpy as np
import torch

from mspt.data import keyed


def permutation(count, *key):
    """A permutation of range(count) fixed by key, the same with any version of any library."""
    words = keyed.mix(torch.tensor(keyed.word(*key)), torch.arange(count))
    return torch.argsort(words, stable=True).numpy()


class EpochOrder:
    """The order of one epoch. Costs a sort of the blocks, not of the records; lanes are cut from it one by one.

    block_records [B]: how many records each block holds.
    """

    def __init__(self, block_records, seed, epoch):
        self.seed, self.epoch = seed, epoch
        self.blocks = permutation(len(block_records), seed, epoch, "blocks")
        self.starts = np.concatenate([[0], np.cumsum(block_records[self.blocks], dtype=np.int64)])

    def pieces(self, lane, lanes):
        """A lane's share: (block, first row, row after the last) of each block it reads, in order.

        The shares of an epoch's lanes differ by at most one record.
        """
        total = int(self.starts[-1])
        begin, end = lane * total // lanes, (lane + 1) * total // lanes
        # Every block holds a record or more, so starts are distinct.
        first = int(np.searchsorted(self.starts, begin, side="right")) - 1
        last = int(np.searchsorted(self.starts, end, side="left"))
        bounds = np.clip(self.starts[first : last + 1], begin, end) if begin < end else []
        return [
            (int(self.blocks[at]), int(low - self.starts[at]), int(high - self.starts[at]))
            for at, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True), first)
        ]

    def lane(self, lane, lanes, window):
        """A lane's records in the order in which they are seen: blocks [k], rows [k] and windows [k].

        window: how many blocks are shuffled together; a reader needs to hold no more than two windows at once.
        """
        pieces, parts = self.pieces(lane, lanes), []
        for number, start in enumerate(range(0, len(pieces), window)):
            chosen = pieces[start : start + window]
            block = np.concatenate([np.full(stop - first, b) for b, first, stop in chosen])
            row = np.concatenate([np.arange(first, stop) for _, first, stop in chosen])
            order = permutation(len(block), self.seed, self.epoch, "window", lane, number)
            parts.append((block[order], row[order], np.full(len(block), number)))
        if not parts:
            return (np.zeros(0, np.int64),) * 3
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))
