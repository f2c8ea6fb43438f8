"""The promises of the stream: each record once an epoch, the same steps for any ranks and workers, any position."""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mspt.chemistry.spectra import LINE_SHAPES
from mspt.data import block as blocks
from mspt.data.order import EpochOrder
from mspt.data.packing import Budget
from mspt.data.shardset import ShardSet
from mspt.data.stream import DataSettings, Stream, sequential
from mspt.errors import UserError
from tests.data.molecules import plain, record, spectrum, write_set


def shard_set(folder, sizes, block=4, blocks_per_shard=3):
    write_set(folder, plain(sizes), block=block, blocks_per_shard=blocks_per_shard)
    return ShardSet.open(folder)


@pytest.fixture(scope="module")
def shardset(tmp_path_factory):
    sizes = np.random.default_rng(0).integers(1, 12, 203)
    return shard_set(tmp_path_factory.mktemp("stream") / "set", sizes)


def data(lanes=12, workers=0, window=3, molecules=3, atoms=24):
    budget = {"molecules": molecules, "atoms": atoms}
    return DataSettings(train="unused", lanes=lanes, workers=workers, window=window, budget=budget)


@pytest.fixture(scope="module")
def whole(shardset):
    """What one rank without workers sees in epoch 0."""
    return epoch_of(streams(shardset, data(), 1))


def streams(shardset, options, world_size, seed=0):
    return [Stream(shardset, options, seed, rank, world_size) for rank in range(world_size)]


def steps_of(ranks, epoch):
    """As the trainer does it: the most that any rank needs."""
    return max(stream.steps(epoch) for stream in ranks)


def micro_batches(ranks, epoch, start, stop):
    """Per step, the keys of every lane's micro-batch in lane order, put together from all ranks."""
    served = [list(stream.batches(epoch, start, stop)) for stream in ranks]
    result = []
    for step in range(stop - start):
        own = [rank[step] for rank in served]
        result.append([batch.keys for lane in zip(*own, strict=True) for batch in lane])
    return result


def epoch_of(ranks, epoch=0):
    return micro_batches(ranks, epoch, 0, steps_of(ranks, epoch))


def flat(steps):
    return [key for step in steps for keys in step for key in keys]


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=60),
    block=st.integers(1, 7),
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 5),
    window=st.integers(1, 5),
    multiple=st.integers(1, 2),
    molecules=st.integers(1, 5),
)
def test_each_record_once_and_the_same_steps_on_1_2_3_4_ranks(sizes, block, seed, epoch, window, multiple, molecules):
    """Also where the set has fewer records than there are lanes."""
    options = data(lanes=12 * multiple, window=window, molecules=molecules, atoms=30)
    with tempfile.TemporaryDirectory() as folder:
        shardset = shard_set(Path(folder, "set"), sizes, block)
        reference = epoch_of(streams(shardset, options, 1, seed), epoch)
        assert sorted(flat(reference)) == [f"mol-{i:05d}" for i in range(len(sizes))]
        assert all(any(step) for step in reference)
        for world_size in (2, 3, 4):
            assert epoch_of(streams(shardset, options, world_size, seed), epoch) == reference


@pytest.mark.parametrize(("world_size", "workers"), list(itertools.product([1, 2, 3, 4], [1, 2])))
def test_loader_workers_change_nothing(shardset, whole, world_size, workers):
    """Real worker processes."""
    assert epoch_of(streams(shardset, data(workers=workers), world_size)) == whole


@pytest.mark.parametrize(
    ("lanes", "asked", "used"), [(12, 0, 0), (12, 5, 4), (12, 3, 3), (7, 6, 1), (1, 4, 1), (6, 9, 6)]
)
def test_as_many_workers_as_share_the_lanes_evenly(shardset, lanes, asked, used):
    assert Stream(shardset, data(lanes=lanes, workers=asked), 0).workers == used


@pytest.mark.parametrize("workers", [0, 2])
def test_content_comes_with_the_keys(shardset, workers):
    """Atoms and positions are those of the record that the key names."""
    records = {r.key: r for r in shardset.records(range(len(shardset)))}
    stream = Stream(shardset, data(lanes=4, workers=workers), 0)
    for step in stream.batches(0, 0, stream.steps(0)):
        for batch in step:
            for i, key in enumerate(batch.keys):
                atoms = slice(*batch.ptr[i : i + 2].tolist())
                np.testing.assert_array_equal(batch.numbers[atoms], records[key].numbers)
                np.testing.assert_array_equal(batch.positions[atoms], records[key].positions)


def test_molecules_come_in_the_order_of_their_lane(shardset):
    """Within a micro-batch too, from however many blocks it is put together."""
    options = data(lanes=3, window=4, molecules=9, atoms=99)
    steps = epoch_of(streams(shardset, options, 1))
    order = EpochOrder(shardset.block_records, 0, 0)
    for lane in range(3):
        blocks_of, rows, _ = order.lane(lane, 3, 4)
        expected = [f"mol-{number:05d}" for number in shardset.first[blocks_of] + rows]
        assert [key for step in steps for key in step[lane]] == expected


def test_epochs_and_seeds_differ(shardset):
    runs = [epoch_of(streams(shardset, data(), 1, seed), epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({str(run) for run in runs}) == 3
    assert len({frozenset(flat(run)) for run in runs}) == 1
    assert epoch_of(streams(shardset, data(), 1)) == runs[0]


@settings(max_examples=12, deadline=None)
@given(fraction=st.floats(0, 1), before=st.sampled_from([1, 2, 3, 4]), after=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_from_any_position_on_any_number_of_ranks(shardset, whole, fraction, before, after):
    """A run that is killed at a step and goes on with another world size sees what it would have seen."""
    at = round(fraction * len(whole))
    first = micro_batches(streams(shardset, data(), before), 0, 0, at)
    ranks = streams(shardset, data(), after)
    assert first + micro_batches(ranks, 0, at, steps_of(ranks, 0)) == whole


def test_from_a_position_with_workers(shardset, whole):
    ranks = streams(shardset, data(workers=2), 2)
    assert micro_batches(ranks, 0, 3, steps_of(ranks, 0)) == whole[3:]


def test_stopping_early_and_going_on(shardset, whole):
    """Batches that a loader has prefetched but nobody has taken are not lost."""
    stream = Stream(shardset, data(workers=2), 0)
    served = stream.batches(0, 0, len(whole))
    taken = [[batch.keys for batch in next(served)] for _ in range(2)]
    served.close()
    assert taken + micro_batches([stream], 0, 2, len(whole)) == whole


def reads(shardset, monkeypatch):
    """A list that the numbers of blocks are added to as they are read."""
    numbers, read = [], shardset.read
    monkeypatch.setattr(shardset, "read", lambda number: numbers.append(int(number)) or read(number))
    return numbers


def test_a_lane_reads_its_blocks_once(tmp_path, monkeypatch):
    shardset = shard_set(tmp_path / "set", [3] * 400)
    numbers = reads(shardset, monkeypatch)
    stream = Stream(shardset, data(lanes=4, molecules=5), 0)
    for _ in stream.batches(0, 0, stream.steps(0)):
        pass
    assert sorted(set(numbers)) == list(range(100))
    assert len(numbers) <= 100 + 3


def test_resuming_reads_only_what_is_still_needed(tmp_path, monkeypatch):
    shardset = shard_set(tmp_path / "set", [3] * 400)
    numbers = reads(shardset, monkeypatch)
    stream = Stream(shardset, data(lanes=1, window=2, molecules=5), 0)
    steps = stream.steps(0)
    assert numbers == []  # planning reads nothing
    for _ in stream.batches(0, steps - 8, steps):
        pass
    # 40 records of windows of 8, so six windows of two blocks.
    assert len(numbers) <= 12


def test_little_is_held(tmp_path, monkeypatch):
    """Batches hold copies, so that blocks go when their window is over: no more than two windows are alive."""
    shardset = shard_set(tmp_path / "set", [3] * 400)
    held, alive = [], []
    decode = blocks.decode

    class Counted(dict):
        def __init__(self, content):
            super().__init__(content)
            held.append(1)

        def __del__(self):
            held.pop()

    monkeypatch.setattr(blocks, "decode", lambda content: Counted(decode(content)))
    stream = Stream(shardset, data(lanes=1, window=3, molecules=5), 0)
    for _ in stream.batches(0, 0, stream.steps(0)):
        alive.append(len(held))
    assert 3 <= max(alive) <= 6


def test_world_size_that_does_not_divide_the_lanes(shardset):
    with pytest.raises(
        UserError, match="data.lanes is 12, which 5 ranks do not divide; run on 1, 2, 3, 4, 6, 12 ranks"
    ):
        Stream(shardset, data(), 0, rank=0, world_size=5)


def test_molecule_over_the_budget(shardset):
    with pytest.raises(UserError, match="data.budget.atoms is 10, but a molecule of .* alone needs 11"):
        Stream(shardset, data(atoms=10), 0)
    with pytest.raises(UserError, match="data.budget.atoms is 10"):
        next(sequential(shardset, Budget(molecules=4, atoms=10)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_block_is_a_user_error_of_one_line(tmp_path, workers):
    shardset = shard_set(tmp_path / "set", [3] * 60)
    path = tmp_path / "set" / "shard-00001.tar"
    content = bytearray(path.read_bytes())
    content[int(shardset.offset[4]) + 50] ^= 255
    path.write_bytes(content)
    stream = Stream(shardset, data(lanes=2, workers=workers), 0)
    with pytest.raises(UserError, match=r"shard-00001\.tar: block 4 is damaged") as error:
        list(stream.batches(0, 0, stream.steps(0)))
    assert "\n" not in str(error.value)


def test_torch_random_state_is_left_alone(shardset):
    """So that a resumed run, which opens its loader once more, draws the same numbers."""
    state = torch.random.get_rng_state()
    stream = Stream(shardset, data(workers=1), 0)
    next(stream.batches(0, 0, 2))
    assert torch.equal(state, torch.random.get_rng_state())


@settings(max_examples=15, deadline=None)
@given(molecules=st.integers(1, 9), atoms=st.integers(11, 90))
def test_sequential_is_the_set_in_its_order(shardset, molecules, atoms):
    batches = list(sequential(shardset, Budget(molecules=molecules, atoms=atoms)))
    assert [key for batch in batches for key in batch.keys] == [f"mol-{i:05d}" for i in range(len(shardset))]
    assert all(0 < len(batch.keys) <= molecules and len(batch.numbers) <= atoms for batch in batches)


def test_sets_with_some_spectra(tmp_path):
    """Spectra that only some records have, as lines or values, arrive with their records."""
    kinds = {0: "missing", 1: "lines", 2: "values16"}
    records = [
        record(f"s-{i}", 3, seed=i, spectra={"ir": spectrum("ir", kinds[i % 3], i)} if i % 3 else {}) for i in range(31)
    ]
    write_set(tmp_path / "set", records, block=4)
    stream = Stream(ShardSet.open(tmp_path / "set"), data(lanes=2, molecules=4, workers=1), 0)
    seen = 0
    for step in stream.batches(0, 0, stream.steps(0)):
        for batch in step:
            for i, key in enumerate(batch.keys):
                seen, number = seen + 1, int(key.removeprefix("s-"))
                assert batch.present["ir"][i] == (number % 3 != 0)
                own = records[number].spectra.get("ir")
                if number % 3 == 1:
                    part = slice(*batch.lines["ir"].ptr[i : i + 2].tolist())
                    np.testing.assert_array_equal(batch.lines["ir"].positions[part], own.positions)
                if number % 3 == 2:
                    np.testing.assert_array_equal(batch.spectra["ir"][i], own.astype(np.float32))
            whole = batch.broadened(LINE_SHAPES)
            assert (whole.spectra["ir"].sum(1) > 0).tolist() == batch.present["ir"].tolist()
    assert seen == 31


def test_line_shapes_that_are_not_named_keep_their_default():
    budget = {"molecules": 1, "atoms": 1}
    named = {"ir": {"shape": "gaussian", "width": 4.0}}
    made = DataSettings(train="set", lanes=1, budget=budget, line_shapes=named).line_shapes
    assert made["ir"].width == 4.0 and made["raman"] == LINE_SHAPES["raman"] and made["uv_vis"] == LINE_SHAPES["uv_vis"]
    with pytest.raises(ValidationError, match="nmr"):
        DataSettings(train="set", lanes=1, budget=budget, line_shapes={"nmr": named["ir"]})
