"""The promises of the stream: each record once an epoch, the same steps for any ranks and workers, any position."""

import itertools
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mspt.chemistry.spectra import LINE_SHAPES
from mspt.data import keyed
from mspt.data.gather import Held
from mspt.data.order import EpochOrder
from mspt.data.packing import Budget
from mspt.data.shardset import ShardSet
from mspt.data.stream import DataSettings, Stream, sequences, sequential
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
    return [Stream([shardset], options, seed, rank, world_size) for rank in range(world_size)]


def steps_of(ranks, epoch):
    """As the trainer does it: the most that any rank needs."""
    return max(stream.steps(epoch) for stream in ranks)


def micro_batches(ranks, epoch, start, stop):
    """Per step, the keys of every lane's micro-batch in lane order, put together from all ranks."""
    served = [list(stream.batches(epoch, start, stop)) for stream in ranks]
    result = []
    for step in range(stop - start):
        own = [rank[step] for rank in served]
        result.append([tuple(batch.keys) for lane in zip(*own, strict=True) for batch in lane])
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
    assert Stream([shardset], data(lanes=lanes, workers=asked), 0).workers == used


@pytest.mark.parametrize("workers", [0, 2])
def test_content_comes_with_the_keys(shardset, workers):
    """Atoms and positions are those of the record that the key names."""
    records = {r.key: r for r in shardset.records(range(len(shardset)))}
    stream = Stream([shardset], data(lanes=4, workers=workers), 0)
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
    order = EpochOrder(sequences([shardset], options.budget, 0), [1], 0, 0)
    for lane in range(3):
        own = order.lane(lane, 3, 4)
        expected = [f"mol-{number:05d}" for number in shardset.first[own.blocks[own.pieces]] + own.rows]
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
    stream = Stream([shardset], data(workers=2), 0)
    served = stream.batches(0, 0, len(whole))
    taken = [[tuple(batch.keys) for batch in next(served)] for _ in range(2)]
    served.close()
    assert taken + micro_batches([stream], 0, 2, len(whole)) == whole


def reads(shardset, monkeypatch):
    """A list that the numbers of blocks are added to as they are read."""
    numbers, view = [], shardset.view
    monkeypatch.setattr(shardset, "view", lambda number: numbers.append(number) or view(number))
    return numbers


def test_a_lane_reads_its_blocks_once(tmp_path, monkeypatch):
    shardset = shard_set(tmp_path / "set", [3] * 400)
    numbers = reads(shardset, monkeypatch)
    stream = Stream([shardset], data(lanes=4, molecules=5), 0)
    for _ in stream.batches(0, 0, stream.steps(0)):
        pass
    assert sorted(set(numbers)) == list(range(100))
    assert len(numbers) <= 100 + 3


def test_resuming_reads_only_what_is_still_needed(tmp_path, monkeypatch):
    shardset = shard_set(tmp_path / "set", [3] * 400)
    numbers = reads(shardset, monkeypatch)
    stream = Stream([shardset], data(lanes=1, window=2, molecules=5), 0)
    steps = stream.steps(0)
    assert numbers == []  # planning reads nothing
    for _ in stream.batches(0, steps - 8, steps):
        pass
    # 40 records of windows of 8, so six windows of two blocks.
    assert len(numbers) <= 12


def test_little_is_held(tmp_path, monkeypatch):
    """Batches hold copies, so that blocks go when their window is over: no more than two windows are alive."""
    shardset = shard_set(tmp_path / "set", [3] * 400)
    alive, counts = set(), []
    put, drop = Held.put, Held.drop

    def counted(held, data, head):
        slot = put(held, data, head)
        alive.add(slot)
        return slot

    monkeypatch.setattr(Held, "put", counted)
    monkeypatch.setattr(Held, "drop", lambda held, number: alive.discard(number) or drop(held, number))
    stream = Stream([shardset], data(lanes=1, window=3, molecules=5), 0)
    for _ in stream.batches(0, 0, stream.steps(0)):
        counts.append(len(alive))
    assert 3 <= max(counts) <= 6


def test_world_size_that_does_not_divide_the_lanes(shardset):
    with pytest.raises(
        UserError, match="data.lanes is 12, which 5 ranks do not divide; run on 1, 2, 3, 4, 6, 12 ranks"
    ):
        Stream([shardset], data(), 0, rank=0, world_size=5)


def mixture(*weights, lanes=12, **options):
    parts = [{"path": "unused", "weight": weight} for weight in weights]
    budget = {"molecules": 3, "atoms": 24}
    return DataSettings(mixture=parts, lanes=lanes, budget=budget, window=2, **options)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Sets of 50, 90 and 7 molecules; what a mixture of them by 1 : 2 : 0.5 sees in two epochs on one rank."""
    folder, rng = tmp_path_factory.mktemp("three"), np.random.default_rng(1)
    sets = []
    for name, count in (("a", 50), ("b", 90), ("c", 7)):
        records = [record(f"{name}-{i}", int(n), i) for i, n in enumerate(rng.integers(1, 12, count))]
        write_set(folder / name, records, block=4)
        sets.append(ShardSet.open(folder / name))
    epochs = [epoch_of(mixed(sets, mixture(1, 2, 0.5), 1), epoch) for epoch in (0, 1)]
    return sets, epochs


def mixed(sets, options, world_size):
    return [Stream(sets, options, 5, rank, world_size) for rank in range(world_size)]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (3, 1), (4, 2)])
def test_a_mixture_is_the_same_on_any_ranks_and_workers(three, world_size, workers):
    sets, epochs = three
    assert epoch_of(mixed(sets, mixture(1, 2, 0.5, workers=workers), world_size), 1) == epochs[1]


@settings(max_examples=8, deadline=None)
@given(fraction=st.floats(0, 1), before=st.sampled_from([1, 2, 3]), after=st.sampled_from([1, 2, 4, 6]))
def test_a_mixture_goes_on_from_any_position_on_any_ranks(three, fraction, before, after):
    sets, (_, whole) = three
    at = round(fraction * len(whole))
    first = micro_batches(mixed(sets, mixture(1, 2, 0.5), before), 1, 0, at)
    ranks = mixed(sets, mixture(1, 2, 0.5), after)
    assert first + micro_batches(ranks, 1, at, steps_of(ranks, 1)) == whole


def test_a_mixture_takes_its_sets_by_weight(three):
    """147 records an epoch as 42 : 84 : 21, the 7 of the small set three times each, with other random numbers."""
    sets, epochs = three
    for epoch in epochs:
        names = [key[0] for key in flat(epoch)]
        assert [names.count(name) for name in "abc"] == [42, 84, 21]
    assert {flat(epochs[0]).count(f"c-{i}") for i in range(7)} == {3}
    stream = Stream(sets, mixture(1, 2, 0.5), 5)
    batches = [batch for step in stream.batches(0, 0, stream.steps(0)) for batch in step]
    words = torch.cat([batch.records for batch in batches])
    assert len(words.unique()) == 147


def test_records_of_one_set_are_keyed_by_their_names(shardset):
    """So that a molecule has the same noise in an epoch whichever set it lies in."""
    batch = next(Stream([shardset], data(), 0).batches(0, 0, 1))[0]
    assert batch.records.tolist() == [keyed.word(key) for key in batch.keys]


@pytest.mark.parametrize("given", [{}, {"train": "a", "mixture": [{"path": "b", "weight": 1}]}])
def test_one_set_or_a_mixture(given):
    with pytest.raises(ValidationError, match="give either train, one shard set, or mixture"):
        DataSettings(lanes=1, budget={"molecules": 1, "atoms": 1}, **given)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_block_is_left_out(tmp_path, workers, caplog):
    """All else comes as it would have come, the batches say how many are missing, and any rank sees the same."""
    shardset = shard_set(tmp_path / "set", [3] * 60)
    whole = epoch_of(streams(shardset, data(lanes=2), 1))
    path = tmp_path / "set" / "shard-00001.tar"
    content = bytearray(path.read_bytes())
    content[int(shardset.offset[4]) + 50] ^= 255
    path.write_bytes(content)
    options = data(lanes=2, workers=workers).model_copy(update={"on_bad_block": "skip"})
    lost = {f"mol-{i:05d}" for i in range(16, 20)}
    expected = [[tuple(key for key in keys if key not in lost) for keys in step] for step in whole]
    for world_size in (1, 2):
        assert epoch_of(streams(shardset, options, world_size)) == expected
    stream = Stream([shardset], options, 0)
    missing = [batch.missing for step in stream.batches(0, 0, stream.steps(0)) for batch in step]
    assert sum(missing) == 4
    in_order = sequential(shardset, options.budget, on_bad_block="skip")
    assert [key for batch in in_order for key in batch.keys] == [
        f"mol-{i:05d}" for i in range(60) if f"mol-{i:05d}" not in lost
    ]
    if workers == 0:
        assert "shard-00001.tar: block 4 is damaged" in caplog.text


def test_molecule_over_the_budget(shardset):
    with pytest.raises(UserError, match="data.budget.atoms is 10, but a molecule of .* alone needs 11"):
        Stream([shardset], data(atoms=10), 0)
    with pytest.raises(UserError, match="data.budget.atoms is 10"):
        next(sequential(shardset, Budget(molecules=4, atoms=10)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_block_is_a_user_error_of_one_line(tmp_path, workers):
    shardset = shard_set(tmp_path / "set", [3] * 60)
    path = tmp_path / "set" / "shard-00001.tar"
    content = bytearray(path.read_bytes())
    content[int(shardset.offset[4]) + 50] ^= 255
    path.write_bytes(content)
    stream = Stream([shardset], data(lanes=2, workers=workers), 0)
    with pytest.raises(UserError, match=r"shard-00001\.tar: block 4 is damaged") as error:
        list(stream.batches(0, 0, stream.steps(0)))
    assert "\n" not in str(error.value)


def test_torch_random_state_is_left_alone(shardset):
    """So that a resumed run, which opens its loader once more, draws the same numbers."""
    state = torch.random.get_rng_state()
    stream = Stream([shardset], data(workers=1), 0)
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
    stream = Stream([ShardSet.open(tmp_path / "set")], data(lanes=2, molecules=4, workers=1), 0)
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
    for width in (0.0, -10.0, math.nan):
        with pytest.raises(ValidationError, match="width"):
            DataSettings(train="set", lanes=1, budget=budget, line_shapes={"ir": {**named["ir"], "width": width}})
