"""A run that is killed and started again ends where an uninterrupted one does, on any number of ranks."""

import random
import shutil

import pytest
import torch

from mspt.data.shardset import ShardSet
from mspt.training import checkpoint
from tests.end_to_end.runs import SHARDS, run, run_and_kill

STEPS = 13  # more than two epochs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run on 2 ranks at ZeRO 1: its folder and the rows of its metrics."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(folder, 2, STEPS)


def final_weights(folder):
    """Weights of the last checkpoint by parameter."""
    newest = checkpoint.latest(folder)
    assert newest.name == f"step-{STEPS:08d}"
    return checkpoint.read_weights(newest)


def column(rows, name):
    return [row[name] for row in rows]


def test_killed_at_a_random_step_and_started_again(whole, tmp_path):
    """Same world size: bit-equal weights, the same records step by step. On one rank: the same global batches."""
    folder, expected = whole
    at = random.randint(1, STEPS - 3)
    print(f"killed after step {at}")
    run_and_kill(tmp_path / "run", 2, STEPS, at, everyone=random.random() < 0.5)
    shutil.copytree(tmp_path / "run", tmp_path / "alone")

    rows = run(tmp_path / "run", 2, STEPS)
    assert column(rows, "step") == list(range(1, STEPS + 1))
    assert column(rows, "records_digest") == column(expected, "records_digest")
    assert column(rows, "loss") == column(expected, "loss")
    ours, theirs = final_weights(tmp_path / "run"), final_weights(folder)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    rows = run(tmp_path / "alone", 1, STEPS)
    assert column(rows, "records_digest") == column(expected, "records_digest")
    assert column(rows, "loss") == pytest.approx(column(expected, "loss"), rel=1e-4)


def test_from_one_rank_to_two(whole, tmp_path):
    run_and_kill(tmp_path / "run", 1, STEPS, 5, everyone=True)
    rows = run(tmp_path / "run", 2, STEPS)
    assert column(rows, "records_digest") == column(whole[1], "records_digest")
    assert column(rows, "loss") == pytest.approx(column(whole[1], "loss"), rel=1e-4)


def test_an_epoch_is_every_record_once(whole):
    for epoch in (0, 1):
        assert sum(row["molecules"] for row in whole[1] if row["epoch"] == epoch) == len(ShardSet.open(SHARDS))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_zero_stage_has_the_same_loss_curve(whole, tmp_path, stage):
    rows = run(tmp_path / "run", 2, 5, f"engine.zero_stage={stage}")
    assert column(rows, "loss") == pytest.approx(column(whole[1][:5], "loss"), abs=1e-4)


def test_bf16_trains(whole, tmp_path):
    """Half the digits: the curve stays near, and is another."""
    rows = run(tmp_path / "run", 2, 5, "engine.precision=bf16")
    assert column(rows, "loss") == pytest.approx(column(whole[1][:5], "loss"), rel=0.05)
    assert column(rows, "loss") != column(whole[1][:5], "loss")
