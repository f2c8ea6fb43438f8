"""How fast the trainer is, as it runs: real processes, loader, DeepSpeed, log; medians over logged steps.

    python benchmarks/throughput.py [--json FILE] [--steps 15] [--processes 2] [--config FILE key=value …]

Without --config: the quickstart's second stage and the published one, both on the bundled molecules. molecules/s and
atoms/s are of all processes together, memory is of the first; MFU is the share of the machine's matrix products
(mspt/training/flops.py).
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import measure
import torch

from mspt.training import metrics

BUNDLED = "data.train=shards/bundled/qm9-spectra/train"
CONFIGS = {
    "configs/quickstart.yaml": [],
    # A CPU takes seconds for as few molecules as these.
    "configs/qm9s-molspectra.yaml": [BUNDLED, "data.budget.molecules=16", "data.workers=1", "data.window=4"],
}
NAMES = ("molecules_per_second", "atoms_per_second", "mfu", "data_wait", "memory_gib")
WARM_UP = 2  # log lines


def run(config, overrides, steps, processes):
    """Train so many steps -> name -> median over the log lines after the first ones."""
    with tempfile.TemporaryDirectory() as folder:
        own = {
            "run.dir": folder,
            "training.steps": steps,
            "training.log_every": max(1, steps // 15),
            "checkpoint.every": steps,
            "data.lanes": processes,
            "data.heldout": "null",
            "model.init": "null",
        }
        command = [sys.executable, "launch/local.py", "--processes", str(processes), "--config", config]
        command += [f"{key}={value}" for key, value in own.items()] + overrides
        subprocess.run(command, cwd=measure.ROOT, check=True)
        rows = metrics.read(folder)[WARM_UP:]
    return {name: statistics.median(row[name] for row in rows) for name in NAMES if name in rows[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--config", help="this one alone, with the overrides that follow")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    if options.steps <= 3 * WARM_UP:
        parser.error(f"--steps is {options.steps}; at least {3 * WARM_UP + 1} are needed")

    configs = {options.config: []} if options.config else CONFIGS
    runs = {
        name: run(name, overrides + options.overrides, options.steps, options.processes)
        for name, overrides in configs.items()
    }
    for name, values in runs.items():
        print(name, "  ".join(f"{key} {value:.4g}" for key, value in values.items()))
    if options.json:
        own = {"processes": options.processes, "steps": options.steps, "runs": runs}
        measure.write(options.json, measure.machine("cuda" if torch.cuda.is_available() else "cpu") | own)


if __name__ == "__main__":
    main()
