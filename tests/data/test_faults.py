"""What is wrong with a shard set is said in one line that names the file and the remedy, as early as possible."""

import hashlib
import json
import pickle
import shutil

import numpy as np
import pytest
from safetensors.numpy import load, save

from mspt.data import block as blocks
from mspt.data.shardset import INDEX, MANIFEST, BadBlock, ShardSet, checksum
from mspt.errors import UserError
from tests.data.molecules import assert_same, plain, record, write_set


@pytest.fixture
def folder(qm9, tmp_path):
    """A copy to break."""
    return shutil.copytree(qm9, tmp_path / "set")


def refused(folder, message):
    """Opening says so in one line that names the set."""
    with pytest.raises(UserError, match=message) as error:
        ShardSet.open(folder)
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)
    assert "build the set again" in str(error.value)


def edit_manifest(folder, change):
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def edit_index(folder, change):
    """The index with another content, and a manifest that vouches for it."""
    arrays = load((folder / INDEX).read_bytes())
    change(arrays)
    data = save(arrays)
    (folder / INDEX).write_bytes(data)
    edit_manifest(folder, lambda manifest: manifest.update(index_sha256=hashlib.sha256(data).hexdigest()))


MANIFESTS = {
    "no number": (lambda m: m.update(records="60"), r"manifest\.json: records is '60'; restore the file or"),
    "negative": (lambda m: m["shards"][1].update(bytes=-512), r"manifest\.json: shards\.1\.bytes is -512"),
    "no list": (lambda m: m.update(shards={"a": 1}), r"manifest\.json: shards is \{'a': 1\}"),
    "a shard that is none": (lambda m: m["shards"].append(3), r"manifest\.json: shards\.3 is 3"),
    "a field less": (lambda m: m["shards"][2].pop("sha256"), r"manifest\.json: shards\.2\.sha256 is missing"),
    "a path for a name": (
        lambda m: m["shards"][0].update(file="../../secret"),
        r"manifest\.json: shards\.0\.file is '../../secret'",
    ),
    "a shard twice": (
        lambda m: m["shards"].append(m["shards"][0]),
        r"manifest\.json: shards lists shard-00000\.tar 2 times",
    ),
    "a shard less": (lambda m: m["shards"].pop(), r"manifest\.json: records is 60, but its shards have 48"),
    "other records": (lambda m: m.update(records=61), r"manifest\.json: records is 61, but its shards have 60"),
    "other atoms": (lambda m: m.update(atoms=7), r"index\.safetensors: atoms is \d+ where the manifest says 7"),
    "other largest": (
        lambda m: m.update(largest=300),
        r"index\.safetensors: largest is \d+ where the manifest says 300",
    ),
    "other blocks": (
        lambda m: (m["shards"][0].update(blocks=2), m["shards"][1].update(blocks=4)),
        r"index\.safetensors: 3 blocks in shard-00000\.tar where the manifest says 2",
    ),
    "shards in another order": (
        lambda m: m["shards"].reverse(),
        r"index\.safetensors: (block|\d) .*",
    ),
    "not hexadecimal": (lambda m: m.update(index_sha256="../x"), r"manifest\.json: index_sha256 is '../x'"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_that_contradict(folder, name):
    change, message = MANIFESTS[name]
    edit_manifest(folder, change)
    refused(folder, message)


NO_JSON = {"UTF-16": b"\xff\xfe{", "Latin-1": '{"ä": 1}'.encode("latin-1"), "nothing": b"", "nested": b"[" * 100_000}


@pytest.mark.parametrize("name", NO_JSON)
def test_manifests_that_are_no_json(folder, name):
    (folder / MANIFEST).write_bytes(NO_JSON[name])
    refused(folder, r"manifest\.json: cannot be read as JSON")


def at(name, number, value):
    def change(arrays):
        arrays[name][number] = value

    return change


def shorter(name):
    return lambda arrays: arrays.update({name: arrays[name][:-1].copy()})


INDICES = {
    "array missing": (lambda a: a.pop("offset"), "offset is missing"),
    "other type": (
        lambda a: a.update(size=a["size"].astype(np.float32)),
        r"size is float32 \(8,\) where a list of int64",
    ),
    "other shape": (lambda a: a.update(shard=a["shard"][:, None].copy()), r"shard is int32 \(8, 1\) where a list"),
    "shorter": (shorter("checksum"), "checksum has 7 values where the manifest says 8 blocks"),
    "fewer atoms": (shorter("atoms"), "records is 59 where the manifest says 60"),
    "negative size": (at("size", 3, -5), r"block 3 is empty \(shard 1, offset \d+, size -5, head \d+, records 8, "),
    "no records": (at("records", 2, 0), "block 2 is empty"),
    "no such shard": (at("shard", 7, 3), "block 7 lies in no shard"),
    "negative shard": (at("shard", 0, -1), "block 0 lies in no shard"),
    "past the end": (at("offset", 4, 1 << 40), "block 4 does not lie inside its shard"),
    "past all numbers": (at("offset", 4, (1 << 63) - 1), "block 4 does not lie inside its shard"),
    "before the start": (at("offset", 4, -1), "block 4 does not lie inside its shard"),
    "huge": (at("size", 1, (1 << 63) - 1), "block 1 does not lie inside its shard"),
    "a block twice": (
        lambda a: a["offset"].__setitem__(1, a["offset"][0]),
        "block 0 is not followed by the next",
    ),
    "shards not in order": (lambda a: a["shard"].__setitem__(slice(0, 8), a["shard"][::-1].copy()), "block"),
    "records moved": (
        lambda a: (at("records", 2, 7)(a), at("records", 3, 9)(a)),
        r"23 records in shard-00000\.tar where the manifest says 24",
    ),
    "no atoms": (at("atoms", 5, 0), "record 5 has 0 atoms"),
}


@pytest.mark.parametrize("name", INDICES)
def test_indices_that_contradict(folder, name):
    change, message = INDICES[name]
    edit_index(folder, change)
    refused(folder, rf"index\.safetensors: {message}")


def test_an_index_that_is_no_safetensors(folder):
    (folder / INDEX).write_bytes(b"not at all")
    digest = hashlib.sha256(b"not at all").hexdigest()
    edit_manifest(folder, lambda manifest: manifest.update(index_sha256=digest))
    refused(folder, r"index\.safetensors: its header should end at byte")


def test_an_index_that_is_a_folder(folder):
    (folder / INDEX).unlink()
    (folder / INDEX).mkdir()
    refused(folder, r"index\.safetensors: cannot be read \(.*Is a directory")


def test_no_records_at_all(tmp_path):
    write_set(tmp_path / "set", plain([3]))
    manifest = json.loads((tmp_path / "set/manifest.json").read_text())
    (tmp_path / "set/manifest.json").write_text(json.dumps(manifest | {"records": 0}))
    with pytest.raises(UserError, match=r"manifest\.json: records is 0; see rejects\.jsonl .* build it again"):
        ShardSet.open(tmp_path / "set")


def test_a_shard_that_is_cut_while_it_is_read(folder):
    shardset = ShardSet.open(folder)
    shardset.read(0)
    path = folder / "shard-00000.tar"
    with path.open("r+b") as file:
        file.truncate(int(shardset.offset[1]) + 50)
    shardset.read(0)
    with pytest.raises(BadBlock, match=r"block 1 is damaged \(50 bytes of \d+\); copy the shard") as e:
        shardset.read(1)
    assert (e.value.path, e.value.number) == (str(path), 1)


def test_a_bad_block_comes_through_a_queue():
    """As from a loader's worker."""
    error = pickle.loads(pickle.dumps(BadBlock("set/shard-00000.tar", 3, "checksum")))
    assert (type(error), error.path, error.number) == (BadBlock, "set/shard-00000.tar", 3)
    assert str(error) == "set/shard-00000.tar: block 3 is damaged (checksum); copy the shard again or build it again"


def test_a_header_of_the_tar_is_only_found_by_verify(folder):
    """Reading does not need it; WebDataset does."""
    path = folder / "shard-00001.tar"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    shardset = ShardSet.open(folder)
    assert len(list(shardset.records(range(60)))) == 60
    with pytest.raises(UserError, match=r"shard-00001\.tar: is damaged \(sha256\)"):
        shardset.verify()


def test_a_block_that_was_written_wrong(folder):
    """Its checksum is right and its arrays do not fit together."""
    shardset = ShardSet.open(folder)
    number, size = 5, int(shardset.size[5])
    arrays = {name: a.copy() for name, a in blocks.decode(shardset.read(number)).items() if name}
    arrays["ptr"][2], arrays["ptr"][3] = arrays["ptr"][3], arrays["ptr"][2]
    data = save(arrays, metadata=blocks.decode(shardset.read(number))[""])
    assert len(data) == size
    path = folder / "shard-00001.tar"
    content = bytearray(path.read_bytes())
    begin = int(shardset.offset[number])
    content[begin : begin + size] = data
    path.write_bytes(content)
    edit_index(folder, at("checksum", number, checksum(data)))
    digest = hashlib.sha256(content).hexdigest()
    edit_manifest(folder, lambda manifest: manifest["shards"][1].update(sha256=digest))
    shardset = ShardSet.open(folder)
    shardset.read(number)
    for read in (lambda: shardset.block(number), shardset.verify, lambda: list(shardset.records([40]))):
        with pytest.raises(BadBlock, match=r"shard-00001\.tar: block 5 is damaged \(ptr does not rise from 0\)"):
            read()


@pytest.mark.parametrize(
    "records",
    [
        [record("alone", 1)],
        [record("small", 3), record("large", 200, seed=1), record("small too", 3, seed=2)],
        plain([200]),
    ],
    ids=["one atom", "200 beside 3", "one of 200"],
)
@pytest.mark.parametrize("block", [1, 256])
def test_small_and_uneven_sets(tmp_path, records, block):
    write_set(tmp_path / "set", records, block=block)
    shardset = ShardSet.open(tmp_path / "set")
    shardset.verify()
    assert len(shardset) == len(records)
    for one, other in zip(records, shardset.records(range(len(records))), strict=True):
        assert_same(one, other)
