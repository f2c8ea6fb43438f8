"""Fine-tuning from end to end: a user's own table, a run that is killed, and one that stops by itself."""

import csv
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from rdkit import Chem

from mspt import cli
from mspt.data.stream import DataSettings
from mspt.downstream import predictor
from mspt.training import checkpoint
from mspt.training.validation import measure
from shards import cli as shards
from tests.end_to_end.runs import LABELLED, ROOT, command, environment, run, run_and_kill
from tests.shards.sources.fixtures import geometries, with_bonds

TINY = "{name: torchmd_et, layers: 1, channels: 16, heads: 2, radial_functions: 8}"
CONFIG = ROOT / "configs" / "quickstart-finetune.yaml"
STEPS = 9


def finetune(*overrides):
    """What the command says; a process of its own, as torch.distributed does not begin twice in one."""
    command = [sys.executable, "-m", "mspt.cli", "finetune", "--config", str(CONFIG), *overrides]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_from_an_sdf_to_a_table_of_predictions(tmp_path, capsys):
    """The path of docs/finetuning.md: structures with a number -> shards -> a model -> numbers for structures."""
    molecules = geometries(60)
    with Chem.SDWriter(str(tmp_path / "mine.sdf")) as writer:
        for molecule in molecules:
            entry = with_bonds(molecule)
            entry.SetProp("_Name", molecule.key)
            entry.SetProp("heat", str(molecule.targets["u298"] * 96.48533212))  # kJ/mol
            writer.write(entry)
    shards.main(
        f"build sdf --from {tmp_path}/mine.sdf --targets heat=heat:kJ/mol --key _Name --out {tmp_path}/shards".split()
    )
    overrides = [
        f"run.dir={tmp_path / 'run'}",
        f"data.train={tmp_path / 'shards'}",
        "data.heldout=null",
        "data.split={train: 40, validation: 8}",
        "data.limit=null",
        "data.lanes=1",
        "model.init=null",
        f"model.encoder={TINY}",
        "objectives.property={target: heat, references: true}",
        "training.steps=40",
        "schedule.warmup=5",
        "evaluation={every: 100}",  # never: the last model is kept
    ]
    assert "held out: heat MAE" in finetune(*overrides)
    table = tmp_path / "predictions.csv"
    cli.main(["predict", str(tmp_path / "run"), "--data", str(tmp_path / "shards"), "--out", str(table)])
    assert "wrote 60 predictions" in capsys.readouterr().out
    with table.open() as file:
        predicted = {row["key"]: float(row["heat"]) for row in csv.DictReader(file)}
    truth = {molecule.key: molecule.targets["u298"] for molecule in molecules}
    assert predicted.keys() == truth.keys()
    # The elements give most of it; the spread of the energies is thousands of eV.
    errors = np.array([abs(predicted[key] - truth[key]) for key in truth])
    assert errors.mean() < 5 < np.std(list(truth.values())) / 100
    cli.main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "shards"), "--json"])
    (score,) = json.loads(capsys.readouterr().out)["runs"].values()
    assert score["heat"]["unit"] == "meV" and score["heat"]["count"] == 60
    assert score["heat"]["mae"] == pytest.approx(1000 * errors.mean(), rel=1e-6)
    # What the run itself reported is of what it held out, by the best model.
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["errors"]["heat"]["count"] == 12
    cli.main(["evaluate", str(tmp_path / "run"), "--json"])
    again = json.loads(capsys.readouterr().out)["runs"][str(tmp_path / "run")]
    assert again["heat"]["mae"] == pytest.approx(summary["errors"]["heat"]["mae"], rel=1e-6)


def test_a_run_stops_where_nothing_gets_better(tmp_path):
    """At a rate of nothing the first measurement stays the best, and that model is kept.

    At ZeRO 3 on two ranks, where each must take part in every forward pass: what they measure together is what one
    process measures.
    """
    changes = ["schedule.peak=1.0e-30", "evaluation={every: 3, patience: 2}", "engine={zero_stage: 3}"]
    rows = run(tmp_path / "run", 2, 50, *LABELLED, *changes)
    measured = [row for row in rows if "validation_homo" in row]
    assert [row["step"] for row in measured] == [3, 6, 9] and rows[-1]["step"] == 9
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["train"]["steps"] == 9
    done = subprocess.run(
        command(tmp_path / "run", 1, 50, *LABELLED, *changes, "objectives.property.target=gap"),
        env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 2 and "was made with objectives.property = {'target': 'homo'" in done.stderr
    state = summary["validation"]
    assert (state["step"], state["since"], state["best"]) == (3, 2, measured[0]["validation_homo"])
    for part, expected in (("heldout", summary["errors"]["homo"]["mae"] / 1000), ("validation", state["best"])):
        assert error_of_one_process(tmp_path / "run", part) == pytest.approx(expected, rel=1e-5)


def error_of_one_process(folder, part):
    """Mean absolute error of a run's model on a part of its data, eV."""
    module = predictor.load(folder).module
    data = DataSettings.model_validate(yaml.safe_load((folder / "config.yaml").read_text())["data"])
    return measure(module.predict, module, data.open_part(part), data, torch.device("cpu"))["homo"].mae


def test_killed_and_started_again(tmp_path):
    """Bit-equal weights, the same measurements, the same best model."""
    ours, theirs = tmp_path / "killed", tmp_path / "whole"
    expected = run(theirs, 1, STEPS, *LABELLED)
    at = random.randint(2, STEPS - 3)
    print(f"killed after {at} rows")
    run_and_kill(ours, 1, STEPS, at, True, *LABELLED)
    rows = run(ours, 1, STEPS, *LABELLED)
    for name in ("validation_homo", "loss"):
        assert [row[name] for row in rows if name in row] == [row[name] for row in expected if name in row]
    last = [checkpoint.read_weights(checkpoint.latest(folder)) for folder in (ours, theirs)]
    best = [safetensors.torch.load_file(folder / "model" / "model.safetensors") for folder in (ours, theirs)]
    for one, other in (last, best):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)
        assert other["objectives.property.statistics.deviation"] > 0.1
