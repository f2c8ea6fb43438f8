"""One rank of several trainings of the tiny module that save or resume, those at ZeRO 3 last.

    resume.py OUT JOB…

JOB: NAME:RUN[:FROM] (RUN: see tiny.parse). Without FROM it trains from the start and saves at steps HALF and STEPS into
OUT/NAME, HALF in the background: not a byte of it is written before training is over; and HALF once more, at once, into
OUT/NAME-at-once. With FROM it loads OUT/FROM's checkpoint of step HALF and trains on to STEPS, which it saves. Prints,
as JSON, name -> losses of the second half.
"""

import json
import os
import sys
import threading
from pathlib import Path

import tiny
import torch
import torch.distributed as dist

from mspt.training import checkpoint
from mspt.training.engine import Engine, initialise
from mspt.training.saving import THREAD, Saver

HALF = 7
disk = threading.Event()  # saves write nothing while it is not set
write = os.write


def held(*arguments):
    if threading.current_thread().name == THREAD:
        disk.wait()
    return write(*arguments)


def job(out, process, name, run, source=None):
    settings, dtype = tiny.parse(run)
    module = tiny.Tiny().to(dtype)
    if source:  # nothing may be left of what it starts with
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                tensor.uniform_()
    torch.manual_seed(100 + process.rank)
    engine = Engine(module, settings, tiny.SCHEDULE, tiny.STEPS, accumulation=2)
    start = 0
    if source:
        restored = checkpoint.load(engine, out / source / "checkpoints" / f"step-{HALF:08d}")
        start = restored.step
        assert restored.position == {"epoch": 0, "step": HALF} and restored.extra == {"note": "é"}
        assert (engine.done, engine.updates) == (HALF, HALF)
    losses = []
    saver = Saver(engine, out / name)
    for step in range(start, tiny.STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for batch in tiny.micro_batches(step, process.rank, process.world_size, 2, dtype):
            loss = engine(*batch) / tiny.BATCH + 0 * torch.rand(())  # moves the state of the random numbers
            engine.backward(loss)
            total += loss.detach()
        dist.all_reduce(total)
        engine.step()
        if step >= HALF:
            losses.append(float(total))
        if step + 1 == HALF:
            disk.set()
            checkpoint.save(engine, out / f"{name}-at-once", HALF, **state(HALF))
            disk.clear()
            saver.begin(HALF, **state(HALF))
    assert saver.step is None or not saver.finished
    disk.set()
    saver.begin(tiny.STEPS, **state(tiny.STEPS))  # waits for the one before
    saver.wait()
    return losses


def state(step):
    return {"position": {"epoch": 0, "step": step}, "seed": 3, "config": {"a": 1}, "extra": {"note": "é"}}


if __name__ == "__main__":
    os.write = held
    own = initialise()
    print(json.dumps({spec.split(":")[0]: job(Path(sys.argv[1]), own, *spec.split(":")) for spec in sys.argv[2:]}))
