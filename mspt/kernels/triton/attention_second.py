"""The gradient of the message pass's gradient, without atomic sums and with nothing of the size of edges times
channels: the passes of attention.py and attention_backward.py, differentiated along h.

The gradient of qkv, vec, table and geometry, multiplied by h and summed, is Σ g · (derivative of the outputs along h).
So g_scalars and g_vectors get the derivative of the outputs; and as second derivatives are symmetric, the inputs get
the derivative of attention_backward along h, with g_scalars and g_vectors held fixed.

Numbers that depend on the inputs are kept with their derivatives along h, as tuples (value, tangent); of results only
tangents are kept. Two of everything: the tiles are half as large as those of the other passes.

Legend: n atoms, e edges, P pairs, H heads, D channels a head, F = H D, E edges or pairs of a block. Items: as in
attention_backward.py.
"""

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from mspt.kernels.operators import empty_gradients
from mspt.kernels.triton.attention_backward import add_heads, add_up, chunks_of_rows, load_item
from mspt.kernels.triton.launch import TILE, edges_a_block, launch
from mspt.kernels.triton.message import load_tile, pack, spline_curves, spline_slopes, spline_weights


@triton.jit
def mul(a, b):
    return a[0] * b[0], tangent(a, b)


@triton.jit
def tangent(a, b):
    """The tangent of a product."""
    return a[0] * b[1] + a[1] * b[0]


@triton.jit
def add(a, b):
    return a[0] + b[0], a[1] + b[1]


@triton.jit
def scale(g, a):
    """g a for a factor g without a tangent."""
    return g * a[0], g * a[1]


@triton.jit
def column(a):
    """[E] -> [E, 1]"""
    return a[0][:, None], a[1][:, None]


@triton.jit
def inner(a, b):
    """The inner products [E] of rows [E, D]."""
    product = mul(a, b)
    return tl.sum(product[0], 1), tl.sum(product[1], 1)


@triton.jit
def silu(score):
    """silu and its derivative."""
    value, part = score[0], tl.sigmoid(score[0])
    slope = part * (1.0 + value * (1.0 - part))
    curve = part * (1.0 - part) * (2.0 + value * (1.0 - 2.0 * part))
    return (value * part, slope * score[1]), (slope, curve * score[1])


@triton.jit
def along_axes(g_x, g_y, g_z, x, y, z):
    """The inner product over the three axes of a gradient and a vector with a tangent."""
    return g_x * x[0] + g_y * y[0] + g_z * z[0], g_x * x[1] + g_y * y[1] + g_z * z[1]


@triton.jit
def shifted(base, step):
    """Pointers to an array and to its tangent, moved on."""
    return base[0] + step, base[1] + step


@triton.jit
def load_row(base, channel):
    """One row [1, D] float32."""
    return tl.load(base[0] + channel)[None, :].to(tl.float32), tl.load(base[1] + channel)[None, :].to(tl.float32)


@triton.jit
def load_tiles(base, row, channel, inside, WIDTH: tl.constexpr):
    return load_tile(base[0], row, channel, inside, WIDTH), load_tile(base[1], row, channel, inside, WIDTH)


@triton.jit
def load_numbers(base, at, inside):
    return tl.load(base[0] + at, mask=inside, other=0.0), tl.load(base[1] + at, mask=inside, other=0.0)


@triton.jit
def chained(values, slopes, step):
    """Four functions of one argument, whose tangent is step."""
    return (
        (values[0], slopes[0] * step),
        (values[1], slopes[1] * step),
        (values[2], slopes[2] * step),
        (values[3], slopes[3] * step),
    )


@triton.jit
def weights_at(t):
    """spline_weights."""
    return chained(spline_weights(t[0]), spline_slopes(t[0]), t[1])


@triton.jit
def slopes_at(t):
    """spline_slopes."""
    return chained(spline_slopes(t[0]), spline_curves(t[0]), t[1])


@triton.jit
def load_edge(pair, row, geometry, edge, inside):
    """message.load_pair: of edges [E] row, four weights, fade and direction."""
    signed = tl.load(pair + edge, mask=inside, other=0)
    p = tl.abs(signed)
    sign = tl.where(signed < 0, -1.0, 1.0)
    first = tl.load(row + p, mask=inside, other=0)
    weights = weights_at(load_numbers(geometry, p * 5, inside))
    fade = load_numbers(geometry, p * 5 + 1, inside)
    x = scale(sign, load_numbers(geometry, p * 5 + 2, inside))
    y = scale(sign, load_numbers(geometry, p * 5 + 3, inside))
    z = scale(sign, load_numbers(geometry, p * 5 + 4, inside))
    return first, weights, fade, x, y, z


@triton.jit
def load_gates(table, row, weights, channel, inside, WIDTH: tl.constexpr, TABULATED: tl.constexpr):
    """message.load_gate: a gate of a block of edges [E, D]."""
    gate = load_tiles(table, row, channel, inside, WIDTH)
    if TABULATED:
        gate = mul(column(weights[0]), gate)
        for r in tl.static_range(1, 4):
            more = load_tiles(shifted(table, r * WIDTH), row, channel, inside, WIDTH)
            gate = add(gate, mul(column(weights[r]), more))
    return gate


@triton.jit
def second_by_target_kernel(
    g_scalars, qkv, h_qkv, vec, h_vec, table, h_table, source, ptr, pair, row, geometry, h_geometry,
    gg_scalars, gg_vectors, g_qkv, rows,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    VECTORS: tl.constexpr, VECTOR_CUTOFF: tl.constexpr, TABULATED: tl.constexpr,
):  # fmt: skip
    """Tangents of forward_kernel, gg_scalars and gg_vectors, and of by_target_kernel, into g_qkv."""
    atom, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, D)
    tables = shifted((table, h_table), head.to(tl.int64) * rows * 4 * D)
    heads = shifted((qkv, h_qkv), head * 5 * D)
    vecs = shifted((vec, h_vec), head * D)
    query = load_row(shifted(heads, atom * 5 * D * H), channel)
    g_scalar = tl.load(g_scalars + atom * D * H + head * D + channel)[None, :].to(tl.float32)
    total = tl.zeros((E, D), tl.float32)
    total_x = tl.zeros((E, D), tl.float32)
    total_y = tl.zeros((E, D), tl.float32)
    total_z = tl.zeros((E, D), tl.float32)
    total_query = tl.zeros((E, D), tl.float32)
    start, end = tl.load(ptr + atom), tl.load(ptr + atom + 1)
    while start < end:
        edge = start + tl.arange(0, E)
        inside = edge < end
        j = tl.load(source + edge, mask=inside, other=0)
        first, weights, fade, x, y, z = load_edge(pair, row, (geometry, h_geometry), edge, inside)
        gate = load_gates(tables, first, weights, channel, inside, 4 * D, TABULATED)
        key = mul(load_tiles(shifted(heads, D), j, channel, inside, 5 * D * H), gate)
        activated, slope = silu(inner(query, key))
        gate = load_gates(shifted(tables, D), first, weights, channel, inside, 4 * D, TABULATED)
        value = mul(load_tiles(shifted(heads, 2 * D), j, channel, inside, 5 * D * H), gate)
        total += tangent(column(mul(activated, fade)), value)
        g_attention = tl.sum(g_scalar * value[0], 1), tl.sum(g_scalar * value[1], 1)
        total_query += tangent(column(mul(mul(g_attention, fade), slope)), key)
        gate = load_gates(shifted(tables, 3 * D), first, weights, channel, inside, 4 * D, TABULATED)
        if VECTOR_CUTOFF:
            gate = mul(gate, column(fade))
        new = mul(load_tiles(shifted(heads, 4 * D), j, channel, inside, 5 * D * H), gate)
        total_x += tangent(column(x), new)
        total_y += tangent(column(y), new)
        total_z += tangent(column(z), new)
        if VECTORS:
            gate = load_gates(shifted(tables, 2 * D), first, weights, channel, inside, 4 * D, TABULATED)
            if VECTOR_CUTOFF:
                gate = mul(gate, column(fade))
            along = mul(load_tiles(shifted(heads, 3 * D), j, channel, inside, 5 * D * H), gate)
            total_x += tangent(along, load_tiles(vecs, j, channel, inside, 3 * D * H))
            total_y += tangent(along, load_tiles(shifted(vecs, D * H), j, channel, inside, 3 * D * H))
            total_z += tangent(along, load_tiles(shifted(vecs, 2 * D * H), j, channel, inside, 3 * D * H))
        start += E
    place = head * D + channel
    tl.store(gg_scalars + atom * D * H + place, tl.sum(total, 0).to(gg_scalars.dtype.element_ty))
    tl.store(g_qkv + (atom * H + head) * 5 * D + channel, tl.sum(total_query, 0).to(g_qkv.dtype.element_ty))
    out_x, out_y, out_z = tl.sum(total_x, 0), tl.sum(total_y, 0), tl.sum(total_z, 0)
    if VECTORS:
        # vectors = vec + …
        own = h_vec + atom * 3 * D * H + place
        out_x += tl.load(own).to(tl.float32)
        out_y += tl.load(own + D * H).to(tl.float32)
        out_z += tl.load(own + 2 * D * H).to(tl.float32)
    gg_vectors += atom * 3 * D * H + place
    tl.store(gg_vectors, out_x.to(gg_vectors.dtype.element_ty))
    tl.store(gg_vectors + D * H, out_y.to(gg_vectors.dtype.element_ty))
    tl.store(gg_vectors + 2 * D * H, out_z.to(gg_vectors.dtype.element_ty))


@triton.jit
def second_by_source_kernel(
    g_scalars, g_vectors, qkv, h_qkv, vec, h_vec, table, h_table, target, source_ptr, by_source, pair, row,
    geometry, h_geometry, g_qkv, g_vec, rows,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    VECTORS: tl.constexpr, VECTOR_CUTOFF: tl.constexpr, TABULATED: tl.constexpr,
):  # fmt: skip
    """Tangents of by_source_kernel."""
    atom, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, D)
    tables = shifted((table, h_table), head.to(tl.int64) * rows * 4 * D)
    heads = shifted((qkv, h_qkv), head * 5 * D)
    g_scalars += head * D
    g_vectors += head * D
    own = shifted(heads, atom * 5 * D * H)
    key, value = load_row(shifted(own, D), channel), load_row(shifted(own, 2 * D), channel)
    total_key = tl.zeros((E, D), tl.float32)
    total_value = tl.zeros((E, D), tl.float32)
    total_new = tl.zeros((E, D), tl.float32)
    if VECTORS:
        along = load_row(shifted(own, 3 * D), channel)
        mine = shifted((vec, h_vec), atom * 3 * D * H + head * D)
        vec_x = load_row(mine, channel)
        vec_y = load_row(shifted(mine, D * H), channel)
        vec_z = load_row(shifted(mine, 2 * D * H), channel)
        total_along = tl.zeros((E, D), tl.float32)
        total_x = tl.zeros((E, D), tl.float32)
        total_y = tl.zeros((E, D), tl.float32)
        total_z = tl.zeros((E, D), tl.float32)
    start, end = tl.load(source_ptr + atom), tl.load(source_ptr + atom + 1)
    while start < end:
        place = start + tl.arange(0, E)
        inside = place < end
        edge = tl.load(by_source + place, mask=inside, other=0)
        i = tl.load(target + edge, mask=inside, other=0)
        first, weights, fade, x, y, z = load_edge(pair, row, (geometry, h_geometry), edge, inside)
        gate = load_gates(tables, first, weights, channel, inside, 4 * D, TABULATED)
        query = mul(load_tiles(heads, i, channel, inside, 5 * D * H), gate)
        activated, slope = silu(inner(key, query))
        gate = load_gates(shifted(tables, D), first, weights, channel, inside, 4 * D, TABULATED)
        g_value = scale(load_tile(g_scalars, i, channel, inside, D * H), gate)
        total_key += tangent(column(mul(mul(inner(value, g_value), fade), slope)), query)
        total_value += tangent(column(mul(activated, fade)), g_value)
        g_x = load_tile(g_vectors, i, channel, inside, 3 * D * H)
        g_y = load_tile(g_vectors + D * H, i, channel, inside, 3 * D * H)
        g_z = load_tile(g_vectors + 2 * D * H, i, channel, inside, 3 * D * H)
        gate = load_gates(shifted(tables, 3 * D), first, weights, channel, inside, 4 * D, TABULATED)
        if VECTOR_CUTOFF:
            gate = mul(gate, column(fade))
        total_new += tangent(along_axes(g_x, g_y, g_z, column(x), column(y), column(z)), gate)
        if VECTORS:
            gate = load_gates(shifted(tables, 2 * D), first, weights, channel, inside, 4 * D, TABULATED)
            if VECTOR_CUTOFF:
                gate = mul(gate, column(fade))
            total_along += tangent(along_axes(g_x, g_y, g_z, vec_x, vec_y, vec_z), gate)
            gate_tangent = tangent(along, gate)
            total_x += g_x * gate_tangent
            total_y += g_y * gate_tangent
            total_z += g_z * gate_tangent
        start += E
    out = g_qkv + (atom * H + head) * 5 * D + channel
    tl.store(out + D, tl.sum(total_key, 0).to(g_qkv.dtype.element_ty))
    tl.store(out + 2 * D, tl.sum(total_value, 0).to(g_qkv.dtype.element_ty))
    tl.store(out + 4 * D, tl.sum(total_new, 0).to(g_qkv.dtype.element_ty))
    if VECTORS:
        tl.store(out + 3 * D, tl.sum(total_along, 0).to(g_qkv.dtype.element_ty))
        out = g_vec + atom * 3 * D * H + head * D + channel
        tl.store(out, tl.sum(total_x, 0).to(g_vec.dtype.element_ty))
        tl.store(out + D * H, tl.sum(total_y, 0).to(g_vec.dtype.element_ty))
        tl.store(out + 2 * D * H, tl.sum(total_z, 0).to(g_vec.dtype.element_ty))
    else:
        tl.store(out + 3 * D, tl.zeros((D,), g_qkv.dtype.element_ty))


@triton.jit
def load_rows(table, channel, WIDTH: tl.constexpr, TABULATED: tl.constexpr):
    """The rows of the table that a chunk's gates come from: four, or without a spline the one, four times."""
    row = load_row(table, channel)
    rows = row, row, row, row
    if TABULATED:
        rows = (
            row,
            load_row(shifted(table, WIDTH), channel),
            load_row(shifted(table, 2 * WIDTH), channel),
            load_row(shifted(table, 3 * WIDTH), channel),
        )
    return rows


@triton.jit
def combined(weights, rows, TABULATED: tl.constexpr):
    """The gates of pairs with these weights [E] -> [E, D], or [1, D] without a spline."""
    gate = rows[0]
    if TABULATED:
        gate = mul(column(weights[0]), gate)
        for r in tl.static_range(1, 4):
            gate = add(gate, mul(column(weights[r]), rows[r]))
    return gate


@triton.jit
def spread(totals, weights, g_gate, TABULATED: tl.constexpr):
    """Add to the tangents of the rows' gradients what the gradients of gates [E, D] give them by weights [E]."""
    if TABULATED:
        totals = (
            totals[0] + tangent(column(weights[0]), g_gate),
            totals[1] + tangent(column(weights[1]), g_gate),
            totals[2] + tangent(column(weights[2]), g_gate),
            totals[3] + tangent(column(weights[3]), g_gate),
        )
    else:
        totals = totals[0] + g_gate[1], totals[1], totals[2], totals[3]
    return totals


@triton.jit
def store_rows(partial, totals, WIDTH: tl.constexpr, TABULATED: tl.constexpr):
    """A chunk's sums of a gate's rows; partial: from the gate's first column."""
    for r in tl.static_range(4 if TABULATED else 1):
        tl.store(partial + r * WIDTH, tl.sum(totals[r], 0))


@triton.jit
def scalar_edges(heads, g_scalars, i, j, here, channel, fade, key_gate, value_gate, H: tl.constexpr, D: tl.constexpr):
    """attention_backward.scalar_edge, of the fade's gradient the tangent."""
    key = load_tiles(shifted(heads, D), j, channel, here, 5 * D * H)
    key = mul(key, load_tiles(heads, i, channel, here, 5 * D * H))
    value = load_tiles(shifted(heads, 2 * D), j, channel, here, 5 * D * H)
    value = scale(load_tile(g_scalars, i, channel, here, D * H), value)
    activated, slope = silu(inner(key, key_gate))
    g_attention = inner(value, value_gate)
    g_key = mul(column(mul(mul(g_attention, fade), slope)), key)
    return g_key, mul(column(mul(activated, fade)), value), tangent(g_attention, activated)


@triton.jit
def second_scalar_gates_kernel(
    g_scalars, qkv, h_qkv, table, h_table, order, ends, present, geometry, h_geometry, starts, stops, chunk_row,
    partial, g_shape, pairs, rows,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, TABULATED: tl.constexpr,
):  # fmt: skip
    """Tangents of scalar_gates_kernel."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, D)
    first = tl.load(chunk_row + chunk).to(tl.int64)
    tables = shifted((table, h_table), (head.to(tl.int64) * rows + first) * 4 * D)
    heads = shifted((qkv, h_qkv), head * 5 * D)
    g_scalars += head * D
    keys = load_rows(tables, channel, 4 * D, TABULATED)
    values = load_rows(shifted(tables, D), channel, 4 * D, TABULATED)
    zero = tl.zeros((E, D), tl.float32)
    total_key = zero, zero, zero, zero
    total_value = zero, zero, zero, zero
    start, end = tl.load(starts + chunk), tl.load(stops + chunk)
    while start < end:
        place = start + tl.arange(0, E)
        inside = place < end
        item, i, j, to_first, to_second, at = load_item(order, ends, present, place, inside, pairs)
        fraction = load_numbers((geometry, h_geometry), at, inside)
        fade = load_numbers((geometry, h_geometry), at + 1, inside)
        weights = weights_at(fraction)
        key_gate = combined(weights, keys, TABULATED)
        value_gate = combined(weights, values, TABULATED)
        g_key, g_value, g_fade = scalar_edges(
            heads, g_scalars, i, j, to_first, channel, fade, key_gate, value_gate, H, D
        )
        more_key, more_value, more_fade = scalar_edges(
            heads, g_scalars, j, i, to_second, channel, fade, key_gate, value_gate, H, D
        )
        g_key, g_value = add(g_key, more_key), add(g_value, more_value)
        total_key = spread(total_key, weights, g_key, TABULATED)
        total_value = spread(total_value, weights, g_value, TABULATED)
        g_place = tl.zeros((E,), tl.float32)
        if TABULATED:
            slopes = slopes_at(fraction)
            g_place += tl.sum(tangent(g_key, combined(slopes, keys, TABULATED)), 1)
            g_place += tl.sum(tangent(g_value, combined(slopes, values, TABULATED)), 1)
        out = g_shape + (head.to(tl.int64) * pairs + item) * 2
        paired = inside & (item < pairs)
        tl.store(out, g_place, mask=paired)
        tl.store(out + 1, g_fade + more_fade, mask=paired)
        start += E
    partial += (chunk * H + head) * (16 if TABULATED else 4) * D + channel
    store_rows(partial, total_key, 4 * D, TABULATED)
    store_rows(partial + D, total_value, 4 * D, TABULATED)


@triton.jit
def vector_edges(
    heads, vecs, g_vectors, i, j, here, channel, x, y, z, faded_gate,
    H: tl.constexpr, D: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """attention_backward.vector_edge, of the direction's gradient the tangent; faded_gate: of the new vectors."""
    g_x = load_tile(g_vectors, i, channel, here, 3 * D * H)
    g_y = load_tile(g_vectors + D * H, i, channel, here, 3 * D * H)
    g_z = load_tile(g_vectors + 2 * D * H, i, channel, here, 3 * D * H)
    new = load_tiles(shifted(heads, 4 * D), j, channel, here, 5 * D * H)
    g_new = mul(along_axes(g_x, g_y, g_z, column(x), column(y), column(z)), new)
    g_along = g_new
    if VECTORS:
        vec_x = load_tiles(vecs, j, channel, here, 3 * D * H)
        vec_y = load_tiles(shifted(vecs, D * H), j, channel, here, 3 * D * H)
        vec_z = load_tiles(shifted(vecs, 2 * D * H), j, channel, here, 3 * D * H)
        along = load_tiles(shifted(heads, 3 * D), j, channel, here, 5 * D * H)
        g_along = mul(along_axes(g_x, g_y, g_z, vec_x, vec_y, vec_z), along)
    new_tangent = tangent(new, faded_gate)
    return g_along, g_new, tl.sum(g_x * new_tangent, 1), tl.sum(g_y * new_tangent, 1), tl.sum(g_z * new_tangent, 1)


@triton.jit
def second_vector_gates_kernel(
    g_vectors, qkv, h_qkv, vec, h_vec, table, h_table, order, ends, present, geometry, h_geometry, starts, stops,
    chunk_row, partial, g_shape, pairs, rows,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    VECTORS: tl.constexpr, VECTOR_CUTOFF: tl.constexpr, TABULATED: tl.constexpr,
):  # fmt: skip
    """Tangents of vector_gates_kernel."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, D)
    first = tl.load(chunk_row + chunk).to(tl.int64)
    tables = shifted((table, h_table), (head.to(tl.int64) * rows + first) * 4 * D)
    heads = shifted((qkv, h_qkv), head * 5 * D)
    vecs = shifted((vec, h_vec), head * D)
    g_vectors += head * D
    alongs = load_rows(shifted(tables, 2 * D), channel, 4 * D, TABULATED)
    news = load_rows(shifted(tables, 3 * D), channel, 4 * D, TABULATED)
    zero = tl.zeros((E, D), tl.float32)
    total_along = zero, zero, zero, zero
    total_new = zero, zero, zero, zero
    start, end = tl.load(starts + chunk), tl.load(stops + chunk)
    while start < end:
        place = start + tl.arange(0, E)
        inside = place < end
        item, i, j, to_first, to_second, at = load_item(order, ends, present, place, inside, pairs)
        numbers = (geometry, h_geometry)
        fraction, fade = load_numbers(numbers, at, inside), load_numbers(numbers, at + 1, inside)
        x, y = load_numbers(numbers, at + 2, inside), load_numbers(numbers, at + 3, inside)
        z = load_numbers(numbers, at + 4, inside)
        weights = weights_at(fraction)
        new_gate = combined(weights, news, TABULATED)
        faded_gate = new_gate
        if VECTOR_CUTOFF:
            faded_gate = mul(new_gate, column(fade))
        g_along, g_new, g_x, g_y, g_z = vector_edges(
            heads, vecs, g_vectors, i, j, to_first, channel, x, y, z, faded_gate, H, D, VECTORS
        )
        more_along, more_new, back_x, back_y, back_z = vector_edges(
            heads, vecs, g_vectors, j, i, to_second, channel,
            scale(-1.0, x), scale(-1.0, y), scale(-1.0, z), faded_gate, H, D, VECTORS,
        )  # fmt: skip
        g_along, g_new = add(g_along, more_along), add(g_new, more_new)
        g_fade = tl.zeros((E,), tl.float32)
        g_place = tl.zeros((E,), tl.float32)
        if VECTOR_CUTOFF:
            g_fade += tl.sum(tangent(g_new, new_gate), 1)
            if VECTORS:
                g_fade += tl.sum(tangent(g_along, combined(weights, alongs, TABULATED)), 1)
            g_along, g_new = mul(g_along, column(fade)), mul(g_new, column(fade))
        total_new = spread(total_new, weights, g_new, TABULATED)
        if VECTORS:
            total_along = spread(total_along, weights, g_along, TABULATED)
        if TABULATED:
            slopes = slopes_at(fraction)
            g_place += tl.sum(tangent(g_new, combined(slopes, news, TABULATED)), 1)
            if VECTORS:
                g_place += tl.sum(tangent(g_along, combined(slopes, alongs, TABULATED)), 1)
        out = g_shape + (head.to(tl.int64) * pairs + item) * 5
        paired = inside & (item < pairs)
        tl.store(out, g_place, mask=paired)
        tl.store(out + 1, g_fade, mask=paired)
        tl.store(out + 2, g_x - back_x, mask=paired)
        tl.store(out + 3, g_y - back_y, mask=paired)
        tl.store(out + 4, g_z - back_z, mask=paired)
        start += E
    partial += (chunk * H + head) * (16 if TABULATED else 4) * D + channel
    store_rows(partial + 2 * D, total_along, 4 * D, TABULATED)
    store_rows(partial + 3 * D, total_new, 4 * D, TABULATED)


def attention_second(
    h_qkv, h_vec, h_table, h_geometry, g_scalars, g_vectors,
    qkv, vec, table, coordinate, fade, direction, source, ptr, pair, plan, vector_cutoff,
):  # fmt: skip
    """operators.attention_second."""
    target, source_ptr, by_source, ends, present = plan
    n, heads, width = qkv.shape
    width, pairs, rows, tabulated = width // 5, len(fade), table.shape[1], coordinate is not None
    gg_scalars, gg_vectors = torch.empty_like(g_scalars), torch.empty_like(g_vectors)
    g_qkv, g_vec, g_table, g_geometry = empty_gradients(qkv, vec, table, fade, True)
    row, geometry = pack(table, coordinate, fade, direction)
    # The self-loop's tangents are zero.
    geometries = (geometry, pad(h_geometry, (0, 0, 1, 0)))
    qkvs, tables = (qkv, h_qkv), (table, h_table)
    vecs = qkvs if vec is None else (vec, h_vec)
    shape = {"H": heads, "D": width, "E": edges_a_block(width, TILE // 2), "TABULATED": tabulated}
    vectors = {"VECTORS": vec is not None, "VECTOR_CUTOFF": vector_cutoff}
    launch(
        second_by_target_kernel,
        (n, heads),
        *(g_scalars, *qkvs, *vecs, *tables, source, ptr, pair, row, *geometries, gg_scalars, gg_vectors, g_qkv, rows),
        **shape,
        **vectors,
    )
    launch(
        second_by_source_kernel,
        (n, heads),
        *(g_scalars, g_vectors, *qkvs, *vecs, *tables, target, source_ptr, by_source, pair, row, *geometries),
        *(g_qkv, g_vec, rows),
        **shape,
        **vectors,
    )
    intervals, spread_over = (rows - 3, 4) if tabulated else (rows, 1)
    order, starts, stops, chunk_row, chunk_ptr = chunks_of_rows(row, n, intervals)
    partial = fade.new_empty(len(starts), heads, spread_over, 4 * width)
    g_weight, g_message = fade.new_empty(heads, pairs, 2), fade.new_empty(heads, pairs, 5)
    sorted_items = (order, ends, present, *geometries, starts, stops, chunk_row, partial)
    launch(
        second_scalar_gates_kernel,
        (len(starts), heads),
        *(g_scalars, *qkvs, *tables, *sorted_items, g_weight, pairs, rows),
        **shape,
    )
    launch(
        second_vector_gates_kernel,
        (len(starts), heads),
        *(g_vectors, *qkvs, *vecs, *tables, *sorted_items, g_message, pairs, rows),
        **shape,
        **vectors,
    )
    add_up(partial, chunk_ptr, intervals, g_table)
    add_heads(g_weight, g_message, g_geometry)
    return gg_scalars, gg_vectors, g_qkv, g_vec, g_table, g_geometry
