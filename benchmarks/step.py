"""Where the time of a training step goes: the quickstart's stage 2 on one micro-batch of bundled molecules.

    python benchmarks/step.py [--json FILE]

Medians of forward and backward, one process, in milliseconds and as shares of the whole step. No optimiser and no
communication: what is measured is the network that the kernels are to make faster.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from mspt import config, files, kernels
from mspt.data.keyed import Keyed
from mspt.data.shardset import ShardSet
from mspt.data.stream import sequential
from mspt.models.pretraining import Pass
from mspt.objectives import Pretraining

ROOT = Path(__file__).parent.parent


def median(function, runs):
    """The median of so many runs, in seconds, after one that is not counted."""
    times = []
    for _ in range(runs + 1):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()

    loaded = config.load(ROOT / "configs" / "quickstart.yaml")
    batch = next(sequential(ShardSet.open(ROOT / "shards/bundled/qm9-spectra/train"), loaded.data.budget))
    torch.manual_seed(0)
    module = Pretraining(loaded.model, loaded.objectives)
    generator, whole = Keyed(0, 0), batch.broadened(loaded.data.line_shapes)
    totals = module.weights(whole, generator)

    def step():
        module.loss(whole, generator, totals)[0].backward()

    def encoder():
        scalars, vectors = module.network.encoder(whole.numbers, whole.positions, whole.ptr)
        (scalars.sum() + vectors.square().sum()).backward()

    def specformer():
        tokens, readout = Pass(module.network, whole).spectrum
        (readout.sum() + sum(part.square().sum() for part in tokens.values())).backward()

    parts = {
        "step": step,
        "encoder": encoder,
        "specformer": specformer,
        "broadening": lambda: batch.broadened(loaded.data.line_shapes),
    }
    seconds = {name: median(function, options.runs) for name, function in parts.items()}
    molecules = len(batch.keys)
    print(f"{molecules} molecules, {len(batch.numbers)} atoms, {torch.get_num_threads()} threads, medians")
    for name, value in seconds.items():
        print(f"{name:12s} {1e3 * value:8.1f} ms  {value / seconds['step']:6.1%} of the step")
    print(f"{molecules / (seconds['step'] + seconds['broadening']):.0f} molecules/s")
    if options.json:
        result = {
            "seconds": seconds,
            "molecules": molecules,
            "atoms": len(batch.numbers),
            "threads": torch.get_num_threads(),
            "kernels": kernels.implementation("cpu"),
            "device": platform.processor() or platform.machine(),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "date": datetime.date.today().isoformat(),
        }
        files.write(options.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
