"""The Zarr twin of a shard set: what goes in comes out, in any order, and what is wrong with a store is said."""

import json
import pickle
import shutil
import tempfile
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mspt.data import keyed, opening, zarr_arrays, zarr_set
from mspt.data.batch import Bonds, Keys, Lines, MoleculeBatch
from mspt.data.packing import Budget
from mspt.data.shardset import ShardSet
from mspt.data.zarr_set import ZarrSet
from mspt.errors import UserError
from tests.data import test_block
from tests.data.molecules import assert_same, record, spectrum, write_set
from tests.end_to_end.runs import SHARDS

UNITS = {"positions": "Å", "forces": "eV/Å"}


def write(folder, records):
    return ZarrSet.write(folder, records, {"source": "test"}, UNITS)


def assert_same_batch(one, other):
    for name in (field.name for field in fields(MoleculeBatch)):
        _assert_equal(getattr(one, name), getattr(other, name), name)


def _assert_equal(one, other, name):
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, name
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=name)
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key, value in one.items():
            _assert_equal(value, other[key], f"{name}.{key}")
    elif isinstance(one, (Lines, Bonds)):
        for part, like in zip(one, other, strict=True):
            _assert_equal(part, like, name)
    else:
        assert (list(one) == list(other)) if isinstance(one, Keys) else (one == other), name


@st.composite
def records(draw):
    """Of every kind that a block may hold, and with spectra in half precision beside others."""
    made = draw(test_block.records(most=5))
    return [
        replace(
            one,
            spectra={
                name: s.astype(np.float16) if isinstance(s, np.ndarray) and draw(st.booleans()) else s
                for name, s in one.spectra.items()
            },
        )
        for one in made
    ]


@settings(max_examples=8, deadline=None)
@given(records(), st.integers(0, 1000), st.booleans())
def test_round_trip(made, seed, small):
    """Every field with its type, in any order, by number and by key; also where an array has many chunks and shards,
    and where it is first needed late."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        if small:
            patch.setattr(zarr_set, "GROUP", 2)
            patch.setattr(zarr_arrays, "CHUNK_BYTES", 40)
            patch.setattr(zarr_arrays, "CHUNKS_PER_SHARD", 2)
        written = write(Path(folder) / "set.zarr", iter(made))
        assert len(written) == len(made)
        assert list(written.keys) == [one.key for one in made]
        numbers = np.random.default_rng(seed).integers(0, len(made), 1 + len(made))
        for wanted in (range(len(made)), numbers, [made[i].key for i in numbers]):
            order = range(len(made)) if isinstance(wanted, range) else numbers
            for number, other in zip(order, written.records(wanted), strict=True):
                assert_same(made[number], other)
        assert_same_batch(written.batch(made[i].key for i in numbers), written.batch(numbers))
        assert written.manifest["targets"] == sorted({name for one in made for name in one.targets})
        assert_same_batch(written.batch(range(len(made))), MoleculeBatch.from_records(made))


@pytest.fixture(scope="module")
def shardset():
    """Real molecules with lines of all three spectra."""
    return ShardSet.open(SHARDS)


@pytest.fixture(scope="module")
def built(tmp_path_factory, shardset):
    folder = tmp_path_factory.mktemp("built") / "set.zarr"
    made = [
        replace(one, spectra=one.spectra | {"ir": spectrum("ir", "values16" if number % 2 else "values32", number)})
        for number, one in enumerate(shardset.records(range(60)))
    ]
    write(folder, made)
    return folder


@pytest.fixture
def folder(built, tmp_path):
    """A copy to break."""
    return shutil.copytree(built, tmp_path / "set.zarr")


def test_every_key_is_found(built):
    opened = ZarrSet.open(built)
    assert [opened.index_of(key) for key in opened.keys] == list(range(60))
    with pytest.raises(UserError, match=r"set\.zarr: holds no record with the key 'qm9-x'; "):
        opened.index_of("qm9-x")
    for number in (-1, 60):
        with pytest.raises(IndexError, match=f"record {number} of .*set.zarr, which has 60"):
            next(opened.records([number]))


def test_keys_whose_words_collide(tmp_path, monkeypatch):
    monkeypatch.setattr(keyed, "word", lambda key: len(key) % 2)
    keys = ["a", "bb", "c", "dd", "e", "f"]
    opened = write(tmp_path / "set.zarr", [record(key, seed=i) for i, key in enumerate(keys)])
    assert [opened.index_of(key) for key in keys] == list(range(6))
    for missing in ("g", "gg"):
        with pytest.raises(UserError, match=f"no record with the key '{missing}'"):
            opened.index_of(missing)


def test_a_target_may_have_any_name(tmp_path):
    names = ["homo/lumo", "E (eV)", "µ", "100%", "ptr"]
    made = [record("a", targets={name: float(i) for i, name in enumerate(names)}), record("b", targets={"µ": 0.5})]
    opened = write(tmp_path / "set.zarr", made)
    assert opened.manifest["targets"] == sorted(names)
    for one, other in zip(made, opened.records([0, 1]), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("budget", [Budget(molecules=7, atoms=200), Budget(molecules=500, atoms=2000)])
def test_both_kinds_of_set_give_the_same_batches(tmp_path, monkeypatch, shardset, budget):
    """Through the one interface to both; groups that are read together end within batches."""
    monkeypatch.setattr(zarr_set, "GROUP", 50)
    write(tmp_path / "set.zarr", shardset.records(range(len(shardset))))
    both = [opening.open_set(folder) for folder in (SHARDS, tmp_path / "set.zarr")]
    assert [type(each) for each in both] == [ShardSet, ZarrSet]
    np.testing.assert_array_equal(both[0].atoms, both[1].atoms)
    for name in ("schema_version", "records", "atoms", "largest", "grids", "targets", "units"):
        assert both[0].manifest[name] == both[1].manifest[name]
    served = [list(opening.sequential(each, budget, each.manifest["targets"])) for each in both]
    assert len(served[0]) >= 3
    for one, other in zip(*served, strict=True):
        assert_same_batch(one, other)


def test_a_budget_that_a_molecule_is_over(built):
    with pytest.raises(UserError, match=r"atoms is 5, but a molecule of .*set\.zarr"):
        next(ZarrSet.open(built).sequential(Budget(molecules=5, atoms=5)))


def test_plain_zarr_reads_it(built):
    """Without mspt: what the documentation promises."""
    group, expected = zarr.open_group(built, mode="r"), list(ZarrSet.open(built).records(range(60)))
    number = 17
    atoms, text = (slice(*group[name][number : number + 2]) for name in ("ptr", "keys_ptr"))
    np.testing.assert_array_equal(group["positions"][atoms], expected[number].positions)
    assert group["keys"][text].tobytes().decode() == expected[number].key
    ir = group["spectra/ir"]
    assert (ir["kind"][number], ir["float16"].shape, ir["float32"].shape) == (3, (30, 3501), (30, 3501))
    np.testing.assert_array_equal(ir["float16"][int(ir["row"][number])], expected[number].spectra["ir"])
    assert (np.diff(group["words"][:][group["order"][:]]) > 0).all()
    assert group.attrs["units"]["positions"] == "Å"
    assert group.attrs["sources"] == [{"source": expected[0].source, "methods": expected[0].methods}]


def test_a_chunk_is_read_once(built, monkeypatch):
    reads, get = Counter(), zarr_arrays._Store.get

    async def counted(self, key, prototype=None, byte_range=None):
        reads[key, byte_range] += 1
        return await get(self, key, prototype, byte_range)

    opened = ZarrSet.open(built)
    monkeypatch.setattr(zarr_arrays._Store, "get", counted)
    list(opened.records(np.random.default_rng(0).integers(0, 60, 200)))
    chunks = {key for key, _ in reads if "/c/" in key}
    assert {key.split("/c/")[0] for key in chunks} >= {"positions", "numbers", "smiles", "spectra/ir/float16"}
    assert max(reads.values()) == 1


def test_whole_shards_are_written(tmp_path, monkeypatch):
    """So that a set of any size is written within the same memory."""
    waiting, extend = [], zarr_arrays.Column.extend

    def watched(self, values):
        extend(self, values)
        waiting.append(sum(map(len, self.waiting)) / self.shard)

    monkeypatch.setattr(zarr_arrays.Column, "extend", watched)
    monkeypatch.setattr(zarr_arrays, "CHUNK_BYTES", 240)
    monkeypatch.setattr(zarr_arrays, "CHUNKS_PER_SHARD", 4)
    monkeypatch.setattr(zarr_set, "GROUP", 8)
    write(tmp_path / "set.zarr", (record(f"{i:03d}", 5, seed=i) for i in range(100)))
    array = zarr.open_group(tmp_path / "set.zarr", mode="r")["positions"]
    assert (array.shape, array.chunks, array.shards) == ((500, 3), (20, 3), (80, 3))
    sizes = {len(path.read_bytes()) for path in (tmp_path / "set.zarr/positions/c").glob("*/0")}
    assert len(list((tmp_path / "set.zarr/positions/c").glob("*/0"))) == 7
    assert sizes == {4 * 244 + 4 * 16 + 4, 244 + 4 * 16 + 4}
    assert max(waiting) < 1


def test_it_goes_to_the_workers_of_a_loader(built):
    opened = ZarrSet.open(built)
    expected = opened.batch([3, 1])
    assert len(pickle.dumps(opened)) < 500
    loader = DataLoader([[3, 1]], batch_size=None, num_workers=1, collate_fn=opened.batch)
    assert_same_batch(next(iter(loader)), expected)


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit(folder, **changes):
    path = folder / "zarr.json"
    tree = json.loads(path.read_text())
    tree["attributes"] |= changes
    path.write_text(json.dumps(tree))


BROKEN = {
    "nothing": (shutil.rmtree, "set.zarr: is no Zarr v3 store that can be read"),
    "not zarr": (lambda f: (f / "zarr.json").unlink(), "set.zarr: is no Zarr v3 store that can be read"),
    "torn": (lambda f: (f / "zarr.json").write_text('{"zarr_'), "set.zarr: is no Zarr v3 store that can be read"),
    "of something else": (
        lambda f: edit(f, kind="embeddings"),
        r"set\.zarr: is no store of molecules \(its attribute kind is 'embeddings'\)",
    ),
    "newer schema": (lambda f: edit(f, schema_version=99), "schema_version is 99, this mspt reads 3; convert"),
    "other grids": (lambda f: edit(f, grids={}), "grids differ from this mspt's; convert again"),
    "no array": (lambda f: shutil.rmtree(f / "positions"), r"positions/zarr\.json: is missing; copy"),
    "torn array": (lambda f: (f / "ptr/zarr.json").write_text("{"), "set.zarr: is no Zarr v3 store that can be read"),
    "no shard": (lambda f: (f / "spectra/ir/float16/c/0/0").unlink(), "spectra/ir/float16/c/0/0: is missing; copy"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_stores_are_refused_when_they_are_opened(folder, name):
    damage, message = BROKEN[name]
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        ZarrSet.open(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, 1000),
        lambda path: flip(path, -10),
        lambda path: cut(path, 5000),
        lambda path: cut(path, 0),
        lambda path: path.unlink(),
    ],
    ids=["a byte", "its index", "half", "all of it", "its file"],
)
@pytest.mark.parametrize("numbers", [[0, 7], range(60)], ids=["some", "all"])
@pytest.mark.parametrize("name", ["positions", "spectra/ir/float16"])
def test_damage_is_found_when_it_is_read(folder, damage, numbers, name):
    """The checksum of Zarr's crc32c; and what Zarr itself would read as zeros."""
    opened = ZarrSet.open(folder)
    damage(folder / name / "c/0/0")
    with pytest.raises(UserError, match=f"set.zarr/{name}: is damaged .*; copy the store again or write it") as error:
        list(opened.records(numbers))
    assert "\n" not in str(error.value)


def failing():
    yield record("a")
    raise UserError("the source has gone")


def test_nothing_stays_of_what_cannot_be_written(tmp_path):
    twice = [record("a"), record("b"), record("a")]
    cases = [(twice, "key 'a' is that of records 0 and 2"), ([], "no record"), (failing(), "the source has gone")]
    for made, message in cases:
        with pytest.raises(UserError, match=message):
            write(tmp_path / "set.zarr", made)
        assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept_and_what_a_killed_one_left_is_not(tmp_path):
    """A kill leaves the folder beside the final name."""
    left = tmp_path / ".set.zarr.partial"
    left.mkdir()
    (left / "zarr.json").write_text("{")
    write(tmp_path / "set.zarr", [record("a")])
    assert [path.name for path in tmp_path.iterdir()] == ["set.zarr"]
    with pytest.raises(UserError, match=r"set\.zarr: is there already; remove it or choose another name"):
        write(tmp_path / "set.zarr", [record("b")])
    assert list(ZarrSet.open(tmp_path / "set.zarr").keys) == ["a"]


def test_no_set_of_either_kind(tmp_path):
    with pytest.raises(UserError, match=r"x: no set of molecules there: it has neither manifest\.json nor zarr\.json"):
        opening.open_set(tmp_path / "x")
    write_set(tmp_path / "set", [record("a")])
    assert isinstance(opening.open_set(tmp_path / "set"), ShardSet)
