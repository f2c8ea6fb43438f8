"""Who is late, from the heartbeats of all ranks."""

import json
import shutil
import subprocess
import sys
import time

import pytest

from mspt.training.engine import Process
from mspt.training.watchdog import EXIT_CODE, Watchdog


@pytest.fixture
def watchdog(tmp_path):
    own = Watchdog(tmp_path, Process(rank=0, world_size=3, device=None), timeout=60)
    yield own
    own.close()


def beat(watchdog, rank, step, silent=0.0):
    beat = {"step": step, "time": time.time() - silent, "host": f"node{rank}", "pid": 1}
    (watchdog.folder / f"rank-{rank:05d}.json").write_text(json.dumps(beat))


def test_all_at_the_same_step(watchdog):
    for rank in range(3):
        beat(watchdog, rank, 7)
    assert watchdog.late() == []


def test_silent_behind_and_not_there(watchdog):
    beat(watchdog, 0, 7)
    beat(watchdog, 1, 6)
    assert watchdog.late() == [
        "rank 1 on node1 has not reached step 7",
        f"rank 2 has no heartbeat in {watchdog.folder}",
    ]
    beat(watchdog, 1, 7)
    beat(watchdog, 2, 7, silent=50)
    assert watchdog.late() == ["rank 2 on node2 has been silent for 50 s, at step 7"]


def test_heartbeats_that_cannot_be_read_or_written(watchdog, capsys):
    """Neither ends the thread that ends a run that hangs."""
    beat(watchdog, 1, 7)
    (watchdog.folder / "rank-00002.json").touch()
    assert f"rank 2 has no heartbeat in {watchdog.folder}" in watchdog.late()
    shutil.rmtree(watchdog.folder)
    watchdog.folder.write_text("no folder")
    watchdog._beat()
    assert "no heartbeat written" in capsys.readouterr().err
    assert len(watchdog.late()) == 3
    watchdog.folder.unlink()
    watchdog.folder.mkdir()


def test_a_file_system_that_hangs(tmp_path):
    """The run ends all the same: here a heartbeat is a pipe that nobody writes to."""
    code = (
        "import os, sys, time\n"
        "from mspt.training.engine import Process\n"
        "from mspt.training.watchdog import Watchdog\n"
        "own = Watchdog(sys.argv[1], Process(rank=0, world_size=2, device=None), timeout=1)\n"
        "os.mkfifo(own.folder / 'rank-00001.json')\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=50)
    assert done.returncode == EXIT_CODE, done.stderr
    assert f"the heartbeats in {tmp_path / 'heartbeats'} cannot be read" in done.stderr


def test_nothing_stays_after_the_end(watchdog):
    assert [path.name for path in watchdog.folder.iterdir()] == ["rank-00000.json"]
    watchdog.close()
    assert not list(watchdog.folder.iterdir())


def test_without_a_timeout_nothing_is_written(tmp_path):
    Watchdog(tmp_path, Process(rank=0, world_size=1, device=None), timeout=None).close()
    assert not list(tmp_path.iterdir())
