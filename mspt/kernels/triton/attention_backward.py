"""The gradient of the message pass, without atomic sums: whatever is added up is added by one program, in one order.

Three passes, each recomputing the gates and what else it needs of an edge: by target for the query; by source for key,
values and vec; and by pair, sorted by the rows of the table that a pair's gates come from, for the table and the
geometry. A pass over pairs adds up chunks of at most CHUNK of one row; a last kernel adds the chunks up.

Legend: n atoms, e edges, P pairs, H heads, D channels a head, F = H D, E edges or pairs of a block. Items are the pairs
and after them the atoms as their own neighbours, P + n in all.
"""

import torch
import triton
import triton.language as tl

from mspt.kernels.operators import empty_gradients
from mspt.kernels.triton.launch import edges_a_block, launch
from mspt.kernels.triton.message import load_gate, load_pair, load_tile, pack, spline_slopes, spline_weights

CHUNK = 128


@triton.jit
def by_target_kernel(
    g_scalars, qkv, table, source, ptr, pair, row, geometry, g_qkv, rows,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, TABULATED: tl.constexpr,
):  # fmt: skip
    """The gradient of the query, into the first D of each head of g_qkv."""
    atom, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, D)
    table += head.to(tl.int64) * rows * 4 * D
    heads = qkv + head * 5 * D
    query = tl.load(heads + atom * 5 * D * H + channel).to(tl.float32)
    g_scalar = tl.load(g_scalars + atom * D * H + head * D + channel).to(tl.float32)
    total = tl.zeros((E, D), tl.float32)
    start, end = tl.load(ptr + atom), tl.load(ptr + atom + 1)
    while start < end:
        edge = start + tl.arange(0, E)
        inside = edge < end
        j = tl.load(source + edge, mask=inside, other=0)
        first, weights, fade, _x, _y, _z = load_pair(pair, row, geometry, edge, inside)
        gate = load_gate(table, first, weights, channel, inside, 4 * D, TABULATED)
        key = load_tile(heads + D, j, channel, inside, 5 * D * H) * gate
        gate = load_gate(table + D, first, weights, channel, inside, 4 * D, TABULATED)
        value = load_tile(heads + 2 * D, j, channel, inside, 5 * D * H) * gate
        score = tl.sum(query[None, :] * key, 1)
        part = tl.sigmoid(score)
        g_score = tl.sum(g_scalar[None, :] * value, 1) * fade * part * (1.0 + score * (1.0 - part))
        total += g_score[:, None] * key
        start += E
    g_query = tl.sum(total, 0)
    tl.store(g_qkv + (atom * H + head) * 5 * D + channel, g_query.to(g_qkv.dtype.element_ty))


@triton.jit
def by_source_kernel(
    g_scalars, g_vectors, qkv, vec, table, target, source_ptr, by_source, pair, row, geometry, g_qkv, g_vec, rows,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    VECTORS: tl.constexpr, VECTOR_CUTOFF: tl.constexpr, TABULATED: tl.constexpr,
):  # fmt: skip
    """The gradients of key and values, into g_qkv, and of vec."""
    atom, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, D)
    table += head.to(tl.int64) * rows * 4 * D
    heads = qkv + head * 5 * D
    g_scalars += head * D
    g_vectors += head * D
    own = heads + atom * 5 * D * H + channel
    key, value = tl.load(own + D).to(tl.float32), tl.load(own + 2 * D).to(tl.float32)
    total_key = tl.zeros((E, D), tl.float32)
    total_value = tl.zeros((E, D), tl.float32)
    total_new = tl.zeros((E, D), tl.float32)
    if VECTORS:
        along = tl.load(own + 3 * D).to(tl.float32)
        mine = vec + atom * 3 * D * H + head * D + channel
        vec_x = tl.load(mine).to(tl.float32)
        vec_y = tl.load(mine + D * H).to(tl.float32)
        vec_z = tl.load(mine + 2 * D * H).to(tl.float32)
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
        first, weights, fade, x, y, z = load_pair(pair, row, geometry, edge, inside)
        query = load_tile(heads, i, channel, inside, 5 * D * H)
        g_scalar = load_tile(g_scalars, i, channel, inside, D * H)
        key_gate = load_gate(table, first, weights, channel, inside, 4 * D, TABULATED)
        value_gate = load_gate(table + D, first, weights, channel, inside, 4 * D, TABULATED)
        score = tl.sum(query * key[None, :] * key_gate, 1)
        part = tl.sigmoid(score)
        g_attention = tl.sum(g_scalar * value[None, :] * value_gate, 1) * fade
        g_score = g_attention * part * (1.0 + score * (1.0 - part))
        total_key += g_score[:, None] * query * key_gate
        total_value += (score * part * fade)[:, None] * g_scalar * value_gate
        g_x = load_tile(g_vectors, i, channel, inside, 3 * D * H)
        g_y = load_tile(g_vectors + D * H, i, channel, inside, 3 * D * H)
        g_z = load_tile(g_vectors + 2 * D * H, i, channel, inside, 3 * D * H)
        if VECTOR_CUTOFF:
            g_x, g_y, g_z = g_x * fade[:, None], g_y * fade[:, None], g_z * fade[:, None]
        gate = load_gate(table + 3 * D, first, weights, channel, inside, 4 * D, TABULATED)
        total_new += (g_x * x[:, None] + g_y * y[:, None] + g_z * z[:, None]) * gate
        if VECTORS:
            gate = load_gate(table + 2 * D, first, weights, channel, inside, 4 * D, TABULATED)
            total_along += (g_x * vec_x[None, :] + g_y * vec_y[None, :] + g_z * vec_z[None, :]) * gate
            gate *= along[None, :]
            total_x += g_x * gate
            total_y += g_y * gate
            total_z += g_z * gate
        start += E
    out = g_qkv + (atom * H + head) * 5 * D + channel
    tl.store(out + D, tl.sum(total_key, 0).to(g_qkv.dtype.element_ty))
    tl.store(out + 2 * D, tl.sum(total_value, 0).to(g_qkv.dtype.element_ty))
    tl.store(out + 4 * D, tl.sum(total_new, 0).to(g_qkv.dtype.element_ty))
    if VECTORS:
        tl.store(out + 3 * D, tl.sum(total_along, 0).to(g_qkv.dtype.element_ty))
        # vectors = vec + …: what meets the atom's own vectors is added.
        given = g_vectors + atom * 3 * D * H + channel
        out = g_vec + atom * 3 * D * H + head * D + channel
        out_x = tl.sum(total_x, 0) + tl.load(given).to(tl.float32)
        out_y = tl.sum(total_y, 0) + tl.load(given + D * H).to(tl.float32)
        out_z = tl.sum(total_z, 0) + tl.load(given + 2 * D * H).to(tl.float32)
        tl.store(out, out_x.to(g_vec.dtype.element_ty))
        tl.store(out + D * H, out_y.to(g_vec.dtype.element_ty))
        tl.store(out + 2 * D * H, out_z.to(g_vec.dtype.element_ty))
    else:
        tl.store(out + 3 * D, tl.zeros((D,), g_qkv.dtype.element_ty))


@triton.jit
def load_item(order, ends, present, place, inside, pairs):
    """Of places [E] among the sorted items: item, its two atoms, which of its two edges there are, and where its
    geometry begins.

    present: bit 0, an edge ends at the first atom; bit 1, one ends at the second.
    """
    item = tl.load(order + place, mask=inside, other=0)
    i, j = tl.load(ends + item * 2, mask=inside, other=0), tl.load(ends + item * 2 + 1, mask=inside, other=0)
    bits = tl.load(present + item, mask=inside, other=0)
    at = tl.where(item < pairs, item + 1, 0) * 5
    return item, i, j, inside & ((bits & 1) != 0), inside & ((bits & 2) != 0), at


@triton.jit
def scalar_edge(heads, g_scalars, i, j, here, channel, fade, key_gate, value_gate, H: tl.constexpr, D: tl.constexpr):
    """Of edges from j to i: gradients of the key's and the value's gate [E, D] and of the fade [E]."""
    query = load_tile(heads, i, channel, here, 5 * D * H)
    key = load_tile(heads + D, j, channel, here, 5 * D * H)
    value = load_tile(heads + 2 * D, j, channel, here, 5 * D * H) * load_tile(g_scalars, i, channel, here, D * H)
    key *= query
    score = tl.sum(key * key_gate, 1)
    part = tl.sigmoid(score)
    g_attention = tl.sum(value * value_gate, 1)
    g_score = g_attention * fade * part * (1.0 + score * (1.0 - part))
    return g_score[:, None] * key, (score * part * fade)[:, None] * value, g_attention * score * part


@triton.jit
def scalar_gates_kernel(
    g_scalars, qkv, table, order, ends, present, geometry, starts, stops, chunk_row, partial, g_shape, pairs, rows,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, TABULATED: tl.constexpr, MOVING: tl.constexpr,
):  # fmt: skip
    """The part of the attention weights: gradients of the gates of key and scalar value, added up over a chunk into
    partial [chunks, H, R, 4D] (R = 4 rows, 1 without a spline), and with MOVING g_shape [H, P, 2], of coordinate and
    fade of each pair.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, D)
    first = tl.load(chunk_row + chunk).to(tl.int64)
    table += (head.to(tl.int64) * rows + first) * 4 * D + channel
    heads = qkv + head * 5 * D
    g_scalars += head * D
    key_0, value_0 = tl.load(table)[None, :], tl.load(table + D)[None, :]
    total_key_0 = tl.zeros((E, D), tl.float32)
    total_value_0 = tl.zeros((E, D), tl.float32)
    if TABULATED:
        key_1, value_1 = tl.load(table + 4 * D)[None, :], tl.load(table + 5 * D)[None, :]
        key_2, value_2 = tl.load(table + 8 * D)[None, :], tl.load(table + 9 * D)[None, :]
        key_3, value_3 = tl.load(table + 12 * D)[None, :], tl.load(table + 13 * D)[None, :]
        total_key_1 = tl.zeros((E, D), tl.float32)
        total_key_2 = tl.zeros((E, D), tl.float32)
        total_key_3 = tl.zeros((E, D), tl.float32)
        total_value_1 = tl.zeros((E, D), tl.float32)
        total_value_2 = tl.zeros((E, D), tl.float32)
        total_value_3 = tl.zeros((E, D), tl.float32)
    start, end = tl.load(starts + chunk), tl.load(stops + chunk)
    while start < end:
        place = start + tl.arange(0, E)
        inside = place < end
        item, i, j, to_first, to_second, at = load_item(order, ends, present, place, inside, pairs)
        fade = tl.load(geometry + at + 1, mask=inside, other=0.0)
        if TABULATED:
            fraction = tl.load(geometry + at, mask=inside, other=0.0)
            w0, w1, w2, w3 = spline_weights(fraction)
            w0, w1, w2, w3 = w0[:, None], w1[:, None], w2[:, None], w3[:, None]
            key_gate = w0 * key_0 + w1 * key_1 + w2 * key_2 + w3 * key_3
            value_gate = w0 * value_0 + w1 * value_1 + w2 * value_2 + w3 * value_3
        else:
            key_gate, value_gate = key_0, value_0
        g_key, g_value, g_fade = scalar_edge(
            heads, g_scalars, i, j, to_first, channel, fade, key_gate, value_gate, H, D
        )
        more_key, more_value, more_fade = scalar_edge(
            heads, g_scalars, j, i, to_second, channel, fade, key_gate, value_gate, H, D
        )
        g_key += more_key
        g_value += more_value
        if TABULATED:
            total_key_0 += w0 * g_key
            total_key_1 += w1 * g_key
            total_key_2 += w2 * g_key
            total_key_3 += w3 * g_key
            total_value_0 += w0 * g_value
            total_value_1 += w1 * g_value
            total_value_2 += w2 * g_value
            total_value_3 += w3 * g_value
        else:
            total_key_0 += g_key
            total_value_0 += g_value
        if MOVING:
            out = g_shape + (head.to(tl.int64) * pairs + item) * 2
            paired = inside & (item < pairs)
            tl.store(out + 1, g_fade + more_fade, mask=paired)
            if TABULATED:
                w0, w1, w2, w3 = spline_slopes(fraction)
                w0, w1, w2, w3 = w0[:, None], w1[:, None], w2[:, None], w3[:, None]
                slope = g_key * (w0 * key_0 + w1 * key_1 + w2 * key_2 + w3 * key_3)
                slope += g_value * (w0 * value_0 + w1 * value_1 + w2 * value_2 + w3 * value_3)
                tl.store(out, tl.sum(slope, 1), mask=paired)
            else:
                tl.store(out, tl.zeros((E,), tl.float32), mask=paired)
        start += E
    if TABULATED:
        partial += (chunk * H + head) * 16 * D + channel
        tl.store(partial, tl.sum(total_key_0, 0))
        tl.store(partial + D, tl.sum(total_value_0, 0))
        tl.store(partial + 4 * D, tl.sum(total_key_1, 0))
        tl.store(partial + 5 * D, tl.sum(total_value_1, 0))
        tl.store(partial + 8 * D, tl.sum(total_key_2, 0))
        tl.store(partial + 9 * D, tl.sum(total_value_2, 0))
        tl.store(partial + 12 * D, tl.sum(total_key_3, 0))
        tl.store(partial + 13 * D, tl.sum(total_value_3, 0))
    else:
        partial += (chunk * H + head) * 4 * D + channel
        tl.store(partial, tl.sum(total_key_0, 0))
        tl.store(partial + D, tl.sum(total_value_0, 0))


@triton.jit
def vector_edge(
    heads, vec, g_vectors, i, j, here, channel, x, y, z, new_gate,
    H: tl.constexpr, D: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """Of edges from j to i, but for the fade: gradients of the two vector gates [E, D] and of the direction, three [E].

    Without vec the first is no gradient of anything: it is the second.
    """
    g_x = load_tile(g_vectors, i, channel, here, 3 * D * H)
    g_y = load_tile(g_vectors + D * H, i, channel, here, 3 * D * H)
    g_z = load_tile(g_vectors + 2 * D * H, i, channel, here, 3 * D * H)
    new = load_tile(heads + 4 * D, j, channel, here, 5 * D * H)
    g_new = (g_x * x[:, None] + g_y * y[:, None] + g_z * z[:, None]) * new
    g_along = g_new
    if VECTORS:
        g_along = g_x * load_tile(vec, j, channel, here, 3 * D * H)
        g_along += g_y * load_tile(vec + D * H, j, channel, here, 3 * D * H)
        g_along += g_z * load_tile(vec + 2 * D * H, j, channel, here, 3 * D * H)
        g_along *= load_tile(heads + 3 * D, j, channel, here, 5 * D * H)
    new *= new_gate
    return g_along, g_new, tl.sum(g_x * new, 1), tl.sum(g_y * new, 1), tl.sum(g_z * new, 1)


@triton.jit
def vector_gates_kernel(
    g_vectors, qkv, vec, table, order, ends, present, geometry, starts, stops, chunk_row, partial, g_shape, pairs, rows,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    VECTORS: tl.constexpr, VECTOR_CUTOFF: tl.constexpr, TABULATED: tl.constexpr, MOVING: tl.constexpr,
):  # fmt: skip
    """As scalar_gates_kernel for the two gates of the vector messages; g_shape [H, P, 5]: also of the direction."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, D)
    first = tl.load(chunk_row + chunk).to(tl.int64)
    table += (head.to(tl.int64) * rows + first) * 4 * D + channel
    heads = qkv + head * 5 * D
    vec += head * D
    g_vectors += head * D
    along_0, new_0 = tl.load(table + 2 * D)[None, :], tl.load(table + 3 * D)[None, :]
    total_along_0 = tl.zeros((E, D), tl.float32)
    total_new_0 = tl.zeros((E, D), tl.float32)
    if TABULATED:
        along_1, new_1 = tl.load(table + 6 * D)[None, :], tl.load(table + 7 * D)[None, :]
        along_2, new_2 = tl.load(table + 10 * D)[None, :], tl.load(table + 11 * D)[None, :]
        along_3, new_3 = tl.load(table + 14 * D)[None, :], tl.load(table + 15 * D)[None, :]
        total_along_1 = tl.zeros((E, D), tl.float32)
        total_along_2 = tl.zeros((E, D), tl.float32)
        total_along_3 = tl.zeros((E, D), tl.float32)
        total_new_1 = tl.zeros((E, D), tl.float32)
        total_new_2 = tl.zeros((E, D), tl.float32)
        total_new_3 = tl.zeros((E, D), tl.float32)
    start, end = tl.load(starts + chunk), tl.load(stops + chunk)
    while start < end:
        place = start + tl.arange(0, E)
        inside = place < end
        item, i, j, to_first, to_second, at = load_item(order, ends, present, place, inside, pairs)
        fade = tl.load(geometry + at + 1, mask=inside, other=0.0)
        x = tl.load(geometry + at + 2, mask=inside, other=0.0)
        y = tl.load(geometry + at + 3, mask=inside, other=0.0)
        z = tl.load(geometry + at + 4, mask=inside, other=0.0)
        if TABULATED:
            fraction = tl.load(geometry + at, mask=inside, other=0.0)
            w0, w1, w2, w3 = spline_weights(fraction)
            w0, w1, w2, w3 = w0[:, None], w1[:, None], w2[:, None], w3[:, None]
            new_gate = w0 * new_0 + w1 * new_1 + w2 * new_2 + w3 * new_3
        else:
            new_gate = new_0
        g_along, g_new, g_x, g_y, g_z = vector_edge(
            heads, vec, g_vectors, i, j, to_first, channel, x, y, z, new_gate, H, D, VECTORS
        )
        more_along, more_new, back_x, back_y, back_z = vector_edge(
            heads, vec, g_vectors, j, i, to_second, channel, -x, -y, -z, new_gate, H, D, VECTORS
        )
        g_along += more_along
        g_new += more_new
        if MOVING:
            g_fade = tl.zeros((E,), tl.float32)
            g_place = tl.zeros((E,), tl.float32)
            if VECTOR_CUTOFF:
                g_fade += tl.sum(g_new * new_gate, 1)
                if VECTORS:
                    along_gate = along_0
                    if TABULATED:
                        along_gate = w0 * along_0 + w1 * along_1 + w2 * along_2 + w3 * along_3
                    g_fade += tl.sum(g_along * along_gate, 1)
            if TABULATED:
                s0, s1, s2, s3 = spline_slopes(fraction)
                s0, s1, s2, s3 = s0[:, None], s1[:, None], s2[:, None], s3[:, None]
                slope = g_new * (s0 * new_0 + s1 * new_1 + s2 * new_2 + s3 * new_3)
                if VECTORS:
                    slope += g_along * (s0 * along_0 + s1 * along_1 + s2 * along_2 + s3 * along_3)
                g_place += tl.sum(slope, 1)
            g_x, g_y, g_z = g_x - back_x, g_y - back_y, g_z - back_z
            if VECTOR_CUTOFF:
                g_place, g_x, g_y, g_z = g_place * fade, g_x * fade, g_y * fade, g_z * fade
            out = g_shape + (head.to(tl.int64) * pairs + item) * 5
            paired = inside & (item < pairs)
            tl.store(out, g_place, mask=paired)
            tl.store(out + 1, g_fade, mask=paired)
            tl.store(out + 2, g_x, mask=paired)
            tl.store(out + 3, g_y, mask=paired)
            tl.store(out + 4, g_z, mask=paired)
        if VECTOR_CUTOFF:
            g_along, g_new = g_along * fade[:, None], g_new * fade[:, None]
        if TABULATED:
            total_new_0 += w0 * g_new
            total_new_1 += w1 * g_new
            total_new_2 += w2 * g_new
            total_new_3 += w3 * g_new
            if VECTORS:
                total_along_0 += w0 * g_along
                total_along_1 += w1 * g_along
                total_along_2 += w2 * g_along
                total_along_3 += w3 * g_along
        else:
            total_new_0 += g_new
            if VECTORS:
                total_along_0 += g_along
        start += E
    if TABULATED:
        partial += (chunk * H + head) * 16 * D + channel
        tl.store(partial + 2 * D, tl.sum(total_along_0, 0))
        tl.store(partial + 3 * D, tl.sum(total_new_0, 0))
        tl.store(partial + 6 * D, tl.sum(total_along_1, 0))
        tl.store(partial + 7 * D, tl.sum(total_new_1, 0))
        tl.store(partial + 10 * D, tl.sum(total_along_2, 0))
        tl.store(partial + 11 * D, tl.sum(total_new_2, 0))
        tl.store(partial + 14 * D, tl.sum(total_along_3, 0))
        tl.store(partial + 15 * D, tl.sum(total_new_3, 0))
    else:
        partial += (chunk * H + head) * 4 * D + channel
        tl.store(partial + 2 * D, tl.sum(total_along_0, 0))
        tl.store(partial + 3 * D, tl.sum(total_new_0, 0))


@triton.jit
def add_chunks_kernel(partial, chunk_ptr, g_table, rows, intervals, H: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """partial [chunks, H, R, C] -> g_table [H, rows, C]: row k takes entry r of the chunks of interval k − r."""
    k, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, C)
    total = tl.zeros((C,), tl.float32)
    for r in tl.static_range(R):
        interval = k - r
        inside = (interval >= 0) & (interval < intervals)
        chunk = tl.load(chunk_ptr + interval, mask=inside, other=0)
        end = tl.load(chunk_ptr + interval + 1, mask=inside, other=0)
        while chunk < end:
            total += tl.load(partial + ((chunk * H + head) * R + r) * C + column)
            chunk += 1
    tl.store(g_table + (head.to(tl.int64) * rows + k) * C + column, total)


def chunks_of_rows(row, atoms, intervals):
    """Sort the items by the first row of the table that they need, and cut each row's into chunks.

    row [P + 1] int32 -> order [P + atoms], starts and stops [chunks] within it, row [chunks], ptr [intervals + 1]: the
    chunks of each row. Chunks that are not needed are empty: how many are is not known without waiting for the GPU.
    """
    item_row = torch.cat([row[1:], row[:1].expand(atoms)])
    item_row, order = item_row.sort(stable=True)
    ptr = torch.searchsorted(item_row, torch.arange(intervals + 1, dtype=row.dtype, device=row.device))
    chunk_ptr = torch.cat([ptr.new_zeros(1), ((ptr.diff() + CHUNK - 1) // CHUNK).cumsum(0)])
    chunk = torch.arange(len(order) // CHUNK + min(intervals, len(order)), device=row.device)
    chunk_row = (torch.searchsorted(chunk_ptr, chunk, right=True) - 1).clamp(max=intervals - 1)
    starts = ptr[chunk_row] + (chunk - chunk_ptr[chunk_row]) * CHUNK
    last = ptr[chunk_row + 1]
    return order, torch.minimum(starts, last), torch.minimum(starts + CHUNK, last), chunk_row, chunk_ptr


def add_up(partial, chunk_ptr, intervals, g_table):
    """partial [chunks, H, R, 4D] of chunks_of_rows -> g_table [H, rows, 4D]."""
    heads, rows, columns = g_table.shape
    sizes = {"H": heads, "R": partial.shape[2], "C": columns}
    launch(add_chunks_kernel, (rows, heads), partial, chunk_ptr, g_table, rows, intervals, **sizes)


def add_heads(g_weight, g_message, g_geometry):
    """g_weight [H, P, 2] and g_message [H, P, 5], of coordinate, fade (and direction) -> g_geometry [P, 5]."""
    g_geometry.copy_(g_message.sum(0))
    g_geometry[:, :2] += g_weight.sum(0)


def attention_backward(
    g_scalars, g_vectors, qkv, vec, table, coordinate, fade, direction, source, ptr, pair, plan, vector_cutoff, moving
):
    """operators.attention_backward."""
    target, source_ptr, by_source, ends, present = plan
    n, heads, width = qkv.shape
    width, pairs, rows, tabulated = width // 5, len(fade), table.shape[1], coordinate is not None
    g_qkv, g_vec, g_table, g_geometry = empty_gradients(qkv, vec, table, fade, moving)
    row, geometry = pack(table, coordinate, fade, direction)
    shape = {"H": heads, "D": width, "E": edges_a_block(width), "TABULATED": tabulated}
    vectors = {"VECTORS": vec is not None, "VECTOR_CUTOFF": vector_cutoff}
    some_vec = qkv if vec is None else vec
    launch(by_target_kernel, (n, heads), g_scalars, qkv, table, source, ptr, pair, row, geometry, g_qkv, rows, **shape)
    launch(
        by_source_kernel,
        (n, heads),
        *(g_scalars, g_vectors, qkv, some_vec, table, target, source_ptr, by_source, pair, row, geometry),
        *(g_qkv, g_vec, rows),
        **shape,
        **vectors,
    )
    intervals, spread = (rows - 3, 4) if tabulated else (rows, 1)
    order, starts, stops, chunk_row, chunk_ptr = chunks_of_rows(row, n, intervals)
    partial = fade.new_empty(len(starts), heads, spread, 4 * width)
    g_weight, g_message = fade.new_empty(heads, pairs, 2), fade.new_empty(heads, pairs, 5)
    sorted_items = (order, ends, present, geometry, starts, stops, chunk_row, partial)
    launch(
        scalar_gates_kernel,
        (len(starts), heads),
        *(g_scalars, qkv, table, *sorted_items, g_weight, pairs, rows),
        **shape,
        MOVING=moving,
    )
    launch(
        vector_gates_kernel,
        (len(starts), heads),
        *(g_vectors, qkv, some_vec, table, *sorted_items, g_message, pairs, rows),
        **shape,
        **vectors,
        MOVING=moving,
    )
    add_up(partial, chunk_ptr, intervals, g_table)
    if moving:
        add_heads(g_weight, g_message, g_geometry)
    return g_qkv, g_vec, g_table, g_geometry
