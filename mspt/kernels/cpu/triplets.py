"""Triplets of a graph's edges in C++: around every edge at once, atom by atom."""

import ctypes

import torch

from mspt import native
from mspt.kernels.cpu import build
from mspt.kernels.triplets import SAME, Triplets


@torch.compiler.disable  # how many there are, only a run can tell
def triplets(direction, graph):
    """reference.triplets."""
    edges, atoms = len(graph.source), len(graph.ptr) - 1
    ends = graph.source.contiguous(), graph.target.contiguous(), graph.ptr.contiguous()
    leaving, leaves, begin = (ends[0].new_empty(size) for size in (edges, atoms + 1, edges + 1))
    build.call("triplets", "triplets_count", (*ends, leaving, leaves, begin), atoms, edges)
    incoming, outgoing, following = (begin.new_empty(int(begin[-1])) for _ in range(3))
    direction = direction.detach().double().contiguous()
    tensors = direction, *ends, leaving, leaves, begin, incoming, outgoing, following
    build.load("triplets").triplets_fill(
        *map(native.pointer, tensors),
        ctypes.c_int64(atoms),
        ctypes.c_int64(edges),
        ctypes.c_double(SAME),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return Triplets(incoming, outgoing, following, begin)
