"""Each fused operation: plain PyTorch beside what is in use, and the floor that no implementation gets under.

    python benchmarks/kernels.py [--json FILE] [--device cuda] [--runs 7] [--only whiten …]
    python benchmarks/kernels.py --sizes [--plot FILE]

Published sizes on bundled molecules; medians, ratios taken in one run. The floor of a forward pass is the larger of two
times: reading every argument and writing every result once at the rate of a large copy, and the multiply-adds at the
rate of a matrix product; a backward pass counts twice. --sizes: the encoder's forward and backward against the number
of molecules and, as one system of molecules side by side, against its atoms.
"""

import argparse
import math
from pathlib import Path

import measure
import numpy as np
import torch
from matplotlib.figure import Figure

from mspt import kernels
from mspt.chemistry.elements import MAX_NUMBER
from mspt.kernels import selection
from mspt.models.encoders.torchmd_et import TorchMDET, TorchMDETSettings
from mspt.training import flops
from mspt.training.engine import keep_freed_memory

F, H, D = 256, 8, 32
BASIS = kernels.RadialBasis(64, 5.0, 384)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Inputs:
    """What the operations are called with: 64 molecules, features of dtype on device."""

    def __init__(self, dtype, device):
        self.dtype, self.device = dtype, device
        self.batch = measure.bundled(64, device=device)
        self.n = len(self.batch.numbers)
        self.graph = kernels.radius_graph(self.batch.positions, self.batch.ptr, 5.0, 32, True)
        self.geometry = kernels.pair_geometry(self.batch.positions, self.graph, BASIS, dtype)

    def random(self, *shape):
        generator = torch.Generator(self.device).manual_seed(math.prod(shape))
        return torch.randn(shape, device=self.device, generator=generator).to(self.dtype).requires_grad_()


# Of each operation: the arguments, and the multiply-adds of a forward pass.


def radius_graph(given):
    pairs = int((given.batch.ptr.diff() ** 2).sum())
    return (given.batch.positions, given.batch.ptr, 5.0, 32, True), 3 * pairs


def neighbour_embedding(given):
    table, weight, bias = given.random(MAX_NUMBER + 1, F), given.random(F, 64), given.random(F)
    elements = len(given.batch.numbers.unique())
    arguments = given.batch.numbers, table, weight, bias, BASIS, given.graph, given.geometry
    return arguments, 65 * (len(given.graph.source) + given.n * elements * F)


def gate_table(given):
    arguments = given.random(4 * F, 64), given.random(4 * F), H, BASIS, given.geometry
    return arguments, BASIS.rows * 64 * 4 * F


def radius_graph_attention(given):
    table = kernels.gate_table(*gate_table(given)[0]).detach().requires_grad_()
    arguments = given.random(given.n, H, 5 * D), given.random(given.n, 3, F), table, given.graph, given.geometry, False
    return arguments, 20 * F * len(given.graph.source)


def linear(given):
    """The map to q, k and v, head by head."""
    return (given.random(given.n, F), given.random(5 * F, F), given.random(5 * F), H), 5 * F * F * given.n


def filtered_messages(given):
    """PaiNN's, at half the width: 128 channels, as published."""
    channels = F // 2
    graph = kernels.radius_graph(given.batch.positions, given.batch.ptr, 5.0, 32, False)
    geometry = kernels.pair_geometry(given.batch.positions, graph, BASIS, torch.float32)
    filters = given.random(len(geometry.distance), 3 * channels)
    arguments = given.random(given.n, 3 * channels), given.random(given.n, 3, channels), filters, graph
    return (*arguments, geometry.direction), 10 * channels * len(graph.source)


def whole_molecules(given):
    """EGNN's graph, of every two atoms of a molecule, and its published width."""
    graph = kernels.radius_graph(given.batch.positions, given.batch.ptr, math.inf, given.n, False)
    return graph, len(graph.source), F // 2


def edge_features(given):
    graph, edges, channels = whole_molecules(given)
    atoms = given.random(given.n, channels), given.random(given.n, channels)
    return (*atoms, given.random(channels), given.random(edges), graph), 20 * edges * channels


def gated_sums(given):
    graph, edges, channels = whole_molecules(given)
    gate = given.random(1, channels), given.random(1)
    return (given.random(edges, channels), *gate, given.random(edges), graph), 20 * edges * channels


def direction(given, graph):
    """Vectors along the edges [3, e]; their lengths do not matter here."""
    return (given.batch.positions[graph.target] - given.batch.positions[graph.source]).T.double()


def triplets(given):
    graph = kernels.radius_graph(given.batch.positions, given.batch.ptr, 5.0, 32, False)
    along = direction(given, graph)
    return (along, graph), 30 * len(kernels.triplets(along, graph).outgoing)


def spherical_harmonics(given):
    """Of all triplets, for positions that move."""
    graph = kernels.radius_graph(given.batch.positions, given.batch.ptr, 5.0, 32, False)
    seen = torch.randn(3, len(kernels.triplets(direction(given, graph), graph).outgoing), device=given.batch.ptr.device)
    return ((seen / seen.norm(dim=0)).double().requires_grad_(), 7, given.dtype), 3 * 49 * seen.shape[1]


def triplet_messages(given):
    """SphereNet's, at its published widths."""
    channels, degrees, radial, basis = 64, 7, 6, 8
    graph = kernels.radius_graph(given.batch.positions, given.batch.ptr, 5.0, 32, False)
    met = kernels.triplets(direction(given, graph), graph)
    edges, functions = len(graph.source), degrees**2
    known = given.random(edges, channels), given.random(len(met.outgoing), functions).detach()
    weights = [given.random(basis, count * radial) for count in (degrees, functions)]
    weights += [given.random(channels, basis), given.random(channels, basis)]
    products = len(met.outgoing) * ((degrees + functions) * basis + 2 * basis * channels + 2 * channels)
    products += edges * (degrees + functions) * radial * basis
    spherical = given.random(edges, degrees, radial).detach()
    return (*known, spherical, *weights, met.begin, met.outgoing, graph.ptr), products


def update(given):
    n = given.n
    return (given.random(n, F), given.random(n, 3, F), given.random(n, 3 * F), given.random(n, 3, 3 * F)), 7 * n * F


def whiten(given):
    return (given.random(given.n, 3, F), given.random(F), (2e-5, 2e-5, 2e-5)), 15 * given.n * F


def carried_score_attention(given):
    """The third layer of the published SpecFormer, 16 molecules."""
    molecules, heads, tokens, width, layers = 16, 16, 347, 8, 3
    parts = [given.random(molecules, tokens, heads, width) for _ in range(2 * layers + 1)]
    arguments = parts[:layers], parts[layers:-1], parts[-1], None
    return arguments, molecules * heads * tokens**2 * width * (layers + 1)


OPERATIONS = (
    radius_graph,
    neighbour_embedding,
    gate_table,
    radius_graph_attention,
    filtered_messages,
    edge_features,
    gated_sums,
    triplets,
    spherical_harmonics,
    triplet_messages,
    linear,
    update,
    whiten,
    carried_score_attention,
)


def tensors(value):
    """All tensors in nested tuples and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, tuple | list) else []


class Case:
    """An operation as one implementation runs it, on inputs made by the same: a graph may hold what only it reads."""

    def __init__(self, make, implementation, precision, device):
        self.operation, self.implementation = getattr(kernels, make.__name__), implementation
        with kernels.use(implementation):
            self.arguments, self.products = make(Inputs(PRECISIONS[precision], device))
        self.leaves = [tensor for tensor in tensors(self.arguments) if tensor.requires_grad]
        results = self.forward()
        self.gradients = [torch.ones_like(part) for part in results if part.requires_grad]
        self.moved = sum(tensor.nbytes for tensor in tensors(self.arguments) + results)

    def forward(self):
        with kernels.use(self.implementation):
            return tensors(self.operation(*self.arguments))

    def both(self):
        results = [part for part in self.forward() if part.requires_grad]
        with kernels.use(self.implementation):
            return torch.autograd.grad(results, self.leaves, self.gradients)


def time_operation(make, precision, device, runs, rates):
    """Rows of the result: forward, and forward and backward, of an operation by the reference and by what is in use."""
    in_use = selection.choose(torch.device(device))
    cases = {name: Case(make, name, precision, device) for name in ("reference", in_use)}
    plain = cases["reference"]
    floor = max(plain.moved / rates["copy"], 2 * plain.products / rates[precision])
    rows = []
    for kind, factor in (("forward", 1), ("both", 3)):
        if kind == "both" and not plain.leaves:
            continue
        times = measure.interleaved({name: getattr(case, kind) for name, case in cases.items()}, runs, device)
        seconds = measure.medians(times)
        rows.append(
            {
                "operation": make.__name__,
                "precision": precision,
                "pass": kind,
                "implementation": in_use,
                "reference_seconds": seconds["reference"],
                "seconds": seconds[in_use],
                "floor_seconds": factor * floor,
                "ratio_to_reference": measure.ratio(times, "reference", in_use),
                "ratio_to_floor": seconds[in_use] / (factor * floor),
            }
        )
    return rows


def operations(options):
    """Time them all and print -> what goes into the result."""
    rates = {name: flops.matmul_rate(options.device, dtype) for name, dtype in PRECISIONS.items()}
    rates["copy"] = measure.copy_rate(options.device)
    print(f"{'ms':38s}{'reference':>10s}{'in use':>10s}{'floor':>10s}")
    rows = []
    for make in OPERATIONS:
        for precision in PRECISIONS:
            if options.only and make.__name__ not in options.only:
                continue
            if precision != "fp32" and make in (
                radius_graph,
                filtered_messages,
                edge_features,
                gated_sums,
                triplets,
                spherical_harmonics,
                triplet_messages,
            ):  # in float32
                continue
            for row in time_operation(make, precision, options.device, options.runs, rates):
                rows.append(row)
                keys = ("reference_seconds", "seconds", "floor_seconds")
                milliseconds = "".join(f"{1e3 * row[key]:10.3f}" for key in keys)
                print(
                    f"{row['operation']:24s}{precision:6s}{row['pass']:8s}{milliseconds}"
                    f"  {row['ratio_to_reference']:.1f} x as fast, {row['ratio_to_floor']:.1f} x the floor"
                )
    return {"rates": rates, "operations": rows}


def packed(atoms, device):
    """numbers, positions, ptr of one system of about so many atoms: bundled molecules, each along its own axes, on a
    grid that leaves at least 1 Å between their nuclei's boxes."""
    batch = measure.bundled(min(1024, max(1, atoms // 16)))
    boxes = []
    for positions in batch.positions.split(batch.ptr.diff().tolist()):
        centred = positions - positions.mean(0)
        turned = centred @ torch.linalg.svd(centred)[2].T
        boxes.append(turned - turned.min(0).values)
    spacing = torch.stack([box.max(0).values for box in boxes]).max(0).values + 1.0
    copies = math.ceil(atoms / len(batch.numbers))
    cells = len(boxes) * copies
    # As near to a cube as whole cells allow.
    side = (cells * spacing.prod()) ** (1 / 3) / spacing
    x, y = int(side[0].ceil()), int(side[1].ceil())
    index = torch.arange(cells)
    corners = torch.stack([index % x, index // x % y, index // (x * y)], 1) * spacing
    positions = torch.cat([box + corner for box, corner in zip(boxes * copies, corners, strict=True)])
    numbers, ptr = batch.numbers.repeat(copies), torch.tensor([0, len(positions)])
    return numbers.to(device), positions.to(device), ptr.to(device)


def sizes(options):
    """Time the encoder over sizes, print and draw -> what goes into the result."""
    device = options.device
    keep_freed_memory()  # as the trainer does
    torch.manual_seed(0)
    # Two layers: every one costs the same, and the largest system must fit the memory.
    model = TorchMDET(TorchMDETSettings(layers=2)).to(device)
    # Without cells, as in the reference, a system's atoms all meet each other.
    largest = 3_000 if selection.choose(torch.device(device)) == "reference" else options.largest
    whole = measure.bundled(256, device=device)

    def molecules(count):
        ptr = whole.ptr[: count + 1]
        return whole.numbers[: ptr[-1]], whole.positions[: ptr[-1]], ptr

    axes = {
        "molecules": [molecules(2**power) for power in range(9)],
        "atoms": [packed(size, device) for size in np.geomspace(10, options.largest, 9).astype(int) if size <= largest],
    }
    rows = {}
    for axis, systems in axes.items():
        rows[axis] = []
        for numbers, positions, ptr in systems:
            graph = kernels.radius_graph(positions, ptr, 5.0, 32, True)

            def step(numbers=numbers, positions=positions, ptr=ptr):
                model.zero_grad(set_to_none=True)
                scalars, vectors = model(numbers, positions, ptr)
                (scalars.sum() + vectors.square().sum()).backward()

            seconds = measure.medians(measure.interleaved({"step": step}, options.runs, device))["step"]
            size = len(ptr) - 1 if axis == "molecules" else len(numbers)
            rows[axis].append({axis: size, "atoms": len(numbers), "edges": len(graph.source), "seconds": seconds})
            print(f"{size:8d} {axis:10s} {len(graph.source):9d} edges {1e3 * seconds:10.2f} ms")
    if options.plot:
        draw(rows, options.plot)
    return {"sizes": rows}


def draw(rows, path):
    """Seconds against size, log-log, beside a line of cost that grows as the size does."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (axis, points) in zip(figure.subplots(1, 2), rows.items(), strict=True):
        sizes, seconds = (np.array([point[key] for point in points]) for key in (axis, "seconds"))
        axes.loglog(sizes, seconds, "o-", label="forward and backward")
        axes.loglog(sizes, seconds[-1] * sizes / sizes[-1], ":", color="grey", label="linear")
        axes.set(xlabel={"molecules": "molecules", "atoms": "atoms of one system"}[axis], ylabel="s")
        axes.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=[make.__name__ for make in OPERATIONS])
    parser.add_argument("--sizes", action="store_true", help="the encoder over sizes, in place of the operations")
    parser.add_argument("--largest", type=int, default=100_000, help="atoms of the largest system of --sizes")
    parser.add_argument("--plot", type=Path, help="draw --sizes here (PNG)")
    options = parser.parse_args()
    result = sizes(options) if options.sizes else operations(options)
    if options.json:
        measure.write(options.json, measure.machine(options.device) | result)


if __name__ == "__main__":
    main()
