"""The encoders beside one another: a step of each at its published size.

    python benchmarks/encoders.py [--json FILE] [--molecules 32] [--device cuda] [--runs 5]

Bundled QM9 molecules, forward and backward of scalars and vectors. All take turns in one run: medians, and the medians
of the ratios to the equivariant transformer in a round. Memory is the peak above the state before the step;
share_of_matmul_rate is of the counted operations (mspt/training/flops.py).
"""

import argparse
from pathlib import Path

import measure
import torch

from mspt.models import encoders
from mspt.training import flops
from mspt.training.engine import keep_freed_memory


def step(molecules, name, device):
    """Forward and backward of the encoder of this name with its default settings."""
    batch = measure.bundled(molecules, device=device)
    torch.manual_seed(0)
    model = encoders.build(encoders.parse({"name": name})).to(device)

    def run():
        model.zero_grad(set_to_none=True)
        outputs = model(batch.numbers, batch.positions, batch.ptr)
        sum(output.square().sum() for output in outputs if output is not None).backward()

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--molecules", type=int, default=32)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    keep_freed_memory()
    molecules, device = options.molecules, options.device
    batch, rate = measure.bundled(molecules), flops.matmul_rate(device, torch.float32)
    times = measure.interleaved(
        {name: step(molecules, name, device) for name in encoders.ENCODERS}, options.runs, device
    )
    result = measure.machine(device) | {"molecules": molecules, "atoms": len(batch.numbers)}
    for name, seconds in measure.medians(times).items():
        settings = encoders.parse({"name": name})
        result[name] = {
            "seconds": seconds,
            "ratio": measure.ratio(times, name, "torchmd_et"),
            "bytes": measure.peak_memory(step, molecules, name, device, device=device),
        }
        if name in flops.ENCODERS:
            per_atom, per_edge = flops.ENCODERS[name](settings)
            counted = 2 * 3 * (len(batch.numbers) * per_atom + flops.edges(batch, settings) * per_edge)
            result[name]["share_of_matmul_rate"] = counted / seconds / rate
        print(name, *(f"{key} {value:.4g}" for key, value in result[name].items()))
    if options.json:
        measure.write(options.json, result)


if __name__ == "__main__":
    main()
