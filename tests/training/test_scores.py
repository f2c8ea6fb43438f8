"""Errors against labels: by hand on made-up labels, in the units of published tables, and their spread over runs."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mspt.data.packing import Budget
from mspt.data.shardset import ShardSet
from mspt.data.stream import DataSettings
from mspt.errors import UserError
from mspt.training import report, scores
from mspt.training.validation import Error, check_forces, check_labels, measure, reported
from tests.data.molecules import plain, write_set

UNITS = {"mu": "D", "alpha": "a0^3", "r2": "a0^2", "cv": "cal/mol/K", "heat": "eV", "logP": "1"} | dict.fromkeys(
    ("homo", "lumo", "gap", "zpve", "u0", "u298", "h298", "g298"), "eV"
)


def test_units_are_those_of_published_tables():
    shown = reported({name: Error(5, 0.0155, 0.02, 0.4) for name in UNITS}, UNITS)
    assert {name: part["unit"] for name, part in shown.items()} == UNITS | dict.fromkeys(
        ("homo", "lumo", "gap", "zpve", "u0", "u298", "h298", "g298", "heat"), "meV"
    )
    assert shown["homo"] == {"count": 5, "mae": 15.5, "rmse": 20.0, "baseline": 400.0, "unit": "meV"}
    assert shown["mu"]["mae"] == 0.0155
    field = reported({"energy": Error(5, 1.0, 1.0, 1.0), "forces": Error(5, 1.0, 1.0, 1.0)}, {"energy": "eV"})
    assert [field[name]["unit"] for name in ("energy", "forces")] == ["kcal/mol", "kcal/mol/Å"]
    assert field["forces"]["mae"] == pytest.approx(23.0605, abs=1e-4)


def test_measured_by_hand(tmp_path):
    """Predictions are the number of atoms; a record without the label counts nowhere."""
    records = plain([2, 3, 4, 5])
    for record, value in zip(records, (2.5, 2.0, 4.0, math.nan), strict=True):
        record.targets.update({} if math.isnan(value) else {"gap": value})
    write_set(tmp_path / "set", records, block=3)
    data = DataSettings(train="unused", lanes=1, budget=Budget(molecules=2, atoms=100))
    module = SimpleNamespace(
        labels=(("gap",), False), baseline=lambda batch: {"gap": torch.full((len(batch.keys),), 3.0).double()}
    )
    shardset = ShardSet.open(tmp_path / "set")

    def measured(name):
        module.labels = ((name,), False)
        return measure(lambda batch: {name: batch.ptr.diff()}, module, shardset, data, torch.device("cpu"))

    error = measured("gap")["gap"]
    assert error.count == 3
    assert error.mae == pytest.approx(0.5) and error.rmse == pytest.approx(math.sqrt(1.25 / 3))
    assert error.baseline == pytest.approx((0.5 + 1 + 1) / 3)
    module.baseline = lambda batch: {"homo": torch.zeros(len(batch.keys))}
    with pytest.raises(UserError, match="no record has homo"):
        measured("homo")


def test_labels_of_unknown_elements_are_left_out_and_counted(tmp_path):
    records = plain([2, 3, 4])
    for record in records:
        record.targets["u0"] = 1.0
    write_set(tmp_path / "set", records)
    data = DataSettings(train="unused", lanes=1, budget=Budget(molecules=2, atoms=100))
    shardset, device = ShardSet.open(tmp_path / "set"), torch.device("cpu")

    def known(least):
        """Those of fewer atoms have an element that is not known."""
        return lambda batch: {"u0": torch.where(batch.ptr.diff() < least, torch.inf, 3.0).double()}

    module = SimpleNamespace(labels=(("u0",), False), baseline=known(3))
    error = measure(known(3), module, shardset, data, device)["u0"]
    assert (error.count, error.unknown, error.mae, error.baseline) == (2, 1, 2.0, 2.0)
    shown = reported({"u0": error}, UNITS)
    assert "1 left out, with elements that no label to train on has" in report.errors(shown)
    assert "2; 1 left out" in scores.table({"run": shown})
    module.baseline = known(9)
    with pytest.raises(UserError, match="no record has u0, .* and only elements that the labels to train on have"):
        measure(known(9), module, shardset, data, device)


def test_forces_are_looked_for_before_the_first_step(tmp_path):
    write_set(tmp_path / "bare", plain([2, 3]))
    forced = [replace(r, forces=np.zeros((len(r.numbers), 3), np.float32)) for r in plain([2, 3])]
    write_set(tmp_path / "forced", [*plain([2]), replace(forced[1], key="other")])
    bare, some = (ShardSet.open(tmp_path / name) for name in ("bare", "forced"))
    learns = SimpleNamespace(labels=((), True))
    check_forces(learns, [bare, some])
    check_labels(learns, some)
    check_forces(SimpleNamespace(labels=((), False)), [bare])
    for check in (lambda: check_forces(learns, [bare]), lambda: check_labels(learns, bare)):
        with pytest.raises(UserError, match="bare: no record has forces, which objectives.forces is about"):
            check()


def test_spread_over_seeds():
    def score(mae, name="homo"):
        return {name: {"count": 9, "mae": mae, "rmse": 2 * mae, "baseline": 430.0, "unit": "meV"}}

    found = {"runs/0": score(20.0), "runs/1": score(22.0), "runs/2": score(27.0), "runs/mu": score(0.1, "mu")}
    spread = scores.spread(found)
    assert spread == {"homo": {"mae": 23.0, "deviation": pytest.approx(math.sqrt(13)), "runs": 3, "unit": "meV"}}
    lines = scores.table(found).splitlines()
    assert len(lines) == 6
    assert lines[-1].split() == ["mean", "of", "3", "runs", "homo", "23", "±", "3.6", "meV"]


def test_what_there_is_not_is_said(tmp_path):
    with pytest.raises(UserError, match="give a run folder of mspt finetune"):
        scores.score(tmp_path)
