"""The builder: whole or not there, the same bytes every time, nothing lost without a line that says why."""

import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

import shards
from mspt.chemistry.spectra import GRIDS
from mspt.data.schema import Lines, RejectedRecord
from mspt.data.shardset import ShardSet
from mspt.errors import UserError
from shards.cli import main
from shards.sources import qm9
from shards.split import Split
from shards.verify import verify
from tests.data.molecules import plain, record, spectrum
from tests.shards.made import content, keys, lines, make

ROOT = Path(shards.__file__).parent.parent


def held_out(key, share):
    return Split({"heldout": share}).part(key) == 1


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
    arguments = ["--split", "0.25", "--block", "8", "--processes", "1"]
    main(["build", "computed", "--from", str(computed), "--out", str(out), *arguments])
    train, heldout = keys(out / "train"), keys(out / "heldout")
    assert sorted(train + heldout) == [f"qm9-{number:06d}" for number in range(40)]
    assert set(heldout) == {key for key in train + heldout if held_out(key, 0.25)}
    assert lines(out / "rejects.jsonl") == [{"key": "qm9-000777", "field": "spectra", "reason": "no SCF"}]
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
    assert shardset.manifest["provenance"]["command"].startswith("shards build computed --from")
    assert "--out" not in shardset.manifest["provenance"]["command"]
    assert shardset.manifest["provenance"]["methods"] == one.methods
    said = capsys.readouterr().out
    assert f"{len(train)} records, {3 * len(train)} atoms" in said and "1 refused (rejects.jsonl)" in said
    assert "1  spectra: no SCF" in said and "1 molecules in several records, 1 of them in several parts" in said


def test_qm9_geometries(tmp_path, monkeypatch):
    """Through the real source, of which only the 130 831 molecules are cut to the first 60."""
    with qm9.files()[0].open("rb") as file:
        (tmp_path / "short.csv").write_bytes(b"".join(itertools.islice(file, 61)))
    monkeypatch.setattr(qm9, "files", lambda: [tmp_path / "short.csv"])
    some = list(qm9.molecules())
    main(["build", "qm9", "--count", "30", "--out", str(tmp_path / "out"), "--processes", "1"])
    found = keys(tmp_path / "out")
    assert len(found) == 30 and found == sorted(found) and found != [m.key for m in some[:30]]
    one = next(ShardSet.open(tmp_path / "out").records([0]))
    assert one.spectra == {} and one.source.startswith("QM9")
    assert one.targets == next(m.targets for m in some if m.key == one.key)
    assert ShardSet.open(tmp_path / "out").manifest["provenance"]["units"]["gap"] == "eV"


def run(folder, command, **environment):
    """A build by `python -m shards`, in a folder and in a process group of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [sys.executable, "-m", "shards", "build", *command],
        cwd=folder,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )


def chunks(folder):
    return list((folder / ".out.partial").glob("chunk-*"))


def wait_until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def workers(process):
    """The processes that work for one, without the one that multiprocessing tracks resources with."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [path for pid in found if b"spawn_main" in (path := Path("/proc") / pid).joinpath("cmdline").read_bytes()]


def kill(process, folder, count, all_of_them):
    """Kill a build, or only its first process, some time after more than count chunks are done."""
    wait_until(lambda: process.poll() is not None or len(chunks(folder)) > count)
    time.sleep(random.uniform(0, 0.05))
    paths = workers(process)
    assert len(paths) == 2
    if all_of_them:
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    wait_until(lambda: not any(path.exists() for path in paths))


def test_killed_at_random_the_same_command_goes_on_to_the_same_bytes(tmp_path):
    """Real processes, of which first all are killed, and then only the one that hands out."""
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(computed_row(number)) + "\n" for number in range(1000)))
    command = ["computed", "--from", str(tmp_path), "--split", "0.25", "--shard", "20", "--block", "4", "--out"]
    main(["build", *command, str(tmp_path / "whole"), "--processes", "1"])
    for all_of_them in (True, False):
        done = len(chunks(tmp_path))
        kill(run(tmp_path, [*command, "out", "--processes", "2"]), tmp_path, done + 4, all_of_them)
        assert done + 4 < len(chunks(tmp_path)) < 50 and not (tmp_path / "out").exists()
    main(["build", *command, str(tmp_path / "out"), "--processes", "1"])
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "whole", "out"}


def items():
    """Forty records in three chunks: bad ones, keys and molecules that come again in the same and in other chunks."""
    made = plain([2] * 40)
    for number, smiles in ((1, "OC"), (5, "CO"), (9, "c1ccccc1"), (20, "CO"), (35, "C1=CC=CC=C1")):
        made[number] = record(f"mol-{number:05d}", 3, seed=number, smiles=smiles)
    made[3] = RejectedRecord("mol-00003", "field", "a reason")
    made[17] = record("mol-00002", 4)
    made[18] = record("mol-00016", 4)
    made[33] = record("mol-00030", 4, targets={"gap": 1.0})
    made[34] = record("bad", positions=np.full((3, 3), np.nan, np.float32))
    return made


OPTIONS = {"split": "0.25", "inchikey": True, "drop_duplicates": True}
# What changes a folder: a kill before each of these calls is every state that a kill can leave.
CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir")


def _make_and_die(out, calls):
    """Build, but end as SIGKILL does before the call that has this number."""
    counted = itertools.count()

    def counting(call):
        def before(*arguments, **options):
            if next(counted) == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return before

    for name in CALLS:
        setattr(os, name, counting(getattr(os, name)))
    make(items(), out, shard=20, **OPTIONS)


def test_killed_before_any_change_of_a_folder_it_goes_on_to_the_same_bytes(tmp_path):
    make(items(), tmp_path / "whole", shard=20, **OPTIONS)
    whole = content(tmp_path / "whole")
    for calls in itertools.count():
        folder = tmp_path / str(calls)
        folder.mkdir()
        process = get_context("fork").Process(target=_make_and_die, args=(folder / "out", calls))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if (folder / "out").exists():  # in its place, and only what it was made in is left
            assert content(folder / "out") == whole
            with pytest.raises(UserError, match="out: is there already"):
                make(items(), folder / "out", shard=20, **OPTIONS)
        else:
            make(items(), folder / "out", shard=20, **OPTIONS)
        assert content(folder / "out") == whole, calls
        assert [path.name for path in folder.iterdir() if path.name != "out" and (path / "chunk-00000").exists()] == []
        shutil.rmtree(folder)
    assert calls > 50


def test_what_comes_again_in_other_chunks(tmp_path):
    """Keys are refused, molecules are told of or, if asked for, left out; what stays is the first."""
    kept = make(items(), tmp_path / "kept", inchikey=True, split="0.25")
    dropped = make(items(), tmp_path / "dropped", **OPTIONS)
    for name in ("kept", "dropped"):
        rows = lines(tmp_path / name / "rejects.jsonl")
        assert [(row["key"], row["field"]) for row in rows] == [
            ("mol-00003", "field"),
            ("mol-00002", "key"),
            ("mol-00016", "key"),
            ("mol-00030", "key"),
            ("bad", "positions"),
        ]
        groups = lines(tmp_path / name / "duplicates.jsonl")
        methanol, benzene = ["mol-00001", "mol-00005", "mol-00020"], ["mol-00009", "mol-00035"]
        assert [row["keys"] for row in groups] == [methanol, benzene]
        assert groups[1]["inchikey"] == "UHOVQNZJYSORNB-UHFFFAOYSA-N"
        for row in groups:
            assert row["parts"] == ["heldout" if held_out(key, 0.25) else "train" for key in row["keys"]]
        for part in ("train", "heldout"):
            verify(tmp_path / name / part)
    every = [f"mol-{number:05d}" for number in range(40) if number not in (3, 17, 18, 33, 34)]
    for name, left in (("kept", []), ("dropped", [*methanol[1:], *benzene[1:]])):
        found = sorted(keys(tmp_path / name / "train") + keys(tmp_path / name / "heldout"))
        assert found == [key for key in every if key not in left]
    assert (kept.duplicates, kept.dropped, dropped.duplicates, dropped.dropped) == (2, 0, 2, 3)
    assert kept.leaking == sum(len(set(row["parts"])) > 1 for row in groups)
    assert kept.refused == {"field: a reason": 1, "key: is there twice": 3, "positions: not finite": 1}


def test_parts_one_after_another(tmp_path):
    make(items(), tmp_path / "whole", **OPTIONS)
    whole = content(tmp_path / "whole")
    for part in ("2/3", "0/3"):
        assert make(items(), tmp_path / "out", part=part, **OPTIONS) is None
        assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in chunks(tmp_path)) == ["chunk-00000", "chunk-00002"]
    make(items(), tmp_path / "out", **OPTIONS)
    assert content(tmp_path / "out") == whole


def test_parts_side_by_side(tmp_path):
    make(items() * 20, tmp_path / "whole")
    context = get_context("fork")
    parts = [
        context.Process(target=make, args=(items() * 20, tmp_path / "out"), kwargs={"part": f"{number}/4"})
        for number in range(4)
    ]
    for process in parts:
        process.start()
    for process in parts:
        process.join()
    assert [process.exitcode for process in parts] == [0] * 4
    assert len(chunks(tmp_path)) == 50
    make(items() * 20, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(("part", "refused"), [(None, True), ("0/2", True), ("1/2", False)])
def test_no_two_do_the_same_work(tmp_path, part, refused):
    """While part 0/2 is at work."""
    make(items(), tmp_path / "out", part="0/2")
    with (tmp_path / ".out.partial/build.json").open("a") as a, (tmp_path / ".out.partial/part-0-of-2").open("a") as b:
        fcntl.flock(a, fcntl.LOCK_SH)
        fcntl.flock(b, fcntl.LOCK_EX)
        if refused:
            with pytest.raises(UserError, match="another build is at work there; wait until it has ended"):
                make(items(), tmp_path / "out", part=part)
        else:
            make(items(), tmp_path / "out", part=part)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": 5}, "was begun with block = 4, now it is 5; give the command that it was begun with, or remove "),
        ({"split": "0.5"}, "was begun with split = None, now it is 0.5"),
        ({"inputs": []}, "raw: has changed since this build was begun"),
    ],
)
def test_a_build_of_something_else_does_not_go_on(tmp_path, changes, message):
    raw = tmp_path / "raw"
    raw.write_text("1")
    options = {"part": "0/2", "inputs": [raw]}
    make(items(), tmp_path / "out", **options)
    make(items(), tmp_path / "out", **options)
    with pytest.raises(UserError, match=message) as error:
        make(items(), tmp_path / "out", **options | changes)
    assert "\n" not in str(error.value) and ".out.partial" in str(error.value)
    raw.write_text("12")
    with pytest.raises(UserError, match="raw: has changed since this build was begun"):
        make(items(), tmp_path / "out", **options)
    shutil.rmtree(tmp_path / ".out.partial")
    (tmp_path / ".out.partial/train").mkdir(parents=True)
    with pytest.raises(UserError, match="is there, but not of this program; remove it"):
        make(items(), tmp_path / "out", **options)


def test_the_same_input_gives_the_same_bytes(computed, tmp_path):
    """At the command line, for other hashes of strings, another --out and another number of processes."""
    command = ["computed", "--from", str(computed), "--split", "0.25", "--block", "8", "--shard", "16"]
    commands = (
        [*command, "--out", "out", "--processes", "2"],
        [*command[:3], "--processes=1", "--out=other", *command[3:]],
    )
    for hashed, one in enumerate(commands):
        assert run(tmp_path, one, PYTHONHASHSEED=str(hashed)).wait(60) == 0
    found = content(tmp_path / "out")
    assert found == content(tmp_path / "other")
    assert {path.split("/")[0] for path in found} == {"train", "heldout", "rejects.jsonl", "duplicates.jsonl"}


BAD = [
    (record("bad-1", positions=np.full((3, 3), np.nan, np.float32)), "positions"),
    (record("bad-2", numbers=np.zeros(0, np.uint8), positions=np.zeros((0, 3), np.float32)), "numbers"),
    (record("mol-00002"), "key"),
    (record("", 2), "key"),
    (record("bad-3", spectra={"ir": Lines(np.ones(1, np.float32), -np.ones(1, np.float32))}), "spectra.ir"),
]


def test_refused_records_are_listed_and_counted(tmp_path):
    made = [RejectedRecord("x", "y", "z"), *plain([2] * 6), *(one for one, _ in BAD), record("last", 4)]
    summary = make(made, tmp_path / "out", shard=5)
    assert summary.manifests[""]["records"] == 7
    assert keys(tmp_path / "out") == [f"mol-{i:05d}" for i in range(6)] + ["last"]
    rows = lines(tmp_path / "out" / "rejects.jsonl")
    assert [(row["key"], row["field"]) for row in rows] == [("x", "y"), *((one.key, field) for one, field in BAD)]
    assert all(row["reason"] for row in rows) and summary.refused.total() == len(rows)


def test_strict_stops_at_the_first_and_leaves_nothing(tmp_path):
    made = [*plain([2] * 6), BAD[0][0]]
    with pytest.raises(UserError, match="bad-1: positions: not finite; leave --strict out to list it"):
        make(made, tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()
    make(made, tmp_path / "out")  # as it says


def test_strict_minds_chunks_that_are_done_and_keys_of_other_chunks(tmp_path):
    make(items(), tmp_path / "out", part="0/2")
    with pytest.raises(UserError, match="mol-00003: field: a reason; leave --strict out"):
        make([*items()[:16], *plain([2] * 40)[16:]], tmp_path / "out", strict=True)
    with pytest.raises(UserError, match="mol-00000: key: is there twice; leave --strict out"):
        make([*plain([2] * 20), *plain([2])], tmp_path / "other", strict=True)


def test_some_rows_and_without_some_keys(tmp_path):
    (tmp_path / "test.txt").write_text("mol-00002\nmol-00017\n\nnobody\n")
    summary = make(plain([2] * 40), tmp_path / "out", limit=20, exclude=tmp_path / "test.txt")
    assert keys(tmp_path / "out") == [f"mol-{number:05d}" for number in range(20) if number not in (2, 17)]
    assert summary.excluded == 2 and not lines(tmp_path / "out" / "rejects.jsonl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "1.5"}, "--split is 1.5; give a share between 0 and 1"),
        ({"block": 0}, "--block is 0; give 1 or more"),
        ({"shard": 0}, "--shard is 0; give 1 or more"),
        ({"limit": 0}, "--limit is 0; give 1 or more"),
        ({"processes": 0}, "--processes is 0; give 1 or more"),
        ({"part": "3/3"}, "--part is 3/3; give I/N with I from 0 to N - 1"),
        ({"part": "1"}, "--part is 1; give I/N"),
        ({"exclude": Path("nowhere")}, "nowhere: cannot be read .*; give --exclude a file with a key on each line"),
        ({"drop_duplicates": True}, "--drop-duplicates goes by InChIKey; leave --no-inchikey out"),
        ({"split": "0.000000001"}, "heldout: no record is left for it, 0 were refused .* give more molecules"),
        ({"items": [BAD[0][0]]}, "the set: no record is left for it, 1 were refused"),
        ({"items": [], "inputs": [Path(__file__)]}, "test_build.py: no rows to build of"),
    ],
)
def test_wrong_arguments(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        make(**({"items": plain([2] * 6), "out": tmp_path / "out"} | changes))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(tmp_path):
    make(plain([2] * 6), tmp_path / "out")
    before = content(tmp_path)
    with pytest.raises(UserError, match="out: is there already; remove it or choose another --out"):
        make(plain([3] * 6), tmp_path / "out")
    assert content(tmp_path) == before


def test_errors_at_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["build", "computed", "--from", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "nothing: no results.jsonl with results; run python -m shards.sources.computed first" in said
    assert said.count("\n") == 1


def test_every_source_can_be_asked_for_its_options(capsys):
    main(["sources"])
    for line in capsys.readouterr().out.splitlines():
        name, said = line.split(maxsplit=1)
        with pytest.raises(SystemExit) as end:
            main(["build", name, "--help"])
        assert end.value.code == 0 and said and "--out" in capsys.readouterr().out


def test_what_a_log_shows_of_a_long_build(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shards.progress.SECONDS", 0)
    make(items(), tmp_path / "out", part="0/2")
    make(items(), tmp_path / "out")
    first, second, third = capsys.readouterr().err.splitlines()[:3]
    assert first.startswith("16 rows  ") and "1 refused" in first and first.endswith(" left of 24 rows")
    assert second.startswith("24 rows  ") and second.endswith("  00:00 left of 24 rows")
    assert third.startswith("16 rows  ") and third.endswith("  00:00 left of 16 rows")


def test_statistics_of_spectra(tmp_path):
    """As numpy has them of all records together, over blocks, chunks and both kinds of spectra."""
    kinds = ["values16", "lines", "missing", "values16", "no_lines"]
    made = [
        record(
            f"mol-{i:05d}",
            3,
            seed=i,
            spectra={"ir": one} if (one := spectrum("ir", kinds[i % 5], i)) is not None else {},
        )
        for i in range(40)
    ]
    said = make(made, tmp_path / "out", shard=11).manifests[""]["spectra"]
    assert set(said) == {"ir"}
    spectra = [one.spectra["ir"] for one in made if one.spectra]
    values = np.stack([one for one in spectra if isinstance(one, np.ndarray)]).astype(float)
    assert values.shape == (16, GRIDS["ir"].length)
    total = values.sum() + sum(one.strengths.sum(dtype=float) for one in spectra if isinstance(one, Lines))
    assert said["ir"]["records"] == len(spectra) == 32
    assert said["ir"]["mean_total"] == pytest.approx(total / 32)
    assert said["ir"]["values"] == pytest.approx(
        {"minimum": values.min(), "maximum": values.max(), "mean": values.mean(), "std": values.std()}
    )


def test_the_same_molecules_are_held_out_of_every_set(tmp_path):
    """Of a small set, of a large one, and of one in another order; more of them for a larger share."""
    many = plain([2] * 200)
    for name, records in (("all", many), ("few", many[50:90]), ("back", many[::-1])):
        make(records, tmp_path / name, split="0.2")
    whole = set(keys(tmp_path / "all" / "heldout"))
    assert set(keys(tmp_path / "back" / "heldout")) == whole
    few = {one.key for one in many[50:90]}
    assert set(keys(tmp_path / "few" / "heldout")) == whole & few
    assert {key for key in few if held_out(key, 0.1)} <= whole
    assert np.mean([held_out(f"qm9-{i:06d}", 0.1) for i in range(10_000)]) == pytest.approx(0.1, abs=0.01)
    # Pinned, because sets that are built at different times must agree.
    assert [i for i in range(60) if held_out(f"qm9-{i:06d}", 0.1)] == [6, 9, 14, 19, 24, 28, 32, 38, 47, 57]
