"""Who is late, from the heartbeats of all ranks."""

import json
import time

import pytest

from mspt.training.engine import Process
from mspt.training.watchdog import Watchdog


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


def test_nothing_stays_after_the_end(watchdog):
    assert [path.name for path in watchdog.folder.iterdir()] == ["rank-00000.json"]
    watchdog.close()
    assert not list(watchdog.folder.iterdir())


def test_without_a_timeout_nothing_is_written(tmp_path):
    Watchdog(tmp_path, Process(rank=0, world_size=1, device=None), timeout=None).close()
    assert not list(tmp_path.iterdir())
