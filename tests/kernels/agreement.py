"""Operations on a device against the reference in float64: how far outputs and gradients are apart."""

from itertools import accumulate

import torch

from mspt import kernels
from mspt.kernels import reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def error(function, truth, inputs, device, dtype, second=True):
    """The largest relative error of outputs, gradients and (with second) gradients of gradients of function.

    It gets the inputs in dtype on device, truth gets the same numbers in float64. inputs: tensors, moved to dtype only
    where they are float32, or None.
    """
    results = []
    for run, place, wide in ((function, device, dtype), (truth, "cpu", torch.float64)):
        leaves = [x if x is None else _leaf(x, dtype, wide, place) for x in inputs]
        outputs = run(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        given = [x for x in leaves if x is not None]
        generator = torch.Generator().manual_seed(1)
        cotangents = [_random(x, generator, dtype).requires_grad_() for x in outputs]
        first = torch.autograd.grad(outputs, given, cotangents, create_graph=second)
        found = [*outputs, *first]
        if second:
            heads = [_random(x, generator, dtype) for x in first]
            leaves = [*cotangents, *given]
            of_first = torch.autograd.grad(first, leaves, heads, allow_unused=True)
            found += [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, of_first, strict=True)]
        results.append([x.detach().double().cpu() for x in found])
    relative = [(got - true).norm() / (true.norm() + 1e-30) for got, true in zip(*results, strict=True)]
    return float(torch.stack(relative).max())  # not Python's max, which loses NaN


def _leaf(x, dtype, wide, device):
    x = x.to(device)
    return (x if x.dtype == torch.float64 else x.to(dtype).to(wide)).requires_grad_()


def _random(x, generator, dtype):
    """Numbers that dtype holds, the same on every device."""
    return torch.randn(x.shape, generator=generator).to(dtype).to(x.device, x.dtype)


def molecules(sizes, seed=0):
    """Random positions [n, 3] float64, at a density of bonds, and ptr."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(size, 3, generator=generator) * 0.7 * max(size, 1) ** (1 / 3) for size in sizes]
    return torch.cat(parts).double(), torch.tensor([0, *accumulate(sizes)])


def attention_error(
    device, dtype, sizes, width, heads=2, *, vectors=True, vector_cutoff=False, knots=16, max_neighbours=32, loop=True,
    second=True, cutoff=3.0,
):  # fmt: skip
    """The largest error of the message pass, with regard to positions, weights of the gates, qkv and vec."""
    positions, ptr = molecules(sizes)
    channels, basis = heads * width, kernels.RadialBasis(8, cutoff, knots)
    torch.manual_seed(0)
    qkv, weight = torch.randn(len(positions), heads, 5 * width), torch.randn(4 * channels, 8)
    vec = torch.randn(len(positions), 3, channels) if vectors else None
    bias = torch.randn(4 * channels)

    def through(module):
        def run(qkv, vec, weight, bias, positions):
            graph = module.radius_graph(positions.detach(), ptr.to(positions.device), cutoff, max_neighbours, loop)
            geometry = kernels.pair_geometry(positions, graph, basis, qkv.dtype)
            table = reference.gate_table(weight, bias, heads, basis, geometry)
            return module.radius_graph_attention(qkv, vec, table, graph, geometry, vector_cutoff)

        return run

    return error(through(kernels), through(reference), (qkv, vec, weight, bias, positions), device, dtype, second)


def spanning(directions, n, channels):
    """Vectors [n, 3, channels] that span so many directions."""
    torch.manual_seed(0)
    vec = torch.randn(n, 3, channels, dtype=torch.float64)
    vec[:, directions:] = 0
    return (torch.linalg.qr(torch.randn(n, 3, 3, dtype=torch.float64))[0] @ vec).float()
