"""The table of radial gates: silu and the filter that takes a spline's values to its coefficients, in one pass.

The inverse of the tridiagonal (1, 4, 1) / 6 is a symmetric filter √3 z^|m|, z = √3 − 2, that decays so fast that 14
taps on either side hold it to 1e-8; beyond the ends values are mirrored. So no dense product is needed, whose digits
would depend on what a GPU is allowed to round to. The filter is symmetric: the gradient takes the same one.

Legend: G rows of the table, H heads, D channels a head, C = 4D columns a head, K radial functions.
"""

import torch
import triton
import triton.language as tl
from torch.nn.functional import linear, silu

from mspt.kernels import reference
from mspt.kernels.triton.fused import fused
from mspt.kernels.triton.launch import WIDTHS, launch

TAPS = 14
SCALE, DECAY = 3**0.5, 3**0.5 - 2
# Rows of a program: with the columns of a head of 32 channels, a tile of 1024 elements, 8 registers a thread.
ROWS = 8


@triton.jit
def mirrored(k, rows):
    """The row that stands for row k, which may lie up to `rows` beyond either end."""
    k = tl.where(k < 0, -1 - k, k)
    return tl.where(k >= rows, 2 * rows - 1 - k, k)


@triton.jit
def coefficients_kernel(
    before, table, rows, H: tl.constexpr, C: tl.constexpr,
    TAPS: tl.constexpr, SCALE: tl.constexpr, DECAY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """before [G, H C] -> table [H, G, C]: the filtered silu of before."""
    k, head, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.arange(0, C)
    inside = (k < rows)[:, None]
    place = head * C + column[None, :]
    value = tl.load(before + k[:, None] * H * C + place, mask=inside, other=0.0)
    total = SCALE * value * tl.sigmoid(value)
    tap = SCALE
    for m in tl.static_range(1, TAPS + 1):
        tap *= DECAY
        value = tl.load(before + mirrored(k - m, rows)[:, None] * H * C + place, mask=inside, other=0.0)
        total += tap * value * tl.sigmoid(value)
        value = tl.load(before + mirrored(k + m, rows)[:, None] * H * C + place, mask=inside, other=0.0)
        total += tap * value * tl.sigmoid(value)
    tl.store(table + (head * rows + k[:, None]) * C + column[None, :], total, mask=inside)


@triton.jit
def coefficients_backward_kernel(
    g_table, before, g_before, rows, H: tl.constexpr, C: tl.constexpr,
    TAPS: tl.constexpr, SCALE: tl.constexpr, DECAY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """g_table [H, G, C], before [G, H C] -> g_before [G, H C]."""
    k, head, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.arange(0, C)
    inside = (k < rows)[:, None]
    g_table += head * rows * C + column[None, :]
    total = SCALE * tl.load(g_table + k[:, None] * C, mask=inside, other=0.0)
    tap = SCALE
    for m in tl.static_range(1, TAPS + 1):
        tap *= DECAY
        total += tap * tl.load(g_table + mirrored(k - m, rows)[:, None] * C, mask=inside, other=0.0)
        total += tap * tl.load(g_table + mirrored(k + m, rows)[:, None] * C, mask=inside, other=0.0)
    place = k[:, None] * H * C + head * C + column[None, :]
    value = tl.load(before + place, mask=inside, other=0.0)
    part = tl.sigmoid(value)
    tl.store(g_before + place, total * part * (1.0 + value * (1.0 - part)), mask=inside)


def _run(kernel, *tensors, rows, heads, columns):
    shape = {"H": heads, "C": columns, "TAPS": TAPS, "SCALE": SCALE, "DECAY": DECAY, "ROWS": ROWS}
    launch(kernel, (triton.cdiv(rows, ROWS), heads), *tensors, rows, **shape, warps=4)


def _forward(before, heads, basis):
    rows, width = before.shape
    table = before.new_empty(heads, rows, width // heads)
    _run(coefficients_kernel, before, table, rows=rows, heads=heads, columns=width // heads)
    return table, ()


def _backward(gradients, tensors, _kept, heads, _basis):
    (g_table,), (before,) = gradients, tensors
    g_before, (rows, width) = torch.empty_like(before), before.shape
    _run(coefficients_backward_kernel, g_table, before, g_before, rows=rows, heads=heads, columns=width // heads)
    return (g_before,)


_coefficients = fused(_forward, _backward, lambda before, heads, basis: reference.arrange(silu(before), heads, True))


def gate_table(weight, bias, heads, basis, geometry):
    """reference.gate_table; gates without knots and unusual head widths are left to it."""
    if basis.knots is None or len(weight) // (4 * heads) not in WIDTHS:
        return reference.gate_table(weight, bias, heads, basis, geometry)
    weight, bias = reference.at_least_float32(weight, bias)
    before = linear(reference.gate_rows(basis, geometry, weight.dtype), weight, bias)
    return _coefficients((before,), heads, basis)
