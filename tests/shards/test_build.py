"""The builder: whole or not there, the same bytes every time, nothing lost without a line that says why."""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mspt.data.schema import Lines
from mspt.data.shardset import ShardSet
from mspt.errors import UserError
from shards import build as module
from shards.build import build, held_out, main
from shards.sources import qm9
from tests.data.molecules import plain, record

ROOT = Path(module.__file__).parent.parent


def keys(folder):
    shardset = ShardSet.open(folder)
    return [r.key for r in shardset.records(range(len(shardset)))]


def content(folder):
    """File -> hash of its bytes, of a whole folder."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rejects(folder):
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]


def computed_row(number):
    """A row of results.jsonl as shards.sources.computed writes it."""
    return {
        "key": f"qm9-{number:06d}",
        "smiles": "O",
        "numbers": [8, 1, 1],
        "positions": [[0.0, 0.0, 0.1], [0.0, 0.76, -0.47], [0.0, -0.76, -0.47]],
        "targets": {"gap": 7.0 + number},
        "method": {"ir": "xTB", "raman": "xTB", "uv_vis": "TD-DFT"},
        "ir": [[-5.0, 12.0, 1500.0, 3600.0], [9.0, 9.0, 70.0, 1e-9]],
        "raman": [[1500.0], [2.0]],
        "uv_vis": [[7.5, 9.1], [0.1, 1e-9]],
        "seconds": {"vibrations": 0.5, "excitations": 1.0},
    }


@pytest.fixture
def computed(tmp_path):
    """A folder as shards.sources.computed leaves it: rows in no order, a reject, a line torn by a kill."""
    folder = tmp_path / "computed"
    folder.mkdir()
    rows = [json.dumps(computed_row(number)) for number in np.random.default_rng(0).permutation(40)]
    (folder / "results.jsonl").write_text("\n".join(rows) + '\n{"key": "qm9-0')
    (folder / "rejects.jsonl").write_text(json.dumps({"key": "qm9-000777", "smiles": "C", "reason": "no SCF"}) + "\n")
    return folder


def test_computed_spectra(computed, tmp_path, capsys):
    out = tmp_path / "out"
    main(["computed", "--from", str(computed), "--out", str(out), "--split", "0.25", "--block", "8"])
    train, heldout = keys(out / "train"), keys(out / "heldout")
    assert sorted(train + heldout) == [f"qm9-{number:06d}" for number in range(40)]
    assert set(heldout) == {key for key in train + heldout if held_out(key, 0.25)}
    assert rejects(out) == [{"key": "qm9-000777", "field": "spectra", "reason": "no SCF"}]
    shardset = ShardSet.open(out / "train")
    shardset.verify()
    one = next(shardset.records([0]))
    assert one.methods == {"ir": "xTB", "raman": "xTB", "uv_vis": "TD-DFT"} and one.targets == {"gap": 7.0}
    # Neither hindered rotations nor lines without strength.
    assert {name: lines.positions.tolist() for name, lines in one.spectra.items()} == {
        "ir": [1500.0],
        "raman": [1500.0],
        "uv_vis": [7.5],
    }
    assert shardset.manifest["provenance"]["command"].startswith("python -m shards.build computed --from")
    assert shardset.manifest["provenance"]["methods"] == one.methods
    said = capsys.readouterr().out
    assert f"{len(train)} records, {3 * len(train)} atoms" in said and "1 refused (rejects.jsonl)" in said


def test_qm9_geometries(tmp_path, monkeypatch):
    """Through the real source, of which only the 130 831 molecules are cut to the first 60."""
    with qm9.files()[0].open("rb") as file:
        (tmp_path / "short.csv").write_bytes(b"".join(itertools.islice(file, 61)))
    monkeypatch.setattr(qm9, "files", lambda: [tmp_path / "short.csv"])
    some = list(qm9.molecules())
    main(["qm9", "--count", "30", "--out", str(tmp_path / "out")])
    found = keys(tmp_path / "out")
    assert len(found) == 30 and found == sorted(found) and found != [m.key for m in some[:30]]
    one = next(ShardSet.open(tmp_path / "out").records([0]))
    assert one.spectra == {} and one.source.startswith("QM9")
    assert one.targets == next(m.targets for m in some if m.key == one.key)
    assert ShardSet.open(tmp_path / "out").manifest["provenance"]["units"]["gap"] == "eV"


def test_the_same_input_gives_the_same_bytes(computed, tmp_path):
    command = ["computed", "--from", str(computed), "--out", "out", "--split", "0.25", "--block", "8"]
    results = []
    for name, hashed in (("first", "0"), ("second", "1")):
        folder = tmp_path / name
        folder.mkdir()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hashed}
        subprocess.run([sys.executable, "-m", "shards.build", *command], cwd=folder, env=environment, check=True)
        results.append(content(folder))
    assert results[0] == results[1]
    assert {path.split("/")[1] for path in results[0]} == {"train", "heldout", "rejects.jsonl"}


BAD = [
    (record("bad-1", positions=np.full((3, 3), np.nan, np.float32)), "positions"),
    (record("bad-2", numbers=np.zeros(0, np.uint8), positions=np.zeros((0, 3), np.float32)), "numbers"),
    (record("mol-00002"), "key"),
    (record("", 2), "key"),
    (record("bad-3", spectra={"ir": Lines(np.ones(1, np.float32), -np.ones(1, np.float32))}), "spectra.ir"),
]


def test_refused_records_are_listed_and_counted(tmp_path):
    records = [*plain([2] * 6), *(one for one, _ in BAD), *[record("last", 4)]]
    manifests, refused = build(records, [{"key": "x", "field": "y", "reason": "z"}], tmp_path / "out", {})
    assert manifests[""]["records"] == 7
    assert keys(tmp_path / "out") == [f"mol-{i:05d}" for i in range(6)] + ["last"]
    assert rejects(tmp_path / "out") == refused
    assert [(row["key"], row["field"]) for row in refused] == [("x", "y"), *((one.key, field) for one, field in BAD)]
    assert all(row["reason"] for row in refused)


def test_strict_stops_at_the_first_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="bad-1: positions: not finite; leave --strict out to list it"):
        build([*plain([2] * 6), BAD[0][0]], [], tmp_path / "out", {}, strict=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": 1.5}, "--split is 1.5; give a share between 0 and 1"),
        ({"split": 0.0}, "--split is 0.0; give a share"),
        ({"block": 0}, "--block is 0; give 1 or more"),
        ({"split": 1e-9}, "heldout: no record is left for it, of 6 good and 0 refused ones .* give more molecules"),
        ({"records": [BAD[0][0]]}, "out: no record is left for it, of 0 good and 1 refused ones"),
    ],
)
def test_wrong_arguments(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        build(**({"records": plain([2] * 6), "rejects": [], "out": tmp_path / "out", "provenance": {}} | changes))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(tmp_path):
    build(plain([2] * 6), [], tmp_path / "out", {})
    before = content(tmp_path)
    with pytest.raises(UserError, match="out: is there already; remove it or choose another --out"):
        build(plain([3] * 6), [], tmp_path / "out", {})
    assert content(tmp_path) == before


def test_errors_at_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["computed", "--from", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "nothing: no results.jsonl with results; run python -m shards.sources.computed first" in said
    assert said.count("\n") == 1


def test_a_killed_build_leaves_nothing_under_the_final_name_and_starts_again(tmp_path):
    """SIGKILL in the middle of the second shard, in a process of its own."""
    script = f"""
import os, signal
from shards.build import build
from tests.data.molecules import plain

def records(kill):
    for number, one in enumerate(plain([2] * 300)):
        if kill and number == 200:
            os.kill(os.getpid(), signal.SIGKILL)
        yield one

build(records(True), [], {str(tmp_path / "out")!r}, {{}}, split=0.2, block=2)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert (tmp_path / ".out.partial" / "train" / "shard-00000.tar").exists()
    build(plain([2] * 300), [], tmp_path / "out", {}, split=0.2, block=2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(keys(tmp_path / "out" / "train")) + len(keys(tmp_path / "out" / "heldout")) == 300
    for part in ("train", "heldout"):
        ShardSet.open(tmp_path / "out" / part).verify()


def test_the_same_molecules_are_held_out_of_every_set(tmp_path):
    """Of a small set, of a large one, and of one in another order; more of them for a larger share."""
    many = plain([2] * 200)
    for name, records in (("all", many), ("few", many[50:90]), ("back", many[::-1])):
        build(records, [], tmp_path / name, {}, split=0.2)
    whole = set(keys(tmp_path / "all" / "heldout"))
    assert set(keys(tmp_path / "back" / "heldout")) == whole
    few = {one.key for one in many[50:90]}
    assert set(keys(tmp_path / "few" / "heldout")) == whole & few
    assert {key for key in few if held_out(key, 0.1)} <= whole
    assert np.mean([held_out(f"qm9-{i:06d}", 0.1) for i in range(10_000)]) == pytest.approx(0.1, abs=0.01)
    # Pinned, because sets that are built at different times must agree.
    assert [i for i in range(60) if held_out(f"qm9-{i:06d}", 0.1)] == [6, 9, 14, 19, 24, 28, 32, 38, 47, 57]
