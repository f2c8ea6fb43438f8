"""The radius graph, its pairs and its tiles, in C++: all pairs of small molecules, cells in large ones."""

import ctypes

import torch

from mspt import native
from mspt.kernels.cpu import build
from mspt.kernels.reference import Graph

# int64 arrays: source, target, ptr, first, second; int32 ones: pair, then the plan in the order of graph.cpp.
WIDE, NARROW = 5, 12


@torch.compiler.disable  # how many edges there are, only a run can tell
def radius_graph(positions, ptr, cutoff, max_neighbours, loop):
    """reference.radius_graph, with tiles as the plan."""
    library = build.load("graph")
    library.graph_build.restype = ctypes.c_void_p
    positions, ptr = positions.detach().double().contiguous(), ptr.contiguous()
    handle = ctypes.c_void_p(
        library.graph_build(
            native.pointer(positions),
            native.pointer(ptr),
            ctypes.c_int64(len(ptr) - 1),
            ctypes.c_double(cutoff),
            ctypes.c_int64(max_neighbours),
            int(loop),
        )
    )
    try:
        sizes = (ctypes.c_int64 * (WIDE + NARROW))()
        library.graph_sizes(handle, sizes)
        types = [torch.int64] * WIDE + [torch.int32] * NARROW
        arrays = [torch.empty(size, dtype=dtype) for size, dtype in zip(sizes, types, strict=True)]
        library.graph_copy(handle, (ctypes.c_void_p * len(arrays))(*[array.data_ptr() for array in arrays]))
    finally:
        library.graph_free(handle)
    source, target, edge_ptr, first, second, pair, *plan = arrays
    return Graph(source, target, edge_ptr, pair, first, second, tuple(plan))
