"""mspt reproduce: which runs a table is made of, and a small one from its files to its numbers."""

import fcntl
import json
import multiprocessing
import re
import statistics
import threading
import time
from pathlib import Path

import pytest
import yaml

from mspt import cli, config, curves, reproduce
from mspt.errors import UserError
from tests.end_to_end.runs import ROOT

BUNDLED = ROOT / "shards/bundled"
CONFIGS = ROOT / "configs"


def plan(tmp_path, table, scale="small", **only):
    return reproduce.Plan(CONFIGS / f"{table}.yaml", scale, tmp_path / "data", tmp_path / "runs", only)


@pytest.mark.parametrize("table", ["table1", "table2", "contrast", "forces"])
@pytest.mark.parametrize("scale", ["small", "full"])
def test_every_row_is_complete(tmp_path, table, scale):
    made = plan(tmp_path, table, scale)
    assert {cell.row for cell in made.cells} == set(made.table.rows)
    ours = {"table1": set(), "table2": {"no-spectra"}}.get(table, set(made.table.rows))
    assert set(made.table.published) == set(made.table.rows) - ours
    assert set(made.targets) <= set(made.table.targets)
    for run in made.runs:
        data = [word for word in run.overrides if re.match(r"data\.(train|validation|heldout)=\"", word)]
        assert data and all(str(tmp_path / "data") in word for word in data)
        before = [word for word in run.overrides if word.startswith("model.init=")][-1]
        assert before == f"model.init={json.dumps(run.after and str(run.after.folder))}"


def test_rows_share_the_stages_that_are_the_same(tmp_path):
    made = plan(tmp_path, "table1", rows=("coord", "molspectra"), targets=("homo",), labels=(1000,), seeds=(0, 1))
    first, second = (cell.run for cell in made.cells if cell.seed == 0)
    assert second.after.after == first.after and first.after.after is None
    # Two stages, and one fine-tuning a row and seed.
    assert len(made.runs) == 2 + 4 and made.runs[0] == first.after
    assert len({run.folder for run in made.runs}) == 6
    table2 = plan(tmp_path, "table2", rows=("all",), targets=("homo",), labels=(1000,), seeds=(0, 1))
    contrast = plan(tmp_path, "contrast", rows=("published",), targets=("homo",), labels=(1000,), seeds=(0, 1))
    molspectra = {cell.run.folder for cell in made.cells if cell.row == "molspectra"}
    for other in table2, contrast:
        assert {cell.run.folder for cell in other.cells} == molspectra


def test_a_set_that_is_another_makes_other_runs_of_what_learns_from_it(tmp_path):
    def folders():
        made = plan(tmp_path, "table1", rows=("coord", "molspectra"), targets=("homo",), labels=(1000,), seeds=(0,))
        coord, molspectra = (cell.run for cell in made.cells)
        return coord.after.folder, coord.folder, molspectra.after.folder, molspectra.folder

    def build(name, digest):
        manifest = tmp_path / f"data/{name}/train/manifest.json"
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps({"index_sha256": digest}))

    build("qm9", "a")
    build("qm9-spectra", "a")
    before = folders()
    assert folders() == before
    build("qm9-spectra", "b")
    grown = folders()
    assert grown[:2] == before[:2] and not set(grown[2:]) & set(before)
    build("qm9", "b")
    assert not set(folders()) & {*before, *grown}


def test_a_run_is_the_same_wherever_it_lies(tmp_path, monkeypatch):
    """However --data and --out are written, and after both have moved."""
    monkeypatch.chdir(tmp_path)

    def names(data, out):
        made = reproduce.Plan(CONFIGS / "table1.yaml", "small", data, out, {"rows": ("molspectra",), "seeds": (0,)})
        return [run.folder.name for run in made.runs]

    expected = names("data", "runs/x")
    assert names(tmp_path / "data", "runs/x") == names("data", tmp_path / "runs/x") == expected
    assert names("/elsewhere/sets", "/elsewhere/runs") == expected


def test_a_command_has_the_folders_as_they_are_written(tmp_path):
    made = plan(tmp_path / "Schröder 🧪", "table1", rows=("coord",), targets=("homo",), labels=(1000,))
    for run in made.runs:
        loaded = config.load(run.config, run.overrides)
        assert Path(loaded.data.train).is_relative_to(tmp_path / "Schröder 🧪/data")
        assert loaded.model.init == (run.after and str(run.after.folder))


def test_a_table_of_forces_is_one_run_a_row_and_seed(tmp_path):
    made = plan(tmp_path, "forces", rows=("torchmd-net",), seeds=(0, 1))
    assert len(made.cells) == 4 and {cell.target for cell in made.cells} == {"energy", "forces"}
    assert len(made.runs) == 2
    # At small scale all tables have the same encoder, so that they share the stages of its pre-training.
    coord = [plan(tmp_path, table, rows=("coord",)).runs[0].folder for table in ("forces", "table1")]
    assert coord[0] == coord[1]


def test_an_ablation_differs_from_the_whole_in_its_spectra_alone(tmp_path):
    made = plan(tmp_path, "table2", targets=("homo",), labels=(1000,), seeds=(0,))
    stages = {cell.row: cell.run.after for cell in made.cells}
    assert len({stage.after.folder for stage in stages.values()}) == 1
    assert len({stage.folder for stage in stages.values()}) == 5
    whole = set(stages["all"].overrides)
    assert set(stages["no-ir"].overrides) - whole == {'data.spectra=["uv_vis", "raman"]'}
    assert {each.split("=")[0] for each in set(stages["no-spectra"].overrides) ^ whole} == {
        "objectives.masked_patches",
        "objectives.masked_patches.weight",  # the scale's, of what is left out
        "objectives.contrast",
    }


@pytest.mark.parametrize(
    ("table", "scale", "only", "expected"),
    [
        ("table3", "small", {}, "table3.yaml: cannot be read"),
        ("table1", "tiny", {}, "tiny.yaml: cannot be read .*give a scale of configs/scales"),
        ("table1", "small", {"rows": ("schnet",)}, "--rows: schnet is not in this table; it has egnn"),
        ("table1", "small", {"targets": ("alpha",)}, "--targets: alpha is not in this table; it has"),
        ("table1", "small", {"labels": (7,)}, "--labels: 7 is not in this table; it has 1000, 10000"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, table, scale, only, expected):
    with pytest.raises(UserError, match=expected):
        plan(tmp_path, table, scale, **only)


SMALL = {
    "data.lanes": 1,
    "data.workers": 0,
    "data.budget": {"molecules": 16, "atoms": 400},
    "training": {"steps": 3, "log_every": 1},
    "schedule": {"kind": "constant", "warmup": 0, "peak": 1e-3},
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a table of two rows that a few steps of a tiny encoder make, and its data."""
    for name in ("pcqm4mv2-coord", "finetune-qm9"):
        (tmp_path / "configs/tiny").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"configs/{name}.yaml").write_text((CONFIGS / f"{name}.yaml").read_text())
    row = {"finetune": {"config": "../finetune-qm9.yaml"}}
    stage = {"kind": "conformers", "config": "../pcqm4mv2-coord.yaml"}
    files = {
        "tiny.yaml": {
            "title": "Tiny",
            "targets": ["homo", "mu"],
            "rows": ["scratch", "coord"],
            "published": {"coord": {"homo": 17.7}},
        },
        "tiny/scratch.yaml": row | {"name": "From scratch"},
        "tiny/coord.yaml": row | {"name": "Coord", "stages": [stage]},
        "scales/minute.yaml": {
            "runs": {
                "property": {"targets": ["homo"], "labels": {20: {"data.split": {"train": 100, "validation": 20}}}}
            },
            "seeds": [0, 1],
            "set": {
                "conformers": SMALL | {"data.train": str(BUNDLED / "qm9-spectra/heldout"), "data.heldout": None},
                "property": SMALL
                | {"data.train": str(BUNDLED / "qm9-spectra/heldout"), "data.heldout": None, "data.validation": None}
                | {"evaluation": {"every": 2}},
            },
            "encoders": {"torchmd_et": {"layers": 1, "channels": 16, "heads": 2, "radial_functions": 8}},
        },
    }
    for name, tree in files.items():
        path = tmp_path / "configs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # As in a process that has joined a run itself.
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path


def test_from_the_files_of_a_table_to_its_numbers(project, capsys):
    words = ["reproduce", "tiny", "--scale", "minute", "--jobs", "2"]
    cli.main([*words, "--rows", "coord"])
    said = capsys.readouterr().out
    results = json.loads((project / "runs/tiny-minute/tiny.json").read_text())["rows"]
    found = results["coord"]["20"]["homo"]
    assert len(found["mae"]) == 2 and found["unit"] == "meV" and found["count"] == 103
    assert "homo / meV" in said and "20 labels" in said and "17.7" in said
    lines = {line.split("  ")[0]: line for line in said.splitlines()}
    assert "not run" in lines["From scratch"] and "±" in lines["Coord"]
    cli.main([*words, "--show", "--figure", "curves.png"])
    assert "curves:  curves.png" in capsys.readouterr().out
    assert (project / "curves.png").read_bytes().startswith(b"\x89PNG")
    figure = curves.learning_curves(reproduce.Plan(Path("configs/tiny.yaml"), "minute", "data", "runs/tiny-minute", {}))
    test, validation = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Coord"]
    (point,) = test.lines[0].get_ydata()
    assert point == pytest.approx(statistics.fmean(found["mae"])) and test.get_title() == "homo / meV"
    assert validation.lines[0].get_xdata().tolist() == [2]
    with pytest.raises(SystemExit):
        cli.main([*words, "--processes", "2"])
    said = capsys.readouterr().err
    assert "--processes 2: " in said and "data.lanes is 1, which 2 ranks" in said
    # Who asks for a part is told of the whole.
    cli.main([*words, "--show", "--rows", "scratch", "--seeds", "1"])
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "±" in lines["Coord"]
    assert json.loads((project / "runs/tiny-minute/tiny.json").read_text())["rows"] == results
    # Nothing is left to do of that row; of the other the commands are told.
    cli.main([*words, "--dry-run"])
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 2 and all("model.init=null" in command for command in commands)
    # Other data make other runs: then nothing is overwritten, and what is missing is said.
    scale = project / "configs/scales/minute.yaml"
    scale.write_text(scale.read_text().replace("qm9-spectra/heldout", "qm9-ir-raman/heldout"))
    with pytest.raises(SystemExit):
        cli.main([*words, "--show"])
    assert "has runs, but none of this table's configurations on the sets in --data" in capsys.readouterr().err
    assert json.loads((project / "runs/tiny-minute/tiny.json").read_text())["rows"] == results


def test_an_interruption_begins_no_further_run(tmp_path, monkeypatch):
    made = plan(tmp_path, "table1", targets=("homo",), rows=("egnn",), labels=(1000,), seeds=(0, 1, 2))
    begun = []

    def interrupted(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(made, "_perform", lambda run, *rest: begun.append(run) or time.sleep(0.5) or 1)
    with pytest.raises(KeyboardInterrupt):
        made.perform(1, 1, interrupted)
    assert 1 <= len(begun) < 3


def test_a_run_that_is_under_way_is_waited_for(tmp_path):
    """Two parts of a table that share a stage, begun side by side: one runs it, the other finds it done."""
    made = plan(tmp_path, "table1", targets=("homo",), rows=("coord",), labels=(1000,), seeds=(0,))
    stage = made.runs[0]
    Path(f"{stage.folder}.log").parent.mkdir(parents=True)
    with Path(f"{stage.folder}.log").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        waiting = threading.Thread(target=lambda: codes.append(made._perform(stage, 1, 1)))
        codes = []
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive() and not codes
        stage.folder.mkdir()
        (stage.folder / "summary.json").write_text("{}")
    waiting.join(60.0)
    assert codes == [0] and Path(f"{stage.folder}.log").read_bytes() == b""  # nothing was run


def _save_often(plan):
    for _ in range(30):
        plan.save()


def test_parts_of_a_table_that_run_side_by_side_both_save_it(tmp_path):
    made, context = plan(tmp_path, "table1", targets=("homo",)), multiprocessing.get_context("fork")
    parts = [context.Process(target=_save_often, args=(made,)) for _ in range(3)]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    assert [part.exitcode for part in parts] == [0, 0, 0]
    assert json.loads((tmp_path / "runs/table1.json").read_text())["rows"] == {}


def test_a_run_that_fails_is_named_and_what_starts_from_it_is_left(project, capsys):
    scale = project / "configs/scales/minute.yaml"
    tree = yaml.safe_load(scale.read_text())
    tree["set"]["conformers"]["data.train"] = "nowhere"
    scale.write_text(yaml.safe_dump(tree))
    with pytest.raises(SystemExit) as ended:
        cli.main(["reproduce", "tiny", "--scale", "minute", "--rows", "coord", "--seeds", "0"])
    assert ended.value.code == 2
    said = capsys.readouterr()
    (log,) = (project / "runs/tiny-minute/pretrained").glob("*.log")
    assert "nowhere" in log.read_text() and log.name in said.err and "the stage before it failed" in said.err
    assert "not run" in said.out
