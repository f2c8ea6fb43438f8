"""What each operation means, in plain PyTorch: any dtype, any device, first and second derivatives.

Geometry stays in the type of the positions; features may be of low precision, but every product and sum over edges is
taken in at least float32.

Legend: n atoms, e edges, m molecules, F channels, H heads, D = F / H channels a head, K radial functions, T tokens.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, scaled_dot_product_attention, silu


class Graph(NamedTuple):
    """Edges sorted by target: source [e], target [e]; edges ptr[i] to ptr[i + 1] end at atom i, ptr [n + 1]."""

    source: Tensor
    target: Tensor
    ptr: Tensor


class RadialBasis(NamedTuple):
    """exp(−β (e^{−αr} − μ_k)²) φ(r), α = 5 / cutoff (Unke & Meuwly, 2019): means μ [K] and β, a number."""

    means: Tensor
    beta: float
    cutoff: float


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
    return Graph(source, target, torch.cat([counts.new_zeros(1), torch.cumsum(counts, 0)]))


def cosine_cutoff(distance, cutoff):
    """φ(r) = ½ (cos(π r / cutoff) + 1) inside the cut-off, 0 outside."""
    return 0.5 * (torch.cos(distance * (math.pi / cutoff)) + 1) * (distance < cutoff)


def radial_functions(distance, basis):
    """distance [e] -> [e, K]."""
    x = torch.exp(distance * (-5.0 / basis.cutoff))[:, None] - basis.means.to(distance.dtype)
    return cosine_cutoff(distance, basis.cutoff)[:, None] * torch.exp(-basis.beta * x.square())


def edge_geometry(positions, graph):
    """Distance [e] and unit direction [e, 3] from target to source.

    Both are zero, with zero gradient, for self-loops and for atoms in one place.
    """
    offset = positions[graph.source] - positions[graph.target]
    squared = offset.square().sum(-1)
    apart = squared > 0
    # The root of zero has no gradient: there, the root of a constant is taken instead.
    distance = torch.where(apart, squared, 1.0).sqrt()
    return torch.where(apart, distance, 0.0), offset / distance[:, None]


def sum_by_target(values, graph):
    """Sum edge values [e, …] by target atom -> [n, …]."""
    return values.new_zeros(len(graph.ptr) - 1, *values.shape[1:]).index_add(0, graph.target, values)


def at_least_float32(*tensors):
    """The tensors in a type fit to multiply and sum in."""
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def neighbour_embedding(positions, features, weight, bias, basis, graph):
    """Σ_j features_j (W e(r_ij) + b) φ(r_ij) over the neighbours of each atom, without itself (eq. 3).

    features [n, F], weight W [F, K], bias b [F] -> [n, F].
    """
    wide, weight, bias = at_least_float32(features, weight, bias)
    distance, _ = edge_geometry(positions, graph)
    fade = (cosine_cutoff(distance, basis.cutoff) * (graph.source != graph.target)).to(wide.dtype)
    filters = linear(radial_functions(distance, basis).to(wide.dtype), weight, bias) * fade[:, None]
    return sum_by_target(wide[graph.source] * filters, graph).to(features.dtype)


def radius_graph_attention(q, k, v, vec, positions, gate_weight, gate_bias, basis, graph, vector_cutoff):
    """The message pass of the equivariant transformer (Thölke & De Fabritiis, 2022, eqs. 6 to 9).

    q, k [n, H, D]; v [n, H, 3D]: of each head the scalar part and two vector parts; vec [n, 3, F]; gate_weight
    [4F, K], gate_bias [4F]: rows of the key gate first, then of the value gate in v's order. vector_cutoff: whether
    vector messages fade out towards the cut-off as scalar ones do. -> scalars [n, F], vectors [n, 3, F].
    """
    given, (_, heads, width) = q.dtype, q.shape
    q, k, v, vec, gate_weight, gate_bias = at_least_float32(q, k, v, vec, gate_weight, gate_bias)
    distance, direction = edge_geometry(positions, graph)
    gates = silu(linear(radial_functions(distance, basis).to(q.dtype), gate_weight, gate_bias))
    key_gate, value_gate = gates.split([heads * width, 3 * heads * width], dim=1)
    fade = cosine_cutoff(distance, basis.cutoff).to(q.dtype)
    score = (q[graph.target] * k[graph.source] * key_gate.view(-1, heads, width)).sum(-1)
    attention = silu(score) * fade[:, None]
    values = v[graph.source] * value_gate.view(-1, heads, 3 * width)
    scalar, along, new = values.split(width, dim=2)
    along, new = along.flatten(1)[:, None], new.flatten(1)[:, None]
    message = vec[graph.source] * along + direction.to(q.dtype)[..., None] * new
    if vector_cutoff:
        message = message * fade[:, None, None]
    scalars = sum_by_target((scalar * attention[..., None]).flatten(1), graph)
    return scalars.to(given), sum_by_target(message, graph).to(given)


class InverseSquareRoot(torch.autograd.Function):
    """C^{-1/2} of symmetric positive C [n, 3, 3], with a gradient that stays bounded where eigenvalues meet.

    The derivative of f(C) in C's eigenbasis is the Loewner matrix (f(a) − f(b)) / (a − b), for f = x^{-1/2} equal to
    −1 / (√a √b (√a + √b)): no difference of eigenvalues is left to divide by.
    """

    @staticmethod
    def forward(ctx, matrix):
        values, vectors = torch.linalg.eigh(matrix)
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
