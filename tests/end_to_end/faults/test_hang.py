"""A rank that stands still is named, and the others do not wait for it."""

import os
import signal

import pytest

from tests.end_to_end.faults.conftest import STEPS
from tests.end_to_end.faults.ranks import Run


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named(victim, tmp_path):
    run = Run(tmp_path / "run", 2, STEPS, "run.hang_timeout=4")
    run.wait_for(2)
    run.send(victim, signal.SIGSTOP)
    codes = run.end(grace=0.5)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 69, run.said()
    assert f"rank {victim} on {os.uname().nodename} has been silent for" in run.said()
