"""The message pass of the equivariant transformer: one program a target atom and head, over the atom's edges.

Nothing of the size of edges times channels is written: gates are read off the table edge by edge. Programs of one head
run side by side, so that its slice of the table (270 kB as published) stays in the cache next to the arithmetic.

Legend: n atoms, e edges, P pairs, H heads, D channels a head, F = H D, E edges of a block.
"""

import triton
import triton.language as tl

from mspt.kernels import operators, reference
from mspt.kernels.triton.attention_backward import attention_backward
from mspt.kernels.triton.attention_second import attention_second
from mspt.kernels.triton.graph import planned
from mspt.kernels.triton.launch import WIDTHS, edges_a_block, launch
from mspt.kernels.triton.message import load_gate, load_pair, load_tile, pack


@triton.jit
def forward_kernel(
    qkv, vec, table, source, ptr, pair, row, geometry, scalars, vectors, rows,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    VECTORS: tl.constexpr, VECTOR_CUTOFF: tl.constexpr, TABULATED: tl.constexpr,
):  # fmt: skip
    """operators.attention; row, geometry: of pack. VECTORS: whether there is vec."""
    atom, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, D)
    table += head.to(tl.int64) * rows * 4 * D
    heads = qkv + head * 5 * D
    vec += head * D
    query = tl.load(heads + atom * 5 * D * H + channel).to(tl.float32)
    total = tl.zeros((E, D), tl.float32)
    total_x = tl.zeros((E, D), tl.float32)
    total_y = tl.zeros((E, D), tl.float32)
    total_z = tl.zeros((E, D), tl.float32)
    start, end = tl.load(ptr + atom), tl.load(ptr + atom + 1)
    while start < end:
        edge = start + tl.arange(0, E)
        inside = edge < end
        j = tl.load(source + edge, mask=inside, other=0)
        first, weights, fade, x, y, z = load_pair(pair, row, geometry, edge, inside)
        gate = load_gate(table, first, weights, channel, inside, 4 * D, TABULATED)
        score = tl.sum(query[None, :] * load_tile(heads + D, j, channel, inside, 5 * D * H) * gate, 1)
        attention = score * tl.sigmoid(score) * fade
        gate = load_gate(table + D, first, weights, channel, inside, 4 * D, TABULATED)
        total += attention[:, None] * load_tile(heads + 2 * D, j, channel, inside, 5 * D * H) * gate
        gate = load_gate(table + 3 * D, first, weights, channel, inside, 4 * D, TABULATED)
        new = load_tile(heads + 4 * D, j, channel, inside, 5 * D * H) * gate
        if VECTOR_CUTOFF:
            new *= fade[:, None]
        total_x += x[:, None] * new
        total_y += y[:, None] * new
        total_z += z[:, None] * new
        if VECTORS:
            gate = load_gate(table + 2 * D, first, weights, channel, inside, 4 * D, TABULATED)
            along = load_tile(heads + 3 * D, j, channel, inside, 5 * D * H) * gate
            if VECTOR_CUTOFF:
                along *= fade[:, None]
            total_x += along * load_tile(vec, j, channel, inside, 3 * D * H)
            total_y += along * load_tile(vec + D * H, j, channel, inside, 3 * D * H)
            total_z += along * load_tile(vec + 2 * D * H, j, channel, inside, 3 * D * H)
        start += E
    place = head * D + channel
    tl.store(scalars + atom * D * H + place, tl.sum(total, 0).to(scalars.dtype.element_ty))
    out_x, out_y, out_z = tl.sum(total_x, 0), tl.sum(total_y, 0), tl.sum(total_z, 0)
    if VECTORS:
        own = vec + atom * 3 * D * H + channel
        out_x += tl.load(own).to(tl.float32)
        out_y += tl.load(own + D * H).to(tl.float32)
        out_z += tl.load(own + 2 * D * H).to(tl.float32)
    vectors += atom * 3 * D * H + place
    tl.store(vectors, out_x.to(vectors.dtype.element_ty))
    tl.store(vectors + D * H, out_y.to(vectors.dtype.element_ty))
    tl.store(vectors + 2 * D * H, out_z.to(vectors.dtype.element_ty))


def attention(qkv, vec, table, coordinate, fade, direction, source, ptr, pair, plan, vector_cutoff):
    """operators.attention."""
    n, heads, width = qkv.shape
    width //= 5
    row, geometry = pack(table, coordinate, fade, direction)
    scalars, vectors = qkv.new_empty(n, heads * width), qkv.new_empty(n, 3, heads * width)
    launch(
        forward_kernel,
        (n, heads),
        *(qkv, qkv if vec is None else vec, table, source, ptr, pair, row, geometry, scalars, vectors, table.shape[1]),
        H=heads,
        D=width,
        E=edges_a_block(width),
        VECTORS=vec is not None,
        VECTOR_CUTOFF=vector_cutoff,
        TABULATED=coordinate is not None,
    )
    return scalars, vectors


for device, form in (("CUDA", ""), ("CPU", "_interpreted")):
    operators.implement(f"attention{form}", device, attention)
    operators.implement(f"attention_backward{form}", device, attention_backward)
    operators.implement(f"attention_second{form}", device, attention_second)


def radius_graph_attention(qkv, vec, table, graph, geometry, vector_cutoff):
    """reference.radius_graph_attention; head widths that the kernels do not take are left to it."""
    if qkv.shape[2] // 5 not in WIDTHS:
        return reference.radius_graph_attention(qkv, vec, table, graph, geometry, vector_cutoff)
    if not graph.plan:
        graph = planned(graph)
    form = "" if qkv.is_cuda else "_interpreted"
    return operators.attention(qkv, vec, table, graph, geometry, vector_cutoff, form)
