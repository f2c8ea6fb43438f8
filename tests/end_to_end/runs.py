"""Small runs of the real command on real shards, for the tests beside this file."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from mspt.training import metrics

ROOT = Path(__file__).parents[2]
SHARDS = ROOT / "shards" / "bundled" / "qm9-spectra" / "heldout"
SMALL = [
    "model.encoder.layers=1",
    "model.encoder.channels=16",
    "model.encoder.heads=2",
    "model.encoder.radial_functions=8",
    "model.specformer.layers=1",
    "model.specformer.channels=16",
    "model.specformer.heads=2",
    "model.specformer.feed_forward=32",
    "model.init=null",
    "objectives.contrast.negatives=global",
    f"data.train={SHARDS}",
    "data.heldout=null",
    "data.budget={molecules: 24, atoms: 400}",
    "data.window=2",
    "training.log_every=1",
    "training.deterministic=true",
    "schedule.kind=constant",
    "schedule.warmup=2",
    "checkpoint.every=3",
]

# Of quickstart.yaml: what makes it learn a property.
LABELLED = [
    "model.specformer=null",
    "objectives.masked_patches=null",
    "objectives.contrast=null",
    "objectives.coord={weight: 0.1, sigma: 0.005}",
    "objectives.property={target: homo}",
    "data.split={train: 90, validation: 20}",
    "evaluation.every=2",
    "engine.ema_decay=0.9",
]


def command(folder, processes, steps, *overrides):
    """The command line of a small run in a folder."""
    start = [sys.executable, str(ROOT / "launch" / "local.py"), "--processes", str(processes)]
    settings = [*SMALL, f"run.dir={folder}", f"training.steps={steps}", *overrides]
    return [*start, "--config", str(ROOT / "configs" / "quickstart.yaml"), *settings]


def environment():
    return dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(ROOT))


def run(folder, processes, steps, *overrides):
    """Run to the end -> the rows of its metrics."""
    done = subprocess.run(
        command(folder, processes, steps, *overrides), env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return metrics.read(folder)


def run_and_kill(folder, processes, steps, at, everyone, *overrides):
    """Start a run and SIGKILL it once it has logged step `at`: every process at once, or its last rank alone."""
    started = subprocess.Popen(
        command(folder, processes, steps, *overrides),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 180
    while len(metrics.read(folder)) < at:
        assert started.poll() is None, started.stdout.read()
        assert time.monotonic() < end, f"step {at} was not reached"
        time.sleep(0.01)
    ranks = [child for child in psutil.Process(started.pid).children() if "mspt.cli" in child.cmdline()]
    by_rank = sorted(ranks, key=lambda child: int(child.environ()["RANK"]))
    for victim in [psutil.Process(started.pid), *by_rank] if everyone else by_rank[-1:]:
        victim.send_signal(signal.SIGKILL)
    code = started.wait(timeout=60)
    assert code != 0
    started.stdout.close()
    psutil.wait_procs(ranks, timeout=30)
    assert not [child for child in ranks if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
