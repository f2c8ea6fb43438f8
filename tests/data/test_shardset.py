"""A shard set: what plain packages read of it, and what is said when something is wrong with it."""

import hashlib
import json
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest
import safetensors.numpy
import webdataset
from safetensors.numpy import load

from mspt.chemistry.elements import SYMBOLS
from mspt.data.shardset import ShardSet
from mspt.errors import UserError
from tests.data.molecules import assert_same, record, spectrum, write_set

RECORDS = [
    record(
        f"mol-{i:03d}",
        1 + i % 7,
        seed=i,
        spectra={} if i % 4 == 0 else {"ir": spectrum("ir", "lines", i), "uv_vis": spectrum("uv_vis", "values32", i)},
        targets={"gap": float(i)},
    )
    for i in range(50)
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "set"
    write_set(folder, RECORDS, block=8, blocks_per_shard=3)
    return folder


@pytest.fixture
def folder(built, tmp_path):
    """A copy to break."""
    return shutil.copytree(built, tmp_path / "set")


def test_plain_webdataset_and_safetensors_read_a_shard(built):
    """Three lines, no mspt: what the documentation promises."""
    keys = []
    shards = sorted(str(path) for path in built.glob("*.tar"))
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        block = safetensors.numpy.load(sample["safetensors"])
        keys.append(block["keys"].tobytes().decode())
    assert "".join(keys) == "".join(r.key for r in RECORDS)


def test_every_record_in_any_order(built):
    shardset = ShardSet.open(built)
    assert len(shardset) == 50
    for one, other in zip(RECORDS, shardset.records(range(50)), strict=True):
        assert_same(one, other)
    chosen = [49, 0, 17, 17, 8, 7]
    for number, other in zip(chosen, shardset.records(chosen), strict=True):
        assert_same(RECORDS[number], other)
    for number in (50, -1):
        with pytest.raises(IndexError, match=f"record {number} of"):
            list(shardset.records([number]))


def test_manifest_and_index_say_what_is_there(built):
    shardset = ShardSet.open(built)
    manifest = shardset.manifest
    assert (manifest["records"], manifest["atoms"]) == (50, sum(len(r.numbers) for r in RECORDS))
    assert manifest["largest"] == 7
    assert Counter(manifest["elements"]) == Counter(SYMBOLS[z] for r in RECORDS for z in r.numbers)
    assert manifest["spectra"].keys() == {"ir", "uv_vis"}
    for name, counts in manifest["spectra"].items():
        assert counts["records"] == sum(name in r.spectra for r in RECORDS)
    uv_vis = [r.spectra["uv_vis"] for r in RECORDS if r.spectra]
    assert manifest["spectra"]["uv_vis"]["mean_total"] == pytest.approx(np.sum(uv_vis, dtype=float) / len(uv_vis))
    assert [(s["file"], s["blocks"], s["records"]) for s in manifest["shards"]] == [
        ("shard-00000.tar", 3, 24),
        ("shard-00001.tar", 3, 24),
        ("shard-00002.tar", 1, 2),
    ]
    for shard in manifest["shards"]:
        data = (built / shard["file"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert shardset.atoms.tolist() == [len(r.numbers) for r in RECORDS]
    # Offsets point at the members' content.
    for number in range(7):
        assert len(load(shardset.read(number))["ptr"]) - 1 == shardset.block_records[number]
    shardset.verify()
    assert not list(built.glob(".*"))


def test_the_index_is_plain_safetensors(built):
    index = load((built / "index.safetensors").read_bytes())
    shardset = ShardSet.open(built)
    for name, own in (("atoms", shardset.atoms), ("offset", shardset.offset), ("records", shardset.block_records)):
        np.testing.assert_array_equal(index[name], own)
        assert index[name].dtype == own.dtype


def test_a_worker_that_is_not_forked_opens_it_itself(built):
    data = pickle.dumps(ShardSet.open(built))
    assert len(data) < 500
    assert len(pickle.loads(data)) == 50


def edit(folder, **changes):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in manifest.items() if value is not None}))


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


BROKEN = {
    "no folder": (shutil.rmtree, r"manifest\.json: not there, so .*set is no shard set; build"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json: not there, so .*; build"),
    "torn manifest": (
        lambda f: (f / "manifest.json").write_text('{"schema'),
        r"manifest\.json: cannot be read as JSON",
    ),
    "manifest of something else": (lambda f: (f / "manifest.json").write_text("[]"), "schema_version is None"),
    "newer schema": (lambda f: edit(f, schema_version=99), r"manifest\.json: schema_version is 99, this mspt reads 3"),
    "no shards listed": (lambda f: edit(f, shards=None), r"manifest\.json: shards is missing; restore"),
    "other grids": (lambda f: edit(f, grids={"ir": {"start": 0}}), r"manifest\.json: grids differ .* build"),
    "empty set": (lambda f: edit(f, records=0, shards=[]), r"manifest\.json: records is 0; .* build it again"),
    "no index": (lambda f: (f / "index.safetensors").unlink(), r"index\.safetensors: .* missing; restore"),
    "damaged index": (lambda f: flip(f / "index.safetensors", -3), r"index\.safetensors: is damaged .* copy it again"),
    "no shard": (lambda f: (f / "shard-00001.tar").unlink(), r"shard-00001\.tar: .* missing; restore"),
    "cut shard": (
        lambda f: (f / "shard-00001.tar").write_bytes((f / "shard-00001.tar").read_bytes()[:-512]),
        r"shard-00001\.tar: \d+ bytes where the manifest says \d+; copy it again",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_sets_are_refused_when_they_are_opened(folder, name):
    damage, message = BROKEN[name]
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        ShardSet.open(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_flipped_byte_is_found_when_its_block_is_read(folder):
    shardset = ShardSet.open(folder)
    damaged = 4
    flip(folder / "shard-00001.tar", int(shardset.offset[damaged]) + 100)
    shardset = ShardSet.open(folder)
    shardset.read(damaged - 1)
    with pytest.raises(UserError, match=r"shard-00001\.tar: block 4 is damaged \(checksum\); copy the shard again"):
        shardset.read(damaged)
    with pytest.raises(UserError, match=r"shard-00001\.tar: is damaged \(sha256\); copy the shard again"):
        shardset.verify()


def test_a_shard_that_goes_away_while_it_is_read(folder):
    shardset = ShardSet.open(folder)
    (folder / "shard-00000.tar").unlink()
    with pytest.raises(UserError, match=r"shard-00000\.tar: cannot be read \(No such file or directory\); restore"):
        shardset.read(0)


def test_verify_finds_an_index_of_other_records(folder):
    shardset = ShardSet.open(folder)
    shardset.atoms = shardset.atoms[::-1]
    with pytest.raises(UserError, match=r"index\.safetensors: disagrees with block 0; build"):
        shardset.verify()
