"""A save that is written while training goes on: killed, asked to end, on a slow, full or stuck disk."""

import json
import os
import signal

import pytest

from mspt.training import checkpoint, metrics
from tests.end_to_end.faults.conftest import STEPS
from tests.end_to_end.faults.ranks import SMALL_CHUNK, Run

SLOW = 0.2  # seconds for each SMALL_CHUNK


def partial(folder):
    """Bytes of the last rank's part of the first save, while it is being written; None before and after."""
    files = list((folder / "checkpoints").glob("step-*.partial/rank-00001.safetensors"))
    return files[0].stat().st_size if files else None


@pytest.mark.parametrize("victims", [[0], [1], [0, 1]])
def test_killed_while_training_goes_on_beside_the_write(victims, tmp_path, ends_as_uninterrupted):
    folder = tmp_path / "run"
    run = Run(folder, 2, STEPS, faults={1: ("slow_disk", SLOW)})
    run.wait_until(lambda: (partial(folder) or 0) > 2 * SMALL_CHUNK)
    run.wait_for(5)  # the save is of step 3
    for victim in victims:
        run.send(victim, signal.SIGKILL)
    assert 0 not in run.end(grace=0.5), run.said()
    assert partial(folder) > 2 * SMALL_CHUNK and checkpoint.latest(folder) is None
    assert Run(folder, 2, STEPS).end() == [0, 0]
    ends_as_uninterrupted(folder, 2)


def test_a_save_waits_for_a_slow_disk(tmp_path):
    """Each save takes longer than run.hang_timeout, but the disk gets on: nothing is taken for hung."""
    folder = tmp_path / "run"
    settings = ("checkpoint.every=2", "run.hang_timeout=6")
    run = Run(folder, 2, 4, *settings, faults={1: ("slow_disk", 2 * SLOW)})
    assert run.end() == [0, 0], run.said()
    assert "step 4: waited" in run.said() and "until the checkpoint of step 2 was written" in run.said()
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-00000002", "step-00000004"}


def test_a_disk_that_stands_still_is_a_hang(tmp_path):
    run = Run(tmp_path / "run", 2, 4, "run.hang_timeout=2", faults={1: ("slow_disk", 1000)})
    assert set(run.end()) <= {69, -signal.SIGKILL, -signal.SIGABRT, 1} and "no step finished in 2 s" in run.said()
    assert checkpoint.latest(tmp_path / "run") is None


def test_what_is_announced_as_saved_is_published(tmp_path):
    """A signal while a save is being written: it is completed, then the step that is done is saved too."""
    folder = tmp_path / "run"
    run = Run(folder, 2, STEPS, faults={1: ("slow_disk", SLOW)})
    run.wait_until(lambda: partial(folder) is not None)
    run.send(0, signal.SIGTERM)
    assert run.end() == [75, 75], run.said()
    done = metrics.read(folder)[-1]["step"]
    assert f"mspt: saved at step {done}; the same command goes on\n" in run.said()
    assert checkpoint.latest(folder).name == f"step-{done:08d}"
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-00000003", f"step-{done:08d}"}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_is_reported_by_all_at_the_same_step(rank, tmp_path):
    folder = tmp_path / "run"
    assert Run(folder, 2, 3).end() == [0, 0]
    run = Run(folder, 2, STEPS, faults={rank: ("full_disk", 20_000)})
    assert run.end() == [2, 2], run.said()
    said = f"step-00000006: not saved, rank {rank} says: [Errno 27] File too large; older checkpoints are untouched"
    assert run.said().count(said) == 2
    assert checkpoint.latest(folder).name == "step-00000003" and os.listdir(folder / "checkpoints") != []


def test_an_error_of_a_run_on_one_rank_completes_its_save(tmp_path):
    """The loss is not finite at step 5 in all these runs, which ends this one."""
    folder = tmp_path / "run"
    run = Run(folder, 1, STEPS, "training.max_skipped=1", faults={0: ("slow_disk", SLOW)})
    assert run.end() == [2], run.said()
    assert "1 steps in a row were not finite" in run.said() and checkpoint.latest(folder).name == "step-00000003"


def test_the_best_is_kept_by_its_mean_loss_since_the_save_before(tmp_path):
    folder = tmp_path / "run"
    keep = ("checkpoint.every=2", "checkpoint.keep_last=1", "checkpoint.keep_best=1", "checkpoint.metric=coord")
    assert Run(folder, 2, 9, *keep).end() == [0, 0]
    coord = {row["step"]: row["coord"] for row in metrics.read(folder)}
    means = {step: (coord[step - 1] + coord[step]) / 2 for step in (2, 4, 6, 8)} | {9: coord[9]}
    best = min(means, key=means.get)
    there = sorted((folder / "checkpoints").iterdir())
    assert [path.name for path in there] == [f"step-{step:08d}" for step in sorted({best, 9})]
    for path in there:
        meta = json.loads((path / "meta.json").read_text())
        assert meta["metrics"]["coord"] == pytest.approx(means[meta["step"]], rel=1e-6)
        assert meta["metrics"].keys() >= {"loss", "coord", "contrast", "masked_ir"}


def test_a_metric_that_there_is_not(tmp_path):
    folder = tmp_path / "run"
    run = Run(folder, 1, 2, "checkpoint.keep_best=1", "checkpoint.metric=energy")
    assert run.end() == [2]
    assert "checkpoint.metric=energy: this run has no such value; take one of loss, coord" in run.said()
    assert not folder.exists()
