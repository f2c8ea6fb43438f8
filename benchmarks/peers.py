"""The encoder beside TorchMD-Net's, and a whole stage-2 step beside the published way of doing it.

    python benchmarks/peers.py [--json FILE] [--molecules 64] [--stage2-molecules 64] [--device cuda] [--runs 5]

Published sizes, bundled QM9 molecules, forward and backward. All that is compared takes turns in one run: medians, and
medians of the ratios in a round. The floors are the products that no implementation avoids, 17 F² multiply-adds an
atom and layer forward and twice those backward: `floor` as forward products three times over, `floor_training_shapes`
as x Wᵀ, g W and gᵀ x. Memory is the peak above the state before the step. On a GPU also in bfloat16, ours against the
same peers in float32; share_of_matmul_rate is of the counted operations (mspt/training/flops.py).

On a CPU all run in the environment that a process has by default. --keep-freed-memory gives all of them the setting
that our trainer makes for itself, by which the peers, with their large temporaries, gain more than we do.
"""

import argparse
from pathlib import Path

import measure
import published
import torch

from mspt import config
from mspt.data.keyed import Keyed
from mspt.models.encoders.torchmd_et import TorchMDET, TorchMDETSettings
from mspt.models.encoders.torchmd_net import convert
from mspt.objectives import Pretraining
from mspt.training import flops
from mspt.training.engine import keep_freed_memory

LAYERS, CHANNELS, HEADS, FUNCTIONS = 8, 256, 8, 64
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def torchmd_net():
    """TorchMD-Net's encoder at the published size."""
    from torchmdnet.models.torchmd_et import TorchMD_ET

    torch.manual_seed(0)
    return TorchMD_ET(
        hidden_channels=CHANNELS, num_layers=LAYERS, num_heads=HEADS, num_rbf=FUNCTIONS, trainable_rbf=False
    )


def encoder(molecules, which, precision, device):
    """A step of an encoder, ours or torchmdnet's with the same weights; the step returns its scalars and vectors."""
    batch = measure.bundled(molecules, device=device)
    model = peer = torchmd_net()
    if which == "ours":
        settings, weights = convert(peer.state_dict(), heads=HEADS)
        model = TorchMDET(settings)
        model.load_state_dict(weights)
    model = model.to(device, PRECISIONS[precision])
    last = batch.ptr if which == "ours" else batch.molecule

    def step():
        model.zero_grad(set_to_none=True)
        scalars, vectors, *_ = model(batch.numbers, batch.positions, last)
        (scalars.sum() + vectors.square().sum()).backward()
        return scalars.detach(), vectors.detach()

    return step


def floors(molecules, precision, device):
    """name -> function: the encoder's products over atoms, and nothing else."""
    n = len(measure.bundled(molecules).numbers)
    shapes = [(n, 5 * CHANNELS), (n, 3 * CHANNELS), (3 * n, 3 * CHANNELS)]  # q, k, v; o; the map of vectors

    def matrix(*shape):
        return torch.randn(shape, device=device, dtype=PRECISIONS[precision])

    joint = [(matrix(n, CHANNELS), matrix(CHANNELS, 8 * CHANNELS))]
    joint += [(matrix(3 * n, CHANNELS), matrix(CHANNELS, 3 * CHANNELS))]
    each = [(matrix(rows, CHANNELS), matrix(columns, CHANNELS), matrix(rows, columns)) for rows, columns in shapes]

    def floor():
        for _ in range(3 * LAYERS):
            for x, weight in joint:
                x @ weight

    def training_shapes():
        for _ in range(LAYERS):
            for x, weight, gradient in each:
                x @ weight.T
                gradient @ weight
                gradient.T @ x

    return {"floor": floor, "floor_training_shapes": training_shapes}


def peaks(build, molecules, kinds, device):
    """Who -> peak memory of its step in bytes; kinds: who -> precision."""
    return {who: measure.peak_memory(build, molecules, who, kind, device, device=device) for who, kind in kinds.items()}


def compare_encoders(molecules, precision, device, runs):
    """What goes into the result under `et`."""
    ours = encoder(molecules, "ours", precision, device)
    theirs = encoder(molecules, "torchmdnet", "fp32", device)
    tolerance = 1e-4 if precision == "fp32" else 5e-2
    for one, other in zip(ours(), theirs(), strict=True):
        error = float((one.float() - other).norm() / other.norm())
        if error > tolerance:
            raise SystemExit(f"outputs differ by {error:.1e}: what is timed is not the same thing")
    steps = {"ours": ours, "torchmdnet": theirs} | floors(molecules, precision, device)
    times = measure.interleaved(steps, runs, device)
    seconds = measure.medians(times)
    memory = peaks(encoder, molecules, {"ours": precision, "torchmdnet": "fp32"}, device)
    batch, settings = measure.bundled(molecules, device=device), TorchMDETSettings(norm="none")
    per_atom, per_edge = flops.torchmd_et(settings)
    counted = 2 * 3 * (len(batch.numbers) * per_atom + flops.edges(batch, settings) * per_edge)
    return {
        "molecules": molecules,
        "precision": precision,
        "seconds": seconds["ours"],
        "torchmdnet_seconds": seconds["torchmdnet"],
        "floor_seconds": seconds["floor"],
        "floor_training_shapes_seconds": seconds["floor_training_shapes"],
        "ratio_to_torchmdnet": measure.ratio(times, "torchmdnet", "ours"),
        "ratio_to_floor": measure.ratio(times, "ours", "floor"),
        "ratio_to_floor_training_shapes": measure.ratio(times, "ours", "floor_training_shapes"),
        "peak_memory_bytes": memory["ours"],
        "torchmdnet_peak_memory_bytes": memory["torchmdnet"],
        "peak_memory_ratio": memory["ours"] / memory["torchmdnet"],
        "share_of_matmul_rate": counted / seconds["ours"] / flops.matmul_rate(device, PRECISIONS[precision]),
    }


def stage2_config():
    return config.load(measure.ROOT / "configs/qm9s-molspectra.yaml")


def stage2(molecules, which, precision, device):
    """A whole step of stage 2: encoder, SpecFormer, three objectives, AdamW."""
    loaded, batch = stage2_config(), measure.bundled(molecules, device=device)
    torch.manual_seed(0)
    if which == "published":
        baseline = published.Pretraining().to(device)
        plain = torch.optim.AdamW(baseline.parameters(), lr=loaded.schedule.peak)
        return lambda: baseline.step(batch, plain)
    module = Pretraining(loaded.model, loaded.objectives).to(device, PRECISIONS[precision])
    optimiser = torch.optim.AdamW(module.parameters(), lr=loaded.schedule.peak, weight_decay=0.0, fused=True)
    generator = Keyed(0, 0)

    def step():
        loss, _ = module("loss", batch, generator, module.weights(batch, generator))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    return step


def compare_stage2(molecules, precision, device, runs):
    """What goes into the result under `stage2`."""
    kinds = {"ours": precision, "published": "fp32"}
    times = measure.interleaved(
        {which: stage2(molecules, which, kind, device) for which, kind in kinds.items()}, runs, device
    )
    seconds = measure.medians(times)
    memory = peaks(stage2, molecules, kinds, device)
    loaded, batch = stage2_config(), measure.bundled(molecules, device=device)
    counted = flops.training_step(
        loaded.model, loaded.objectives, molecules, len(batch.numbers), flops.edges(batch, loaded.model.encoder)
    )
    return {
        "molecules": molecules,
        "precision": precision,
        "seconds": seconds["ours"],
        "published_seconds": seconds["published"],
        "molecules_per_second": molecules / seconds["ours"],
        "ratio_to_published_way": measure.ratio(times, "published", "ours"),
        "peak_memory_bytes": memory["ours"],
        "published_peak_memory_bytes": memory["published"],
        "peak_memory_ratio": memory["ours"] / memory["published"],
        "share_of_matmul_rate": counted / seconds["ours"] / flops.matmul_rate(device, PRECISIONS[precision]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--molecules", type=int, help="of the encoder's step; default 64, on a GPU 1024")
    parser.add_argument("--stage2-molecules", type=int, help="of the whole step; default 64, on a GPU 1024")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--keep-freed-memory", action="store_true", help="as the trainer does, for all")
    options = parser.parse_args()
    if options.keep_freed_memory:
        keep_freed_memory()
    device, on_gpu = options.device, options.device == "cuda"

    result = measure.machine(device) | {"keep_freed_memory": options.keep_freed_memory}
    for precision in ("fp32", "bf16") if on_gpu else ("fp32",):
        suffix = "" if precision == "fp32" else "_bf16"
        molecules = options.molecules or (1024 if on_gpu else 64)
        result[f"et{suffix}"] = compare_encoders(molecules, precision, device, options.runs)
        molecules = options.stage2_molecules or (1024 if on_gpu else 64)
        result[f"stage2{suffix}"] = compare_stage2(molecules, precision, device, options.runs)
    for part in [name for name in result if name.startswith(("et", "stage2"))]:
        print(part)
        for name, value in result[part].items():
            print(f"    {name:32s} {value if isinstance(value, str) else format(value, '.4g')}")
    if options.json:
        measure.write(options.json, result)


if __name__ == "__main__":
    main()
