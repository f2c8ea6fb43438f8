"""A step that is not finite on the last rank alone must leave no trace on any; see train.py for how it is run."""

import tiny
import torch

from mspt.training.engine import Engine, initialise
from mspt.training.schedule import ScheduleSettings

CONSTANT = ScheduleSettings(kind="constant", peak=0.01)
NAN, INF = float("nan"), float("inf")


def train(process, settings, bad_steps):
    """Two good steps, the bad ones, two good ones -> (the engine, the results of the bad ones)."""
    engine = Engine(tiny.Tiny(), settings, CONSTANT, steps=10, accumulation=2)
    results = []
    for step, bad in [(0, None), (1, None), *((7, bad) for bad in bad_steps), (2, None), (3, None)]:
        before, updates = snapshot(engine), engine.updates
        for index, batch in enumerate(tiny.micro_batches(step, process.rank, process.world_size, 2)):
            loss = engine(*batch) / tiny.BATCH
            if bad and process.rank == process.world_size - 1 and index == 0:
                loss = bad(loss)
            engine.backward(loss)
        result = engine.step()
        assert result.skipped == (bad is not None), (step, result)
        if bad:
            assert all(map(torch.equal, before, snapshot(engine))) and engine.updates == updates
            results.append(result)
    return engine, results


def snapshot(engine):
    return [elements.clone() for f in engine.fragments for elements in engine.fragment_state(f).values()]


def spoil_gradient(loss):
    loss.register_hook(lambda gradient: gradient * NAN)
    return loss


def skip(run):
    process = initialise()
    settings, _ = tiny.parse(run)
    spoiled, results = train(process, settings, [lambda loss: loss + INF, spoil_gradient, lambda loss: loss * NAN])
    assert not any(result.grad_norm < INF for result in results)
    clean, _ = train(process, settings, [])
    assert spoiled.done == 7 and spoiled.updates == clean.updates == 4
    for fragment in clean.fragments:  # not whole masters: what lies in their padding is never set
        ours, theirs = spoiled.fragment_state(fragment), clean.fragment_state(fragment)
        assert all(torch.equal(ours[kind], theirs[kind]) for kind in theirs), (run, fragment)
    # Working weights too, not only the masters.
    with torch.no_grad():
        assert spoiled(*tiny.global_batch(9)) == clean(*tiny.global_batch(9))
    print(f"{run} leaves no trace")
