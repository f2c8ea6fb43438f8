"""One rank of several trainings of the tiny module, one after the other: those at ZeRO 3 last, as it patches torch.

    train.py OUT ACCUMULATION JOB…

JOB: train:RUN, skip:RUN or forces:RUN (RUN: see tiny.parse). For train rank 0 writes OUT/RUN.json (losses and the like)
and OUT/RUN.safetensors: gradients of the first step, final weights, their moving average. For the others see skip.py
and forces.py.
"""

import json
import sys
from pathlib import Path

import safetensors.torch
import tiny
import torch
import torch.distributed as dist

from mspt.training.engine import Engine, initialise


def train(out, accumulation, run):
    process = initialise()
    settings, dtype = tiny.parse(run)
    engine = Engine(tiny.Tiny().to(dtype), settings, tiny.SCHEDULE, tiny.STEPS, accumulation)
    losses, norms, rates = [], [], []
    for step in range(tiny.STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for batch in tiny.micro_batches(step, process.rank, process.world_size, accumulation, dtype):
            with torch.no_grad():
                engine(*batch)  # as the first pass of a global contrast
            loss = engine(*batch) / tiny.BATCH
            engine.backward(loss)
            total += loss.detach()
        dist.all_reduce(total)
        if step == 0:
            gradients = engine.gradients()
        result = engine.step()
        assert not result.skipped
        losses.append(float(total))
        norms.append(result.grad_norm)
        rates.append(result.learning_rate)
    engine.eval()
    with torch.no_grad():
        loss = engine(*tiny.global_batch(99, dtype))
        with engine.ema_weights():
            averaged = engine(*tiny.global_batch(99, dtype))
        again = engine(*tiny.global_batch(99, dtype))
    assert again == loss
    weights, ema = engine.weights(), engine.weights(ema=True)
    if process.rank == 0:
        sets = {"gradient": gradients, "weight": weights, "ema": ema}
        tensors = {f"{kind}/{name}": t.contiguous() for kind, named in sets.items() for name, t in named.items()}
        safetensors.torch.save_file(tensors, Path(out, f"{run}.safetensors"))
        numbers = {"losses": losses, "norms": norms, "rates": rates, "evaluated": [float(loss), float(averaged)]}
        Path(out, f"{run}.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    from forces import forces
    from skip import skip

    for kind, run in (job.split(":") for job in sys.argv[3:]):
        if kind == "train":
            train(sys.argv[1], int(sys.argv[2]), run)
        else:
            {"skip": skip, "forces": forces}[kind](run)
