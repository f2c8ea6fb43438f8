"""Triplets of atoms k → j → i along the edges of a graph, and which of them comes next around an edge.

Legend: e edges, t triplets.
"""

import math

import torch

# Neighbours as close as this in azimuth (radians) are passed over as one, and so are those as close to the axis: in a
# flat molecule rounding would choose between them.
SAME = 1e-5


def triplets(graph):
    """Edges k → j and j → i that meet, k ≠ i: their numbers, int64 [t] twice, by j → i."""
    begin, end = graph.ptr[graph.source], graph.ptr[graph.source + 1]
    outgoing = torch.repeat_interleave(end - begin)
    row = torch.arange(len(outgoing), device=outgoing.device) - (torch.cumsum(end - begin, 0) - (end - begin))[outgoing]
    incoming = begin[outgoing] + row
    apart = graph.source[incoming] != graph.target[outgoing]
    return incoming[apart], outgoing[apart]


def by_incoming(incoming, edges):
    """The order [t] of the triplets by k → j, and where those of each of so many edges begin: int64 [e + 1]."""
    counts = torch.bincount(incoming, minlength=edges)
    return incoming.argsort(stable=True), torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def safe_norm(vectors):
    """Lengths [...] of vectors [..., 3], and unit vectors; both zero, with zero gradient, where a vector is zero."""
    squared = vectors.square().sum(-1)
    apart = squared > 0
    root = torch.where(apart, squared, 1.0).sqrt()
    return torch.where(apart, root, 0.0), vectors / root[..., None]


@torch.no_grad()
def next_around(axes, normals, outgoing):
    """The triplet [t] of the same edge j → i whose k comes next around the axis, in the sense of the right hand.

    axes: unit vectors from j to i [t, 3]. normals: axis × unit vector from j to k [t, 3]. A triplet without another k
    that is SAME neither as its own nor as the axis, gets itself. outgoing rises.
    """
    least = torch.zeros_like(axes).scatter(1, axes.abs().argmin(1, keepdim=True), 1.0)
    zero = torch.linalg.cross(axes, least)
    azimuth = torch.atan2((torch.linalg.cross(zero, normals) * axes).sum(-1), (zero * normals).sum(-1))
    result = torch.arange(len(outgoing), device=outgoing.device)
    order = result[normals.norm(dim=-1) > SAME]
    # By edge and then by azimuth, which lies within ±π: in one number, whose rounding is far below SAME.
    order = order[(azimuth[order] + 8.0 * outgoing[order]).argsort()]
    if not len(order):
        return result
    angle, count = azimuth[order], torch.unique_consecutive(outgoing[order], return_counts=True)[1]
    last = torch.cumsum(count, 0) - 1
    first = torch.repeat_interleave(last - count + 1, count)
    place = torch.arange(len(order), device=order.device)
    following = place + 1
    following[last] = first[last]
    gap = angle[following] - angle
    gap[last] += 2 * math.pi
    # The last of those at one azimuth is followed by another; its edge has one, since its gaps make up a turn.
    ends = torch.where(gap > SAME, place, len(place))
    ends = ends.flip(0).cummin(0).values.flip(0)
    beyond = ends > torch.repeat_interleave(last, count)
    ends = torch.where(beyond, ends[first], ends)
    result[order] = order[following[ends]]
    return result
