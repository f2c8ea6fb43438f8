"""Triplets of atoms k → j → i along the edges of a graph, and which of them comes next around an edge."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Neighbours as close as this in azimuth (radians) are passed over as one, and so are those as close to the axis: in a
# flat molecule rounding would choose between them.
SAME = 1e-5


class Triplets(NamedTuple):
    """Edges k → j and j → i that meet, k ≠ i, in the order of k → j and then of j → i; all int64.

    incoming, outgoing [t]: the edges k → j and j → i. following [t]: the triplet of the same j → i whose k comes next
    around it. begin [e + 1]: where the triplets of an edge k → j begin.
    """

    incoming: Tensor
    outgoing: Tensor
    following: Tensor
    begin: Tensor


@torch.no_grad()
def triplets(direction, graph):
    """The Triplets of a graph. direction [3, e]: unit vectors from an edge's source to its target, float64.

    Next in the sense of the right hand around j → i. A triplet without another k that is SAME neither as its own nor as
    the axis is followed by itself.
    """
    first, last = graph.ptr[graph.source], graph.ptr[graph.source + 1]
    count = last - first
    outgoing = torch.repeat_interleave(count)
    row = torch.arange(len(outgoing), device=outgoing.device) - (torch.cumsum(count, 0) - count)[outgoing]
    incoming = first[outgoing] + row
    apart = graph.source[incoming] != graph.target[outgoing]
    incoming, outgoing = incoming[apart], outgoing[apart]
    following = _next_around(direction[:, outgoing], -direction[:, incoming], outgoing)
    order = incoming.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    count = torch.bincount(incoming, minlength=len(graph.source))
    begin = torch.cat([count.new_zeros(1), count.cumsum(0)])
    return Triplets(incoming[order], outgoing[order], place[following[order]], begin)


def _next_around(axes, others, outgoing):
    """The next triplet [t], where outgoing rises: axes from j to i, others from j to k, unit vectors [3, t]."""
    normals = torch.linalg.cross(axes, others, dim=0)
    least = torch.zeros_like(axes).scatter(0, axes.abs().argmin(0, keepdim=True), 1.0)
    zero = torch.linalg.cross(axes, least, dim=0)
    azimuth = torch.atan2((torch.linalg.cross(zero, normals, dim=0) * axes).sum(0), (zero * normals).sum(0))
    result = torch.arange(len(outgoing), device=outgoing.device)
    order = result[normals.norm(dim=0) > SAME]
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
