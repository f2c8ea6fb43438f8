"""What each operation means, in plain PyTorch: any dtype, any device, first and second derivatives.

Geometry is taken in float64; features may be of low precision, but every product and sum over edges is
taken in at least float32.

Legend: n atoms, e edges, P pairs, m molecules, F channels, H heads, D = F / H channels a head, K radial functions,
G rows of a table of gates, T tokens, t triplets, S degrees of spherical functions.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import pad, scaled_dot_product_attention, silu

from mspt.kernels import spline
from mspt.kernels.harmonics import spherical_harmonics as spherical_harmonics
from mspt.kernels.spline import cosine_cutoff
from mspt.kernels.triplet_sums import triplet_sums
from mspt.kernels.triplets import triplets as triplets

# Matrices at a time: cuSOLVER's routine for many small ones refuses more than some ten thousand.
EIGH_AT_A_TIME = 8192


class Graph(NamedTuple):
    """Edges sorted by target: source [e], target [e] (int64); edges ptr[i] to ptr[i + 1] end at atom i, ptr [n + 1].

    A pair is two atoms first < second [P] with an edge either way. pair [e] (int32): 0 for a self-loop, p + 1 for an
    edge of pair p that ends at its first atom, −(p + 1) for one that ends at its second. plan: what an implementation
    keeps of the graph for its own use.
    """

    source: Tensor
    target: Tensor
    ptr: Tensor
    pair: Tensor
    first: Tensor
    second: Tensor
    plan: tuple[Tensor, ...] = ()


class Geometry(NamedTuple):
    """Of each pair [P]: distance (float64), and what the features see of it.

    coordinate: where the distance lies among the rows of a table of gates (float64); None where gates are evaluated at
    every distance. fade: the cosine cut-off; direction [P, 3]: unit vector from first to second; both in the features'
    type, float32 at least. Atoms in one place have distance and direction zero, with zero gradient.
    """

    distance: Tensor
    coordinate: Tensor | None
    fade: Tensor
    direction: Tensor


@torch.no_grad()
def radius_graph(positions, ptr, cutoff, max_neighbours, loop):
    """Edges between atoms of a molecule closer than cutoff.

    positions [n, 3] Å, ptr [m + 1]. An atom keeps its max_neighbours nearest (itself among them with loop).
    """
    sizes = ptr[1:] - ptr[:-1]
    per_atom = torch.repeat_interleave(sizes, sizes)
    # All pairs within molecules, by target: target i meets every atom of its molecule in turn.
    target = torch.repeat_interleave(torch.arange(len(positions), device=ptr.device), per_atom)
    first = torch.repeat_interleave(ptr[:-1], sizes * sizes)
    row = torch.cumsum(per_atom, 0) - per_atom
    source = first + torch.arange(len(target), device=ptr.device) - row[target]
    positions = positions.double()
    distance = (positions[source] - positions[target]).norm(dim=-1)
    near = (distance < cutoff) & (loop | (source != target))
    source, target, distance = source[near], target[near], distance[near]
    counts = torch.bincount(target, minlength=len(positions))
    if len(target) and int(counts.max()) > max_neighbours:
        # Sort by distance within each target, and keep the first few of each.
        distance = distance.masked_fill(source == target, -1.0)  # an atom is nearer to itself than any other can be
        order = distance.argsort(stable=True)
        order = order[target[order].argsort(stable=True)]
        starts = torch.cumsum(counts, 0) - counts
        kept = torch.arange(len(target), device=ptr.device) - starts[target[order]] < max_neighbours
        chosen = order[kept].sort().values
        source, target = source[chosen], target[chosen]
        counts = counts.clamp(max=max_neighbours)
    return Graph(source, target, torch.cat([counts.new_zeros(1), torch.cumsum(counts, 0)]), *pairs(source, target))


def pairs(source, target):
    """The pairs of edges source, target [e] -> pair [e] int32, first [P], second [P], as in Graph."""
    apart = source != target
    low, high = torch.minimum(source, target), torch.maximum(source, target)
    n = int(high.max()) + 1 if len(high) else 1
    keys, index = torch.unique((low * n + high)[apart], return_inverse=True)
    number = torch.zeros_like(source).masked_scatter(apart, index + 1)
    return torch.where(source < target, -number, number).int(), keys // n, keys % n


def pair_geometry(positions, graph, basis, dtype):
    """The Geometry of a graph's pairs for a RadialBasis; dtype: of the features."""
    positions = positions.double()
    offset = positions[graph.second] - positions[graph.first]
    squared = offset.square().sum(-1)
    apart = squared > 0
    # The root of zero has no gradient: there, the root of a constant is taken instead.
    root = torch.where(apart, squared, 1.0).sqrt()
    distance = torch.where(apart, root, 0.0)
    coordinate = None if basis.knots is None else basis.coordinate(distance)
    wide = torch.promote_types(dtype, torch.float32)
    fade = cosine_cutoff(distance, basis.cutoff).to(wide)
    return Geometry(distance, coordinate, fade, (offset / root[:, None]).to(wide))


def at_least_float32(*tensors):
    """The tensors in a type fit to multiply and sum in."""
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def neighbour_embedding(numbers, embedding, weight, bias, basis, graph, geometry):
    """Σ_j embedding[number_j] (W e(r_ij) + b) φ(r_ij) over the neighbours of each atom, without itself (eq. 3).

    numbers [n], embedding [elements, F], weight W [F, K], bias b [F] -> [n, F]. The filter is linear in the radial
    functions: they are summed over neighbours of one element first, so that nothing of size [e, F] is made.
    """
    wide, weight, bias = at_least_float32(embedding, weight, bias)
    fade = geometry.fade.to(wide.dtype)[:, None]
    functions = torch.cat([basis.evaluate(geometry.distance, wide.dtype) * fade, fade], 1)  # [P, K + 1]
    edges = graph.pair.nonzero()[:, 0]
    pair = graph.pair[edges].abs().long() - 1
    elements, kind = numbers.unique(return_inverse=True)
    row = graph.target[edges] * len(elements) + kind[graph.source[edges]]
    around = functions.new_zeros(len(numbers) * len(elements), functions.shape[1]).index_add(0, row, functions[pair])
    # Filter and embedding of an element as one map [elements, K + 1, F] of what was summed.
    maps = wide[elements][:, None] * torch.cat([weight, bias[:, None]], 1).T
    return (around.view(len(numbers), maps.shape[0] * maps.shape[1]) @ maps.flatten(0, 1)).to(embedding.dtype)


def gate_table(weight, bias, heads, basis, geometry):
    """silu(W e(r) + b) -> table [H, rows, 4D], in at least float32.

    weight W [4F, K], bias b [4F]: of each head D rows of the key gate, then three times D of the value gate. Rows of
    the table: with knots, the coefficients of a spline; without, the gates at distance 0 and at every pair's.
    """
    weight, bias = at_least_float32(weight, bias)
    values = silu(functional.linear(gate_rows(basis, geometry, weight.dtype), weight, bias))
    return arrange(values, heads, basis.knots is not None)


def gate_rows(basis, geometry, dtype):
    """The radial functions at the distances that the table's rows stand for, [rows, K]."""
    if basis.knots is not None:
        return spline.functions_at_knots(basis, geometry.distance.device).to(dtype)
    distance = torch.cat([geometry.distance.new_zeros(1), geometry.distance])
    return basis.evaluate(distance, dtype)


def arrange(values, heads, is_spline):
    """Gates [rows, 4F] -> table [H, rows, 4D]; of a spline, its coefficients."""
    if is_spline:
        values = spline.inverse(len(values), values.dtype, values.device) @ values
    return values.unflatten(1, (heads, -1)).transpose(0, 1).contiguous()


def pair_gates(table, coordinate):
    """The gates of the self-loop and of every pair, [P + 1, H, 4D], from a table and the pairs' coordinates [P]."""
    if coordinate is None:
        return table.transpose(0, 1)
    return spline.interpolate(table, torch.cat([coordinate.new_full((1,), spline.MARGIN), coordinate]))


def radius_graph_attention(qkv, vec, table, graph, geometry, vector_cutoff):
    """The message pass of the equivariant transformer (Thölke & De Fabritiis, 2022, eqs. 6 to 9).

    qkv [n, H, 5D]: of each head query, key, and of the value the scalar part and two vector parts. vec [n, 3, F], or
    None for zeros. table: of gate_table. vector_cutoff: whether vector messages fade out towards the cut-off as scalar
    ones do. -> scalars [n, F] and vectors [n, 3, F], the latter with vec added.
    """
    given, width = qkv.dtype, qkv.shape[2] // 5
    qkv, table = at_least_float32(qkv, table)
    pair = graph.pair.abs().long()
    # A self-loop has fade 1 and no direction.
    fade = torch.cat([geometry.fade.new_ones(1), geometry.fade]).to(qkv.dtype)[pair]
    direction = torch.cat([geometry.direction.new_zeros(1, 3), geometry.direction]).to(qkv.dtype)[pair]
    direction = direction * graph.pair.sign()[:, None]
    gates = pair_gates(table, geometry.coordinate)[pair]
    key_gate, value_gate = gates.split([width, 3 * width], dim=2)
    query, key, value = qkv.split([width, width, 3 * width], dim=2)
    score = (query[graph.target] * key[graph.source] * key_gate).sum(-1)
    attention = silu(score) * fade[:, None]
    scalar, along, new = (value[graph.source] * value_gate).split(width, dim=2)
    message = direction[..., None] * new.flatten(1)[:, None]
    if vec is not None:
        message = message + vec.to(qkv.dtype)[graph.source] * along.flatten(1)[:, None]
    if vector_cutoff:
        message = message * fade[:, None, None]
    scalars = sum_by_target((scalar * attention[..., None]).flatten(1), graph)
    vectors = sum_by_target(message, graph)
    if vec is not None:
        vectors = vectors + vec
    return scalars.to(given), vectors.to(given)


def sum_by_target(values, graph):
    """Sum edge values [e, …] by target atom -> [n, …]."""
    return values.new_zeros(len(graph.ptr) - 1, *values.shape[1:]).index_add_(0, graph.target, values)


def edge_features(target, source, along, squared, graph):
    """silu of what an edge j → i of EGNN sees: target [n, F] of i + source [n, F] of j + squared [e] times along [F].

    -> [e, F], in the widest of the types.
    """
    seen = target.index_select(0, graph.target) + source.index_select(0, graph.source)
    return silu(seen + squared[:, None] * along)


def gated_messages(x, weight, bias, fade):
    """EGNN's messages y · sigmoid(weight y + bias) · fade, y = silu(x).

    x [e, F], weight [1, F], bias [1], fade [e] -> [e, F], in the wider type of x and fade.
    """
    message = silu(x)
    return message * (functional.linear(message, weight, bias).sigmoid() * fade[:, None])


def gated_sums(x, weight, bias, fade, graph):
    """The sums [n, F] of gated_messages by target atom."""
    return sum_by_target(gated_messages(x, weight, bias, fade), graph)


def filtered_messages(sent, vec, filters, graph, direction):
    """PaiNN's sums over neighbours (eqs. 7 and 8): Σ s_j w, and Σ d (n_j w) + v_j (a_j w), along a graph without loops.

    sent [n, 3F]: s, n and a of each atom; vec v [n, 3, F] or None for zeros; filters w [P, 3F], three of a pair, and
    direction d [P, 3], of Graph's pairs -> [n, F], [n, 3, F].
    """
    pair = graph.pair.abs().long() - 1
    direction = direction[pair] * graph.pair.sign()[:, None]  # from an edge's target to its source
    message = sent.index_select(0, graph.source) * filters.index_select(0, pair)
    scalar, new, along = message.chunk(3, 1)
    vector = direction[..., None] * new[:, None]
    if vec is not None:
        vector = vector + vec.index_select(0, graph.source) * along[:, None]
    return sum_by_target(scalar, graph), sum_by_target(vector, graph)


def triplet_messages(sent, harmonics, spherical, angle_down, torsion_down, angle_up, torsion_up, begin, outgoing, ptr):
    """SphereNet's sums over the triplets k → j → i of each edge j → i: Σ sent · (A a) · (B b). a and b are maps, by
    angle_down and torsion_down, of products: Bessel functions of k → j times harmonics, those of order 0 and all.

    sent [e, C] of the edges k → j, spherical [e, S, K] of these; harmonics [t, S²], of an edge k → j in rows begin [e +
    1] to begin + 1; angle_down [W, S · K], torsion_down [W, S² · K]: inputs are numbered (harmonic, k); angle_up A,
    torsion_up B [C, W]; outgoing [t]: the edge j → i of a triplet; ptr [n + 1]: of Graph -> [e, C], summed in float32
    at least.
    """
    count = begin.diff()
    incoming = torch.repeat_interleave(count)
    # The triplets of an edge k → j in a row of their own, of which some places stay empty: two products for all.
    width = int(count.max()) if len(count) else 0
    place = incoming * width + torch.arange(len(incoming), device=incoming.device) - begin[incoming]
    rows = harmonics.new_zeros(len(sent) * width, harmonics.shape[1]).index_add_(0, place, harmonics)
    rows = rows.view(len(sent), width, harmonics.shape[1])
    zonal = rows[..., [degree**2 for degree in range(spherical.shape[1])]]
    angles, torsions = (
        (known @ _map_of_harmonics(spherical, weight)).flatten(0, 1).index_select(0, place)
        for known, weight in ((zonal, angle_down), (rows, torsion_down))
    )
    return triplet_sums(sent, angles, torsions, angle_up, torsion_up, incoming, outgoing)


def _map_of_harmonics(spherical, weight):
    """A linear map of products, spherical [e, S, K] times harmonics of a triplet, without the products [t, …]: as a map
    of the harmonics alone for each edge. weight [W, A · S · K] -> [e, A · S, W].

    Harmonic f of A · S comes with the Bessel functions of order f mod S; for torsions, whose A is S, that is not its
    own degree, as in the public code.
    """
    orders, functions = spherical.shape[1:]
    weight = weight.view(len(weight), -1, orders, functions).permute(2, 3, 1, 0)  # [S, K, A, W]
    of_edges = (spherical.transpose(0, 1) @ weight.flatten(2)).unflatten(2, weight.shape[2:])  # [S, e, A, W]
    return of_edges.permute(1, 2, 0, 3).flatten(1, 2)


def linear(x, weight, bias, heads):
    """x [n, …, K] Wᵀ + b, weight W [N, K], bias b [N] or None -> [n, …, heads, N / heads].

    An implementation may lay the result out head by head in memory.
    """
    return functional.linear(x, weight, bias).unflatten(-1, (heads, -1))


def update(x, vec, outputs, projected):
    """The ET layer's update (eqs. 10 and 11): x + ⟨u1, u2⟩ o2 + o3 and vec + u3 o1.

    x [n, F], vec [n, 3, F], outputs o [n, 3F], projected u [n, 3, 3F] or None for zeros.
    """
    o1, o2, o3 = outputs.chunk(3, dim=-1)
    if projected is None:
        return x + o3, vec
    u1, u2, u3 = projected.chunk(3, dim=-1)
    return x + (u1 * u2).sum(1) * o2 + o3, vec + u3 * o1[:, None]


class InverseSquareRoot(torch.autograd.Function):
    """C^{-1/2} of symmetric positive C [n, 3, 3], with a gradient that stays bounded where eigenvalues meet.

    The derivative of f(C) in C's eigenbasis is the Loewner matrix (f(a) − f(b)) / (a − b), for f = x^{-1/2} equal to
    −1 / (√a √b (√a + √b)): no difference of eigenvalues is left to divide by.
    """

    @staticmethod
    def forward(ctx, matrix):
        values, vectors = map(torch.cat, zip(*map(torch.linalg.eigh, matrix.split(EIGH_AT_A_TIME)), strict=True))
        root = (vectors * values.rsqrt()[:, None]) @ vectors.mT
        ctx.save_for_backward(matrix, values, vectors)
        return root

    @staticmethod
    def backward(ctx, gradient):
        matrix, values, vectors = ctx.saved_tensors
        gradient = (gradient + gradient.mT) / 2
        if not torch.is_grad_enabled():
            root = values.sqrt()
            loewner = -1 / (root[:, :, None] * root[:, None] * (root[:, :, None] + root[:, None]))
            return vectors @ (loewner * (vectors.mT @ gradient @ vectors)) @ vectors.mT
        # The same as an equation that can be differentiated again: Y = C^{-1/2}, Z = C^{1/2}, and the answer X
        # solves Z X + X Z = −Y G Y, a 9 × 9 system with positive definite Z ⊗ 1 + 1 ⊗ Z.
        inverse = InverseSquareRoot.apply(matrix)
        square_root = matrix @ inverse
        one = torch.eye(3, dtype=matrix.dtype, device=matrix.device)
        system = torch.einsum("nij,kl->nikjl", square_root, one) + torch.einsum("ij,nkl->nikjl", one, square_root)
        right = -(inverse @ gradient @ inverse)
        return torch.linalg.solve(system.reshape(-1, 9, 9), right.reshape(-1, 9)).view_as(matrix)


def whiten(vec, weight, regular):
    """Whitened vector norm: V centred over channels, then (V Vᵀ / F + diag(regular))^{-1/2} V weight.

    vec [n, 3, F], weight [F], regular: three numbers; equal ones keep rotation symmetry, unequal ones break it where
    the covariance is not large against them.
    """
    wide = vec.to(torch.float64)
    centred = wide - wide.mean(-1, keepdim=True)
    diagonal = torch.diag(torch.tensor(regular, dtype=torch.float64, device=vec.device))
    # Where atoms lie in a plane the transform is large along its normal: a product in float32 would lose digits.
    transform = InverseSquareRoot.apply(centred @ centred.mT / vec.shape[-1] + diagonal)
    return (transform @ centred).to(vec.dtype) * weight


def carried_score_attention(queries, keys, values, mask):
    """Attention whose scores add up over layers (RealFormer, He et al., 2021): S_l = Σ_{i ≤ l} Q_i K_iᵀ / √D.

    queries, keys: lists of l tensors [m, T, H, D], this layer's last; values [m, T, H, D]; mask bool [m, T] of tokens
    that may be attended to, or None for all -> [m, T, H, D]. The sum is one product of the heads laid end to end, so
    no [T, T] scores are kept. A molecule without any token to attend to gets zeros. For second
    derivatives call it under sdpa_kernel(SDPBackend.MATH): torch's fused attention has first ones alone.
    """
    scale = values.shape[-1] ** -0.5
    q, k = torch.cat(queries, -1).transpose(1, 2), torch.cat(keys, -1).transpose(1, 2)
    # Fused attention wants values as wide as the keys; zeros make them so.
    width = values.shape[-1]
    v = pad(values, (0, q.shape[-1] - width)).transpose(1, 2)
    if mask is None:
        attended = scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        nothing = ~mask.any(1)[:, None, None, None]
        open_mask = mask[:, None, None] | nothing
        attended = scaled_dot_product_attention(q, k, v, attn_mask=open_mask, scale=scale).masked_fill(nothing, 0.0)
    return attended[..., :width].transpose(1, 2).contiguous()


def carried_score_weights(queries, keys, mask):
    """What carried_score_attention multiplies the values with: [m, H, T, T], rows of queries, each adding up to 1.

    Arguments as there. For pictures alone: nothing else needs [T, T] of memory. A molecule without any token to attend
    to gets zeros.
    """
    q, k = torch.cat(queries, -1).transpose(1, 2), torch.cat(keys, -1).transpose(1, 2)
    scores = q @ k.mT * queries[-1].shape[-1] ** -0.5
    if mask is None:
        return scores.softmax(-1)
    nothing = ~mask.any(1)[:, None, None, None]
    weights = scores.masked_fill(~(mask[:, None, None] | nothing), -torch.inf).softmax(-1)
    return weights.masked_fill(nothing, 0.0)
