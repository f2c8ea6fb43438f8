"""Work for many processes: nothing lost, nothing piled up, and an end whatever ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import shards
from mspt.errors import UserError
from shards.pool import unordered
from tests.shards.working import work

ROOT = Path(shards.__file__).parent.parent


@pytest.mark.parametrize("processes", [1, 3])
def test_every_task_is_done_once(processes):
    assert sorted(unordered(work, iter(range(50)), processes)) == list(range(0, 100, 2))
    assert list(unordered(work, iter(()), processes)) == []
    assert multiprocessing.active_children() == []


def test_tasks_are_asked_for_when_somebody_is_free():
    """Chunks may be large: no more of them are held than there are processes, and one."""
    asked = []
    tasks = (asked.append(task) or task for task in range(30))
    for done, _ in enumerate(unordered(work, tasks, 2)):
        assert len(asked) <= done + 3
    assert len(asked) == 30


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        ("killed", UserError, "a worker process was ended by SIGKILL, .* give the same command again"),
        ("exit", UserError, "a worker process was ended with code 3"),
        ("refused", UserError, "^fix this$"),
        ("wrong", RuntimeError, "KeyError: 'a bug'"),
    ],
)
def test_an_end_of_one_is_the_end_of_all(task, kind, message):
    with pytest.raises(kind, match=message):
        list(unordered(work, [1, "slow", task, *range(9)], 2))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_nobody_stays_behind(number, code):
    """Ctrl-C reaches all, of whom only the first says something; a kill may reach only the first."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.shards.working"],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == process.stdout.readline() == "deaf to Ctrl-C: True\n"
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    said = process.communicate(timeout=30)  # ends when the last process that could say something has
    assert (process.returncode, *said) == (code, "", "")
