"""A run that is asked to end saves at once on all ranks, ends with 75, and goes on bit by bit."""

import random
import signal
import subprocess
import time

import pytest

from mspt.training import checkpoint, metrics
from tests.end_to_end.faults.conftest import STEPS
from tests.end_to_end.faults.ranks import Run
from tests.end_to_end.runs import LABELLED, SHARDS, command, environment

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def step(folder):
    newest = checkpoint.latest(folder)
    return int(newest.name.removeprefix("step-")) if newest else 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_signalled_at_random_steps(world_size, tmp_path, ends_as_uninterrupted):
    """Each time another signal, and one rank alone gets it. What is saved is the last step that was logged."""
    folder, done = tmp_path / "run", 0
    for number in SIGNALS:
        run = Run(folder, world_size, STEPS, "checkpoint.every=1000")
        run.wait_for(done + random.randint(1, 3))
        time.sleep(random.uniform(0, 0.1))
        run.send(random.randrange(world_size), number)
        assert run.end() == [75] * world_size, run.said()
        done = step(folder)
        assert metrics.read(folder)[-1]["step"] == done
        assert run.said().count(f"mspt: saved at step {done}; the same command goes on\n") == 1
    assert Run(folder, world_size, STEPS).end() == [0] * world_size
    ends_as_uninterrupted(folder, world_size)


def test_a_save_that_the_grace_has_no_time_for(tmp_path):
    run = Run(tmp_path / "run", 2, STEPS, "run.grace=0.001")
    run.wait_for(4)
    run.send(1, signal.SIGTERM)
    assert run.end() == [75, 75]
    newest = step(tmp_path / "run")
    assert newest % 3 == 0 and (
        "more than is left of run.grace=0.001" in run.said() or f"saved at step {newest}" in run.said()
    )
    assert not list(tmp_path.rglob("*.partial"))


def test_in_the_middle_of_the_evaluation(tmp_path):
    settings = (tmp_path / "run", 2, 2, f"data.heldout={SHARDS}")
    run = Run(*settings)
    run.wait_until(lambda: "evaluating" in run.said())
    run.send(1, signal.SIGTERM)
    assert run.end() == [75, 75], run.said()
    assert "saved at step 2, the evaluation begins anew" in run.said()
    assert Run(*settings).end() == [0, 0] and (tmp_path / "run" / "summary.json").exists()


def test_in_the_middle_of_a_validation(tmp_path):
    """It is broken off and, when the run goes on, made up for."""
    settings = (*LABELLED, "data.split={train: 24, validation: 180}", "data.budget={molecules: 1, atoms: 30}")
    settings = (2, 6, *settings, "checkpoint.every=100")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert Run(whole, *settings).end() == [0, 0]
    run = Run(broken, *settings)
    run.wait_for(2)
    run.send(1, signal.SIGTERM)
    assert run.end() == [75, 75], run.said()
    assert "saved at step 2" in run.said() and [row["step"] for row in metrics.read(broken)] == [1, 2]
    assert Run(broken, *settings).end() == [0, 0]
    measured = [
        [(row["step"], row["validation_homo"]) for row in metrics.read(folder) if "validation_homo" in row]
        for folder in (whole, broken)
    ]
    assert measured[0] == measured[1] and [step for step, _ in measured[0]] == [2, 4, 6]


def test_a_second_interrupt_ends_at_once(tmp_path):
    """Two ranks, of which one is stopped: the other cannot finish its step."""
    run = Run(tmp_path / "run", 2, STEPS)
    run.wait_for(1)
    run.send(1, signal.SIGSTOP)
    for wait in (0.3, 0.0):
        run.send(0, signal.SIGINT)
        time.sleep(wait)
    assert run.end(grace=0.5) == [-signal.SIGINT, -signal.SIGKILL]


def test_the_launcher_passes_signals_on(tmp_path):
    folder = tmp_path / "run"
    started = subprocess.Popen(
        command(folder, 2, STEPS), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not metrics.read(folder) and started.poll() is None:
        time.sleep(0.01)
    started.send_signal(signal.SIGUSR1)
    said, _ = started.communicate(timeout=60)
    assert started.returncode == 75, said
    assert f"mspt: saved at step {step(folder)}; the same command goes on\n" in said
