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


def lane_pieces(block_records, seed, epoch, lane, lanes):
    """A lane's share of an epoch: (block, first row, row after the last) of each block it reads, in order.

    block_records [B]: how many records each block holds. Shares differ by at most one record.
    """
    order = permutation(len(block_records), seed, epoch, "blocks")
    ends = np.cumsum(block_records[order])
    total = int(ends[-1]) if len(ends) else 0
    begin, end = lane * total // lanes, (lane + 1) * total // lanes
    if begin == end:
        return []
    chosen = range(int(np.searchsorted(ends, begin, side="right")), int(np.searchsorted(ends, end, side="left")) + 1)
    pieces = []
    for position in chosen:
        block = int(order[position])
        start = int(ends[position]) - int(block_records[block])
        pieces.append((block, max(begin - start, 0), min(end - start, int(block_records[block]))))
    return pieces


def lane_order(block_records, seed, epoch, lane, lanes, window):
    """A lane's records in the order in which they are seen: blocks [k], rows [k] and windows [k].

    window: how many blocks are shuffled together; a reader needs to hold no more than two windows at once.
    """
    pieces = lane_pieces(block_records, seed, epoch, lane, lanes)
    parts = []
    for number, start in enumerate(range(0, len(pieces), window)):
        chosen = pieces[start : start + window]
        block = np.concatenate([np.full(last - first, b) for b, first, last in chosen])
        row = np.concatenate([np.arange(first, last) for _, first, last in chosen])
        order = permutation(len(block), seed, epoch, "window", lane, number)
        parts.append((block[order], row[order], np.full(len(block), number)))
    if not parts:
        return (np.zeros(0, np.int64),) * 3
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))
