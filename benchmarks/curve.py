"""Whether training goes the same way with the kernels in use as with plain PyTorch: two loss curves and their distance.

    python benchmarks/curve.py [--steps 200] [--json FILE] [--plot FILE] [key=value …]

The quickstart's second stage from fresh weights, one process, on bundled molecules. A third curve is the reference's
own, from weights moved by a rounding of float32 (6e-8 relative): how far that goes is how far rounding alone takes a
curve, whoever does it.
"""

import argparse
from pathlib import Path

import measure
import torch
from matplotlib.figure import Figure

from mspt import config, kernels
from mspt.data.keyed import Keyed
from mspt.data.shardset import ShardSet
from mspt.data.stream import sequential
from mspt.objectives import Pretraining
from mspt.training.schedule import learning_rate


def losses(loaded, implementation, steps, moved=0.0):
    """The joint loss of every step, float64 [steps]. moved: relative deviation of the initial weights."""
    shards = ShardSet.open(measure.ROOT / loaded.data.train)
    batches = [batch.broadened(loaded.data.line_shapes) for batch in sequential(shards, loaded.data.budget)]
    torch.manual_seed(0)
    module = Pretraining(loaded.model, loaded.objectives)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= 1 + moved * torch.randn_like(parameter)
    optimiser = torch.optim.AdamW(module.parameters(), weight_decay=0.0)
    curve = []
    with kernels.use(implementation):
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(loaded.schedule, step, steps)
            batch, generator = batches[step % len(batches)], Keyed(0, step)
            loss, _ = module("loss", batch, generator, module.weights(batch, generator))
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), loaded.engine.clip)
            optimiser.step()
            curve.append(loss.item())
    return torch.tensor(curve, dtype=torch.float64)


def draw(curves, path):
    """The curves, and their distance from the reference's."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in curves.items():
        left.plot(curve, label=name)
        if name != "reference":
            right.semilogy((curve - curves["reference"]).abs() / curves["reference"], label=name)
    left.set(xlabel="step", ylabel="loss")
    right.set(xlabel="step", ylabel="relative distance from the reference")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="draw the curves here (PNG)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()

    loaded = config.load(measure.ROOT / "configs/quickstart.yaml", options.overrides)
    curves = {
        "reference": losses(loaded, "reference", options.steps),
        "kernels in use": losses(loaded, "auto", options.steps),
        "reference, weights moved by a rounding": losses(loaded, "reference", options.steps, moved=6e-8),
    }
    distances = {}
    for name, curve in list(curves.items())[1:]:
        distance = (curve - curves["reference"]).abs() / curves["reference"]
        distances[name] = {upto: float(distance[:upto].max()) for upto in (10, 50, 100, options.steps)}
        print(name, "  ".join(f"up to step {upto}: {value:.1e}" for upto, value in distances[name].items()))
    if options.plot:
        draw(curves, options.plot)
    if options.json:
        result = {"distances": distances, "curves": {name: curve.tolist() for name, curve in curves.items()}}
        measure.write(options.json, measure.machine() | result)


if __name__ == "__main__":
    main()
