"""Parts of one set: counts are exact, every record is in one part, smaller limits nest in larger ones."""

import math
import pickle

import numpy as np
import pytest
from pydantic import ValidationError

from mspt.data.packing import Budget
from mspt.data.shardset import ShardSet
from mspt.data.stream import DataSettings, Split, Stream, sequential
from mspt.errors import UserError
from tests.data.molecules import plain, write_set

RECORDS = 83


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts") / "set"
    write_set(folder, plain(np.random.default_rng(0).integers(1, 12, RECORDS)), block=4, blocks_per_shard=3)
    return folder


def data(folder, **changes):
    budget = Budget(molecules=3, atoms=24)
    return DataSettings(train=str(folder), lanes=4, window=2, budget=budget, **changes)


def split(train=40, validation=20, seed=0):
    return Split(train=train, validation=validation, seed=seed)


def keys(shardset):
    return [record.key for record in shardset.records(range(len(shardset)))]


def parts(settings):
    return [settings.open()[0], settings.open_part("validation"), settings.open_part("heldout")]


def test_three_parts_with_exact_counts(folder):
    opened = parts(data(folder, split=split()))
    assert [len(part) for part in opened] == [40, 20, RECORDS - 60]
    assert sorted(key for part in opened for key in keys(part)) == keys(ShardSet.open(folder))
    assert [keys(part) for part in parts(data(folder, split=split()))] == [keys(part) for part in opened]
    assert keys(parts(data(folder, split=split(seed=1)))[0]) != keys(opened[0])
    for part in opened:
        records = list(part.records(range(len(part))))
        assert part.atoms.tolist() == [len(record.numbers) for record in records]
        assert part.manifest["records"] == len(records) and part.manifest["largest"] == max(part.atoms)


@pytest.mark.parametrize("limit", [1, 3, 5])
def test_fewer_records_than_lanes(folder, limit):
    """Some lanes have none."""
    options = data(folder, limit=limit)
    for seed in range(10):
        stream = Stream(options.open(), options, seed)
        for epoch in range(2):
            steps = stream.batches(epoch, 0, stream.steps(epoch))
            read = [key for step in steps for batch in step for key in batch.keys]
            assert sorted(read) == sorted(keys(options.open()[0]))


def test_limits_nest_and_leave_the_other_parts_alone(folder):
    whole = parts(data(folder, split=split()))
    last = set()
    for limit in (1, 7, 40):
        train, validation, heldout = parts(data(folder, split=split(), limit=limit))
        assert len(train) == limit and last < set(keys(train)) <= set(keys(whole[0]))
        assert keys(validation) == keys(whole[1]) and keys(heldout) == keys(whole[2])
        last = set(keys(train))
    alone = [data(folder, limit=limit).open()[0] for limit in (5, RECORDS)]
    assert [len(part) for part in alone] == [5, RECORDS] and set(keys(alone[0])) < set(keys(alone[1]))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_a_part_is_each_of_its_records_once(folder, workers):
    """Over two ranks, whose workers get the part pickled or forked."""
    settings = data(folder, split=split(), workers=workers)
    (train,) = settings.open()
    streams = [Stream([train], settings, 0, rank, 2) for rank in range(2)]
    steps = max(stream.steps(1) for stream in streams)
    seen = [
        (key, int(atoms))
        for stream in streams
        for micro_batches in stream.batches(1, 0, steps)
        for batch in micro_batches
        for key, atoms in zip(batch.keys, batch.ptr.diff(), strict=True)
    ]
    assert sorted(seen) == sorted(zip(keys(train), train.atoms.tolist(), strict=True))


def test_one_after_another_and_pickled(folder):
    (train,) = data(folder, split=split(train=3)).open()  # most blocks have none of it
    for part in (train, pickle.loads(pickle.dumps(train))):
        read = [key for batch in sequential(part, Budget(molecules=2, atoms=24)) for key in batch.keys]
        assert read == keys(train)


def test_batches_carry_the_labels_asked_for(tmp_path):
    records = plain([2, 3, 4])
    records[1].targets["gap"] = 1.5
    write_set(tmp_path / "set", records)
    settings = data(tmp_path / "set")
    for labels, expected in (((("gap",), False), {"gap"}), (((), False), set())):
        stream = Stream(settings.open(), settings, 0, labels=labels)
        batches = [batch for step in stream.batches(0, 0, stream.steps(0)) for batch in step if len(batch.keys)]
        assert all(set(batch.targets) == expected for batch in batches)
        values = {key: v for b in batches for key, v in zip(b.keys, b.targets.get("gap", [0] * 3), strict=False)}
        assert not expected or (values["mol-00001"] == 1.5 and math.isnan(values["mol-00000"]))


def test_what_does_not_fit_is_refused(folder):
    for settings, said in (
        (data(folder, split=split(train=80)), "data.split takes 80 and 20 records"),
        (data(folder, split=split(), limit=41), "data.limit is 41, but there are 40 records"),
    ):
        with pytest.raises(UserError, match=said):
            settings.open()
    with pytest.raises(ValidationError, match="split cuts the validation set out of train"):
        data(folder, split=split(), validation="else")
    with pytest.raises(ValidationError, match="split and limit choose among the records of train"):
        DataSettings(mixture=({"path": "a", "weight": 1},), limit=3, lanes=1, budget=Budget(molecules=1, atoms=9))
    assert data(folder, split=split(train=RECORDS, validation=0)).open_part("heldout") is None


def test_a_set_of_its_own_is_held_out_beside_a_split(folder):
    settings = data(folder, split=split(), heldout=str(folder))
    assert len(settings.open_part("heldout")) == RECORDS
    assert len(settings.open_part("validation")) == split().validation
