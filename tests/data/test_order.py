"""The order of an epoch: complete, even over lanes, shuffled, a pure function of seed and epoch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mspt.data import order as order_module
from mspt.data.order import EpochOrder, Sequence, permutation, shares

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=40)


def order_of(*sets, weights=None, seed=0, epoch=0):
    """The order of an epoch over sets, each given by its blocks' numbers of records."""
    sequences = [Sequence(np.array(counts), np.array(counts), seed, number) for number, counts in enumerate(sets)]
    return EpochOrder(sequences, weights or [1] * len(sets), seed, epoch)


def lanes_of(order, lanes, window):
    """Per lane, for each record in order: set, pass, number in the set."""
    firsts = [np.concatenate([[0], np.cumsum(sequence.block_records)]) for sequence in order.sequences]
    result = []
    for lane in range(lanes):
        own = order.lane(lane, lanes, window)
        rows = zip(own.pieces.tolist(), own.rows.tolist(), strict=True)
        result.append(
            [(int(own.sets[p]), int(own.passes[p]), int(firsts[own.sets[p]][own.blocks[p]] + row)) for p, row in rows]
        )
    return result


def records_of(order, lanes, window):
    """Per lane of an order over one set its records, as numbers in the set."""
    return [[number for _, _, number in lane] for lane in lanes_of(order, lanes, window)]


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 99), st.integers(0, 9), st.integers(1, 12), st.integers(1, 6))
def test_every_record_once_and_even_lanes(counts, seed, epoch, lanes, window):
    per_lane = records_of(order_of(counts, seed=seed, epoch=epoch), lanes, window)
    assert sorted(number for lane in per_lane for number in lane) == list(range(sum(counts)))
    lengths = [len(lane) for lane in per_lane]
    assert max(lengths) - min(lengths) <= 1
    assert per_lane == records_of(order_of(counts, seed=seed, epoch=epoch), lanes, window)


@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(1, 5), st.integers(1, 6))
def test_a_window_is_read_once_and_in_turn(counts, lanes, window):
    """Windows come one after another, each of at most so many blocks, and no block is in two of them."""
    order = order_of(counts)
    shared = 0
    for lane in range(lanes):
        own = order.lane(lane, lanes, window)
        blocks, windows = own.blocks[own.pieces], own.pieces // window
        assert (np.diff(windows) >= 0).all()
        held = [set(blocks[windows == number].tolist()) for number in np.unique(windows)]
        assert all(1 <= len(own) <= window for own in held)
        assert sum(map(len, held)) == len(set(blocks.tolist()))
        shared += len(set(blocks.tolist()))
    # Only a block that a border between lanes cuts is read by two (or, if lanes are short, by more).
    assert shared <= len(counts) + lanes - 1


def test_it_shuffles_blocks_and_records_anew_every_epoch():
    counts = np.full(1000, 10)
    orders = [records_of(order_of(counts, seed=seed, epoch=epoch), 1, 8)[0] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
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
        order = tuple(permutation(4, epoch, "blocks").tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 56.3


def test_the_order_is_pinned():
    """Checkpoints carry a position in this order: whoever changes it must know that they do."""
    assert records_of(order_of([3, 2, 4, 1, 3]), 2, 2) == [[12, 11, 10, 9, 5, 6], [1, 2, 7, 8, 0, 3, 4]]
    mixed = [(0, 0, 2), (1, 0, 0), (1, 0, 2), (0, 0, 1), (0, 0, 0), (1, 0, 1)]
    assert lanes_of(order_of([2, 1], [3], weights=[1, 1]), 1, 2) == [mixed]


def test_torch_random_state_is_left_alone():
    state = torch.random.get_rng_state()
    order_of([1] * 5).lane(0, 1, 2)
    assert torch.equal(state, torch.random.get_rng_state())


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.floats(0.01, 100), min_size=1, max_size=5))
def test_shares_add_up(total, weights):
    counts = shares(total, weights)
    assert counts.sum() == total
    assert (np.abs(counts - total * np.array(weights) / sum(weights)) <= 1).all()


mixtures = st.lists(sizes, min_size=2, max_size=3)


@settings(max_examples=60, deadline=None)
@given(mixtures, st.data(), st.integers(0, 99), st.integers(1, 6), st.integers(1, 4))
def test_a_mixture_passes_over_each_set_again_and_again(sets, data, seed, lanes, window):
    """Over epochs, every record of a set is seen once a pass, in passes that follow each other without a gap."""
    weights = data.draw(st.lists(st.sampled_from([0.2, 1, 3]), min_size=len(sets), max_size=len(sets)))
    epochs = [order_of(*sets, weights=weights, seed=seed, epoch=epoch) for epoch in range(3)]
    seen = [item for order in epochs for lane in lanes_of(order, lanes, window) for item in lane]
    assert len(set(seen)) == len(seen) == 3 * sum(map(sum, sets))
    for number, counts in enumerate(sets):
        own = [(step, record) for part, step, record in seen if part == number]
        assert len(own) == 3 * epochs[0].counts[number]
        whole, rest = divmod(len(own), sum(counts))
        for step in range(whole):
            assert sorted(record for at, record in own if at == step) == list(range(sum(counts)))
        assert sum(at == whole for at, _ in own) == rest


def test_any_stretch_of_a_lane_is_mixed_by_weight():
    """Of 100 records in a row, 20 ± 2 come from a set of weight 1 beside one of weight 4."""
    order = order_of([10] * 100, [10] * 400, weights=[1, 4])
    for lane in lanes_of(order, 4, 8):
        sets = np.array([part for part, _, _ in lane])
        for at in range(0, len(sets) - 100, 50):
            assert 18 <= (sets[at : at + 100] == 0).sum() <= 22


def test_one_set_in_a_mixture_keeps_its_own_order():
    """Beside another set its records come in the order that they have alone, as far as they come."""
    alone = records_of(order_of([7] * 40), 1, 4)[0]
    mixed = lanes_of(order_of([7] * 40, [5] * 10, weights=[28, 5]), 1, 4)[0]
    assert [number for part, _, number in mixed if part == 0][:100] == alone[:100]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=6), st.integers(0, 99))
def test_compiled_and_numpy_shuffle_windows_alike(lengths, seed):
    bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    keys = [(seed, at) for at in range(len(lengths))]
    compiled = order_module._shuffle(bounds, keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "library", lambda: None)
        np.testing.assert_array_equal(compiled, order_module._shuffle(bounds, keys))


@settings(max_examples=40, deadline=None)
@given(sizes, st.data(), st.integers(1, 12), st.integers(0, 3), st.sampled_from([0.3, 1, 2.7]))
def test_lanes_are_even_in_work(counts, data, lanes, epoch, passes):
    """To within a record at each end, where the records of a block are taken for alike."""
    work = np.array(data.draw(st.lists(st.floats(0.5, 9), min_size=len(counts), max_size=len(counts))))
    sequence, stretch = Sequence(np.array(counts), work, 7), max(1, round(passes * sum(counts)))
    bounds = sequence.bounds(epoch * stretch, (epoch + 1) * stretch, lanes)
    assert bounds[0] == epoch * stretch and bounds[-1] == (epoch + 1) * stretch and (np.diff(bounds) >= 0).all()
    each = work / counts
    pieces = [sequence.pieces(int(low), int(high)) for low, high in zip(bounds, bounds[1:], strict=False)]
    shares = [(each[own[:, 1]] * (own[:, 3] - own[:, 2])).sum() for own in pieces]
    assert max(shares) - min(shares) <= 2 * each.max() + 1e-9
