"""What each operation means, in plain PyTorch: any dtype, any device, any order of derivative.

Legend: n atoms, e edges, m molecules, F channels, H heads, D = F / H channels a head, K radial functions, T tokens.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu


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
    """Distance [e] and unit direction [e, 3] from target to source; zero, with zero gradient, for self-loops."""
    offset = positions[graph.source] - positions[graph.target]
    itself = graph.source == graph.target
    # A norm at zero has no gradient: self-loops take the norm of a constant instead.
    safe = torch.where(itself[:, None], torch.ones_like(offset), offset)
    distance = safe.norm(dim=-1).masked_fill(itself, 0.0)
    return distance, offset / distance.masked_fill(itself, 1.0)[:, None]


def sum_by_target(values, graph):
    """Sum edge values [e, …] by target atom -> [n, …]."""
    return values.new_zeros(len(graph.ptr) - 1, *values.shape[1:]).index_add(0, graph.target, values)


def neighbour_embedding(positions, features, weight, bias, basis, graph):
    """Σ_j features_j (W e(r_ij) + b) φ(r_ij) over the neighbours of each atom, without itself: [n, F]."""
    distance, _ = edge_geometry(positions, graph)
    inside = (cosine_cutoff(distance, basis.cutoff) * (graph.source != graph.target)).to(features.dtype)
    filters = linear(radial_functions(distance, basis).to(features.dtype), weight, bias) * inside[:, None]
    return sum_by_target(features[graph.source] * filters, graph)


def radius_graph_attention(q, k, v, vec, positions, gate_weight, gate_bias, basis, graph):
    """The message pass of the equivariant transformer (Thölke & De Fabritiis, 2022, eqs. 6 to 9).

    q, k [n, H, D]; v [n, H, 3D]; vec [n, 3, F]; gate_weight [4F, K], gate_bias [4F]: rows of the key gate first, then
    of the value gate in v's order. -> scalars [n, F], vectors [n, 3, F].
    """
    n, heads, width = q.shape
    distance, direction = edge_geometry(positions, graph)
    gates = silu(linear(radial_functions(distance, basis).to(q.dtype), gate_weight, gate_bias))
    key_gate, value_gate = gates.split([heads * width, 3 * heads * width], dim=1)
    inside = cosine_cutoff(distance, basis.cutoff).to(q.dtype)
    score = (q[graph.target] * k[graph.source] * key_gate.view(-1, heads, width)).sum(-1)
    attention = silu(score) * inside[:, None]
    values = v[graph.source] * value_gate.view(-1, heads, 3 * width)
    scalar, along, new = (part for part in values.split(width, dim=2))
    scalars = sum_by_target((scalar * attention[..., None]).flatten(1), graph)
    turned = vec[graph.source] * along.flatten(1)[:, None]
    made = direction.to(q.dtype)[..., None] * new.flatten(1)[:, None]
    return scalars, sum_by_target(turned + made, graph)


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
    centred = vec - vec.mean(-1, keepdim=True)
    wide = centred.to(torch.float64)
    diagonal = torch.diag(torch.tensor(regular, dtype=torch.float64, device=vec.device))
    transform = InverseSquareRoot.apply(wide @ wide.mT / vec.shape[-1] + diagonal)
    return transform.to(vec.dtype) @ centred * weight


def carried_score_attention(queries, keys, values, mask):
    """Attention whose scores add up over layers (RealFormer, He et al., 2021): S_l = Σ_{i ≤ l} Q_i K_iᵀ / √D.

    queries, keys: lists of l tensors [m, H, T, D], this layer's last; values [m, H, T, D]; mask bool [m, T] of tokens
    that may be attended to, or None for all. The sum is one product of the heads laid end to end, so no [T, T]
    scores are kept. A molecule without any token to attend to gets zeros.
    """
    scale = values.shape[-1] ** -0.5
    q, k = torch.cat(queries, -1), torch.cat(keys, -1)
    if mask is None:
        return scaled_dot_product_attention(q, k, values, scale=scale)
    nothing = ~mask.any(1)
    open_mask = (mask | nothing[:, None])[:, None, None]
    attended = scaled_dot_product_attention(q, k, values, attn_mask=open_mask, scale=scale)
    return attended.masked_fill(nothing[:, None, None, None], 0.0)
