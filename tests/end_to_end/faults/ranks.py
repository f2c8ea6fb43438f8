"""Real ranks of a small run, forked from a parent that has imported everything: a start costs a second, not ten."""

import itertools
import os
import resource
import signal
import threading
import time
from multiprocessing import connection, get_context, set_start_method
from pathlib import Path

import psutil

from mspt.training import metrics
from mspt.training.ports import free_port
from tests.end_to_end.runs import ROOT, SMALL

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["tests.end_to_end.faults.preload"])
# What changes a file or folder or puts it on the disk: a kill before each of these calls is every state that a kill can
# leave.
CALLS = ("mkdir", "write", "rename", "replace", "unlink", "rmdir", "fsync")
SMALL_CHUNK = 1 << 15  # bytes that a save writes at a time, so that it takes several calls
POISONED = 5  # the step whose loss is not finite, on the last rank, in every run


class Run:
    """The ranks of one start of a run. faults: rank -> a function below and its arguments, which that rank calls."""

    def __init__(self, folder, world_size, steps, *overrides, faults=None):
        self.folder, self.log = Path(folder), Path(folder).with_suffix(".log")
        settings = [*SMALL, f"run.dir={folder}", f"training.steps={steps}", "data.workers=1", *overrides]
        command = ["pretrain", "--config", str(ROOT / "configs" / "quickstart.yaml"), *settings]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
        self.log.write_text("")
        self.ranks = []
        for rank in range(world_size):
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            fault = (faults or {}).get(rank)
            self.ranks.append(FORKS.Process(target=_rank, args=(command, environment, str(self.log), fault)))
        for rank in self.ranks:
            rank.start()

    def wait_for(self, step):
        """Wait until a step is logged, or the run is over."""
        self.wait_until(lambda: len(metrics.read(self.folder)) >= step)

    def wait_until(self, true):
        """Wait until that is so, or the run is over."""
        deadline = time.monotonic() + 60
        while not true() and all(rank.is_alive() for rank in self.ranks):
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def workers(self):
        """The loader workers of all ranks."""
        return [child for rank in self.ranks if rank.is_alive() for child in psutil.Process(rank.pid).children()]

    def send(self, rank, number):
        if self.ranks[rank].is_alive():
            os.kill(self.ranks[rank].pid, number)

    def end(self, grace=5.0, patience=30):
        """As a launcher does: once a rank has failed, kill those that do not end -> the exit codes.

        patience: seconds in which some rank must end.
        """
        running = list(self.ranks)
        while running:
            ended = connection.wait([rank.sentinel for rank in running], timeout=patience)
            assert ended, f"hangs: {self.said()}"
            running = [rank for rank in running if rank.sentinel not in ended]
            if any(rank.exitcode for rank in self.ranks if rank not in running):
                connection.wait([rank.sentinel for rank in running], timeout=grace)
                break
        workers = self.workers()
        for rank in self.ranks:
            rank.kill()
            rank.join()
        psutil.wait_procs(workers, timeout=30)
        return [rank.exitcode for rank in self.ranks]

    def said(self):
        """What the ranks have printed."""
        return self.log.read_text(errors="replace")


def _rank(command, environment, log, fault):
    """In the forked process: what `mspt pretrain` does, with the fault in place."""
    os.environ |= environment
    set_start_method("fork", force=True)  # for its loader workers, as anywhere else
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from mspt import cli

    _poison()
    if fault:
        name, *arguments = fault
        {"die_in_save": die_in_save, "full_disk": full_disk, "slow_disk": slow_disk}[name](*arguments)
    cli.main(command)


def _poison():
    """A loss that is not finite at the same step of every run, on one rank alone."""
    from mspt.training.engine import Engine

    backward = Engine.backward

    def poisoned(engine, loss):
        process = engine.process
        bad = engine.done == POISONED - 1 and process.rank == process.world_size - 1
        backward(engine, loss * float("nan") if bad else loss)

    Engine.backward = poisoned


def die_in_save(number):
    """SIGKILL itself before the change of this number that its saves make to the disk, while training goes on."""
    counted = itertools.count()

    def before():
        if next(counted) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    _in_saves(CALLS, before)


def slow_disk(seconds):
    """Each chunk that a save writes takes so long."""
    _in_saves(["write"], lambda: time.sleep(seconds))


def _in_saves(names, before):
    """Have functions of os, where the thread of a save calls them, call before() first."""
    from mspt.training import saving

    saving.CHUNK = SMALL_CHUNK

    def changed(call):
        def inside(*arguments, **options):
            if threading.current_thread().name == saving.THREAD:
                before()
            return call(*arguments, **options)

        return inside

    for name in names:
        setattr(os, name, changed(getattr(os, name)))


def full_disk(size):
    """No file can grow over so many bytes from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
