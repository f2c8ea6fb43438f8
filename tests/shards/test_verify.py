"""Sets on the disk: every kind of damage is found and named; several become one."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from mspt.data.shardset import ShardSet
from mspt.errors import UserError
from shards.cli import main
from shards.merge import merge
from shards.sources import qm9
from shards.verify import verify
from tests.data.molecules import assert_same, plain, record, spectrum, write_set
from tests.shards.made import content, make

BUNDLED = Path(__file__).parents[2] / "shards/bundled"


def records(prefix, count, target="gap"):
    """With all that a record can have."""
    made = []
    for i in range(count):
        spectra = {"ir": spectrum("ir", ["lines", "values16"][i % 2], i), "raman": spectrum("raman", "lines", i)}
        made.append(record(f"{prefix}-{i:03d}", 2 + i % 5, seed=i, spectra=spectra, targets={target: float(i)}))
    return made


@pytest.fixture
def folder(tmp_path):
    make(records("a", 40), tmp_path / "set", shard=20)
    return tmp_path / "set"


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def change(folder, entry, value):
    """Set an entry of the manifest, given as names on the way to it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    *way, last = entry
    place = manifest
    for name in way:
        place = place[name]
    place[last] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


def another_index(folder, trusted):
    """The index of a set of other records; trusted: the manifest takes it for its own."""
    other = folder.with_name("other")
    make([*records("a", 20), *records("b", 20)[::-1]], other, shard=20)
    shutil.copy(other / "index.safetensors", folder)
    if trusted:
        digest = hashlib.sha256((folder / "index.safetensors").read_bytes()).hexdigest()
        change(folder, ["index_sha256"], digest)


DAMAGE = {
    "a flipped bit in a block": (lambda f: flip(f / "shard-00001.tar", 3000), "shard-00001.tar: block 5 is damaged"),
    "a flipped bit between blocks": (lambda f: flip(f / "shard-00001.tar", 20), "shard-00001.tar: is damaged outside"),
    "a cut": (lambda f: os.truncate(f / "shard-00000.tar", 20480), "shard-00000.tar: 20480 bytes where the manifest"),
    "a missing shard": (lambda f: (f / "shard-00001.tar").unlink(), "shard-00001.tar: .* is missing"),
    "a missing index": (lambda f: (f / "index.safetensors").unlink(), "index.safetensors: .* is missing"),
    "a missing manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: not there"),
    "a flipped bit in the index": (lambda f: flip(f / "index.safetensors", -1), "index.safetensors: is damaged"),
    "another index": (lambda f: another_index(f, False), "index.safetensors: is damaged"),
    "another index with its sum": (lambda f: another_index(f, True), "shard-00001.tar: block 5 is damaged"),
    "atoms": (lambda f: change(f, ["atoms"], 7), "atoms is 160 where the manifest says 7"),
    "records": (lambda f: change(f, ["records"], 41), "manifest.json: records is 41, but its shards have 40"),
    "elements": (lambda f: change(f, ["elements", "C"], 10**6), "manifest.json: elements is .* where"),
    "targets": (lambda f: change(f, ["targets"], ["homo"]), "manifest.json: targets is .* where the shards hold .*gap"),
    "spectra": (lambda f: change(f, ["spectra", "ir", "values", "std"], 1.0), "manifest.json: spectra is .* where"),
    "records of a shard": (
        lambda f: change(f, ["shards", 1, "records"], 19),
        "manifest.json: records is 40, but its shards have 39",
    ),
    "blocks of a shard": (
        lambda f: change(f, ["shards", 0, "blocks"], 6),
        "index.safetensors: shard has 10 values where the manifest says 11 blocks",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(folder, name, capsys):
    verify(folder)
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        verify(folder)
    with pytest.raises(SystemExit) as end:
        main(["verify", str(folder)])
    assert end.value.code == 2 and capsys.readouterr().err == f"shards: error: {error.value}\n"


def test_a_key_that_is_there_twice(tmp_path):
    write_set(tmp_path / "set", [*plain([2] * 30), plain([2] * 20)[-1]], block=4, blocks_per_shard=2)
    with pytest.raises(UserError, match="set: the key mol-00019 is there twice"):
        verify(tmp_path / "set")


def test_all_parts_of_a_build_are_read(tmp_path, capsys):
    make(records("a", 40), tmp_path / "out", split="val=0.3,test=0.3")
    main(["verify", str(tmp_path / "out"), str(tmp_path / "out/test")])
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == [
        f"{tmp_path}/out/{part}" for part in ("test", "train", "val", "test")
    ]
    assert said[0] == said[3] and all(" atoms, " in line for line in said)


def test_sets_become_one(folder, tmp_path, capsys):
    """All records in their order, in the same files, with the statistics of a set that was built in one."""
    make(records("b", 25, "homo"), tmp_path / "second", shard=10)
    before = content(tmp_path)
    main(["merge", str(tmp_path / "both"), str(folder), str(tmp_path / "second")])
    assert "both: 65 records" in capsys.readouterr().out
    merged = verify(tmp_path / "both")
    for one, other in zip(merged.records(range(65)), records("a", 40) + records("b", 25, "homo"), strict=True):
        assert_same(one, other)
    assert (tmp_path / "both/shard-00002.tar").samefile(tmp_path / "second/shard-00000.tar")
    assert {path: digest for path, digest in content(tmp_path).items() if not path.startswith("both/")} == before
    write_set(tmp_path / "one", records("a", 40) + records("b", 25, "homo"), block=4, blocks_per_shard=5)
    one, other = merged.manifest, ShardSet.open(tmp_path / "one").manifest
    assert (one["elements"], one["atoms"], one["targets"]) == (other["elements"], other["atoms"], ["gap", "homo"])
    for name, said in other["spectra"].items():
        for part in said:
            assert one["spectra"][name][part] == pytest.approx(said[part]), (name, part)
    provenance = one["provenance"]
    assert provenance["command"] == f"shards merge {folder} {tmp_path / 'second'}" and provenance["source"] == "made"
    assert provenance["units"] == {"gap": "eV"} and len(provenance["sets"]) == 2


def test_the_bundled_spectra_become_one_set(tmp_path):
    """As docs/chemistry.md says; the units of QM9's targets stay."""
    sets = [BUNDLED / name / "heldout" for name in ("qm9-spectra", "qm9-ir-raman")]
    manifest = merge(tmp_path / "both", sets, "made")
    assert manifest["records"] == 223 + 283
    assert manifest["provenance"]["units"].items() >= qm9.TARGET_UNITS.items()


def test_shards_are_copied_where_they_cannot_be_linked(folder, tmp_path, monkeypatch):
    def link(*arguments):
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", link)
    merge(tmp_path / "copy", [folder], "made")
    verify(tmp_path / "copy")
    assert not (tmp_path / "copy/shard-00000.tar").samefile(folder / "shard-00000.tar")


def test_sets_that_cannot_become_one(folder, tmp_path):
    make([*records("a", 5), *records("c", 5)], tmp_path / "shared")
    with pytest.raises(
        UserError, match=r"more are there twice: a-000 \(.*set, .*shared\); a-001 .*; leave a set out"
    ) as error:
        merge(tmp_path / "both", [folder, tmp_path / "shared"], "made")
    assert "\n" not in str(error.value) and "a-003" not in str(error.value)
    write_set(tmp_path / "kcal", records("d", 5))
    change(tmp_path / "kcal", ["provenance", "units"], {"gap": "kcal/mol"})
    with pytest.raises(UserError, match="gap is in eV in .*set and in kcal/mol in .*kcal; build one"):
        merge(tmp_path / "both", [folder, tmp_path / "kcal"], "made")
    change(tmp_path / "kcal", ["provenance", "units"], {})
    for sets, reason in (
        ([folder, tmp_path / "kcal"], "gap is in eV in .*set and without a unit in .*kcal; build one"),
        ([tmp_path / "kcal", folder], "gap is without a unit in .*kcal and in eV in .*set; build one"),
    ):
        with pytest.raises(UserError, match=reason):
            merge(tmp_path / "both", sets, "made")
    with pytest.raises(UserError, match="set: is there already"):
        merge(folder, [folder], "made")
    flip(folder / "shard-00001.tar", 3000)
    with pytest.raises(UserError, match="shard-00001.tar: block 5 is damaged"):
        merge(tmp_path / "both", [folder], "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kcal", "set", "shared"]
