"""The order of an epoch: complete, even over lanes, shuffled, a pure function of seed and epoch."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mspt.data.order import EpochOrder

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=40)


def records_of(order, block_records, lanes, window):
    """Per lane its records, as numbers in the set."""
    first = np.concatenate([[0], np.cumsum(block_records)])
    parts = [order.lane(lane, lanes, window) for lane in range(lanes)]
    return [(first[blocks] + rows).tolist() for blocks, rows, _ in parts]


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 99), st.integers(0, 9), st.integers(1, 12), st.integers(1, 6))
def test_every_record_once_and_even_lanes(counts, seed, epoch, lanes, window):
    counts = np.array(counts)
    order = EpochOrder(counts, seed, epoch)
    per_lane = records_of(order, counts, lanes, window)
    assert sorted(number for lane in per_lane for number in lane) == list(range(counts.sum()))
    lengths = [len(lane) for lane in per_lane]
    assert max(lengths) - min(lengths) <= 1
    assert per_lane == records_of(EpochOrder(counts, seed, epoch), counts, lanes, window)


@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(1, 5), st.integers(1, 6))
def test_a_window_is_read_once_and_in_turn(counts, lanes, window):
    """Windows come one after another, each of at most so many blocks, and no block is in two of them."""
    order = EpochOrder(np.array(counts), 0, 0)
    shared = 0
    for lane in range(lanes):
        blocks, _, windows = order.lane(lane, lanes, window)
        assert (np.diff(windows) >= 0).all()
        held = [set(blocks[windows == number].tolist()) for number in np.unique(windows)]
        assert all(1 <= len(own) <= window for own in held)
        assert sum(map(len, held)) == len(set(blocks.tolist()))
        shared += len(set(blocks.tolist()))
    # Only a block that a border between lanes cuts is read by two (or, if lanes are short, by more).
    assert shared <= len(counts) + lanes - 1


def test_it_shuffles_blocks_and_records_anew_every_epoch():
    counts = np.full(1000, 10)
    orders = [records_of(EpochOrder(counts, seed, epoch), counts, 1, 8)[0] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for number, order in enumerate(orders):
        assert order != sorted(order)
        # Ten neighbours of a window are of many blocks, and a window's blocks from all over the set.
        assert np.mean([len({n // 10 for n in order[i : i + 10]}) for i in range(0, 10_000, 10)]) > 4
        assert np.abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.15
        for other in orders[:number]:
            assert np.mean([a == b for a, b in zip(order, other, strict=True)]) < 0.05


def test_every_permutation_is_as_likely():
    """All 24 orders of four blocks over 4800 epochs: chi square of 23 degrees of freedom below its 1e-4 quantile."""
    counts = {}
    for epoch in range(4800):
        order = tuple(EpochOrder(np.ones(4, np.int64), 0, epoch).blocks.tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 56.3


def test_the_order_is_pinned():
    """Checkpoints carry a position in this order: whoever changes it must know that they do."""
    order = EpochOrder(np.array([3, 2, 4, 1, 3]), 0, 0)
    lanes = [order.lane(lane, 2, 2) for lane in range(2)]
    assert [list(zip(blocks.tolist(), rows.tolist(), strict=True)) for blocks, rows, _ in lanes] == [
        [(0, 0), (4, 2), (4, 0), (0, 2), (4, 1), (0, 1)],
        [(2, 1), (2, 3), (3, 0), (2, 2), (2, 0), (1, 1), (1, 0)],
    ]


def test_torch_random_state_is_left_alone():
    state = torch.random.get_rng_state()
    EpochOrder(np.ones(5, np.int64), 0, 0).lane(0, 1, 2)
    assert torch.equal(state, torch.random.get_rng_state())
