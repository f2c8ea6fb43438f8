"""What the kernels of the message pass share: an edge's geometry, and the gates read off the table.

Legend: n atoms, e edges, P pairs, H heads, D channels a head, F = H D, E edges of a block.
"""

import torch
import triton
import triton.language as tl

from mspt.kernels.spline import MARGIN
from mspt.kernels.triton.launch import launch

# Numbers of a pair's geometry as the kernels read it: fraction of a knot's width, fade, direction.
GEOMETRY = 5
PACK_BLOCK = 128


@triton.jit
def pack_kernel(
    fade, direction, coordinate, row, geometry, pairs, rows,
    MARGIN: tl.constexpr, TABULATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """fade [P], direction [P, 3], coordinate [P] float64 -> row [P + 1] and geometry [P + 1, 5], self-loop first."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = p <= pairs
    given = inside & (p > 0)
    first, fraction = p, tl.zeros((BLOCK,), tl.float32)
    if TABULATED:
        place = tl.load(coordinate + p - 1, mask=given, other=0.0)
        place = tl.where(p == 0, 1.0 * MARGIN, place)
        first = tl.minimum(tl.maximum(place.to(tl.int32) - 1, 0), rows - 4)
        fraction = (place - (first + 1).to(tl.float64)).to(tl.float32)
    tl.store(row + p, first, mask=inside)
    tl.store(geometry + p * 5, fraction, mask=inside)
    tl.store(geometry + p * 5 + 1, tl.load(fade + p - 1, mask=given, other=1.0), mask=inside)
    for axis in tl.static_range(3):
        value = tl.load(direction + (p - 1) * 3 + axis, mask=given, other=0.0)
        tl.store(geometry + p * 5 + 2 + axis, value, mask=inside)


def pack(table, coordinate, fade, direction):
    """The first row [P + 1] int32 of the table that a pair's gates need, and its geometry [P + 1, 5].

    Entry 0 is the self-loop's, entry p + 1 pair p's. Whole rows are split off in float64: float32 would lose digits.
    """
    pairs, tabulated = len(fade), coordinate is not None
    row = fade.new_empty(pairs + 1, dtype=torch.int32)
    geometry = fade.new_empty(pairs + 1, GEOMETRY)
    launch(
        pack_kernel,
        (triton.cdiv(pairs + 1, PACK_BLOCK),),
        *(fade, direction, coordinate if tabulated else fade, row, geometry, pairs, table.shape[1]),
        MARGIN=MARGIN,
        TABULATED=tabulated,
        BLOCK=PACK_BLOCK,
    )
    return row, geometry


@triton.jit
def spline_weights(t):
    """Weights of the four coefficients around a fraction t of a knot's width."""
    u = 1.0 - t
    return (
        u * u * u * (1.0 / 6),
        (4.0 - 6.0 * t * t + 3.0 * t * t * t) * (1.0 / 6),
        (4.0 - 6.0 * u * u + 3.0 * u * u * u) * (1.0 / 6),
        t * t * t * (1.0 / 6),
    )


@triton.jit
def spline_slopes(t):
    """Derivatives of spline_weights."""
    u = 1.0 - t
    return -0.5 * u * u, t * (1.5 * t - 2.0), u * (2.0 - 1.5 * u), 0.5 * t * t


@triton.jit
def spline_curves(t):
    """Derivatives of spline_slopes."""
    return 1.0 - t, 3.0 * t - 2.0, 1.0 - 3.0 * t, t


@triton.jit
def load_tile(base, row, channel, inside, WIDTH: tl.constexpr):
    """Rows [E] of width WIDTH -> [E, D] float32, zero outside."""
    return tl.load(base + row[:, None] * WIDTH + channel[None, :], mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def load_gate(table, row, weights, channel, inside, WIDTH: tl.constexpr, TABULATED: tl.constexpr):
    """A gate of a block of edges [E, D]. table: of a head, from the gate's first column; row [E], weights: four [E]."""
    value = load_tile(table, row, channel, inside, WIDTH)
    if TABULATED:
        value *= weights[0][:, None]
        for r in tl.static_range(1, 4):
            value += weights[r][:, None] * load_tile(table + r * WIDTH, row, channel, inside, WIDTH)
    return value


@triton.jit
def load_pair(pair, row, geometry, edge, inside):
    """Of edges [E]: row, weights, fade and the three components of the direction, from source to target reversed."""
    signed = tl.load(pair + edge, mask=inside, other=0)
    p = tl.abs(signed)
    sign = tl.where(signed < 0, -1.0, 1.0)
    first = tl.load(row + p, mask=inside, other=0)
    weights = spline_weights(tl.load(geometry + p * 5, mask=inside, other=0.0))
    fade = tl.load(geometry + p * 5 + 1, mask=inside, other=0.0)
    x = tl.load(geometry + p * 5 + 2, mask=inside, other=0.0) * sign
    y = tl.load(geometry + p * 5 + 3, mask=inside, other=0.0) * sign
    z = tl.load(geometry + p * 5 + 4, mask=inside, other=0.0) * sign
    return first, weights, fade, x, y, z
