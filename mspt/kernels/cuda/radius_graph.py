"""The radius graph on a GPU, in time and memory that grow with the number of edges."""

import ctypes
import logging
from functools import cache

import torch

from mspt.kernels import reference
from mspt.kernels.cuda import build
from mspt.native import NoCompiler, pointer

log = logging.getLogger("mspt")


@cache
def _library(device):
    """The compiled kernels for a device, or None, said once, where they cannot be compiled."""
    major, minor = torch.cuda.get_device_capability(device)
    try:
        return build.load("radius_graph", f"sm_{major}{minor}")
    except NoCompiler as error:
        log.warning("mspt: the radius graph is found by PyTorch, among all pairs of a molecule's atoms: %s", error)
        return None


def radius_graph(positions, ptr, cutoff, max_neighbours, loop):
    """reference.radius_graph, for positions on a GPU."""
    library = _library(positions.device)
    if library is None or len(positions) == 0:
        return reference.radius_graph(positions, ptr, cutoff, max_neighbours, loop)
    with torch.cuda.device(positions.device):
        stream = torch.cuda.current_stream().cuda_stream
        return search(library, stream, positions, ptr, cutoff, max_neighbours, loop)


@torch.no_grad()
def search(library, stream, positions, ptr, cutoff, max_neighbours, loop):
    """Atoms into cells, cells in order, neighbours counted, room made, neighbours written.

    library: of radius_graph.cu, or one with the same functions.
    """

    def call(name, *arguments):
        types = {torch.Tensor: pointer, float: ctypes.c_double, bool: ctypes.c_bool, int: ctypes.c_int64}
        error = getattr(library, name)(*(types[type(x)](x) for x in arguments), ctypes.c_void_p(stream))
        if error:
            raise RuntimeError(f"{name}: CUDA error {error}")

    n, m, cutoff, loop = len(positions), len(ptr) - 1, float(cutoff), bool(loop)
    positions, ptr = positions.double().contiguous(), ptr.contiguous()
    molecule = torch.repeat_interleave(ptr.diff(), output_size=n)
    index, boxes = molecule[:, None].expand(n, 3), positions.new_zeros(2, m, 3)
    boxes[0].scatter_reduce_(0, index, positions, "amin", include_self=False)
    boxes[1].scatter_reduce_(0, index, positions, "amax", include_self=False)
    atoms = (positions, ptr, molecule, *boxes)
    cell, counts = torch.empty_like(molecule), torch.empty_like(molecule)
    call("mspt_cells", *atoms, n, cutoff, cell)
    cell, order = cell.sort(stable=True)
    cell_start = torch.searchsorted(cell, torch.arange(n + 1, device=cell.device))
    call("mspt_count", *atoms, order, cell_start, n, cutoff, loop, counts)
    counts = counts.clamp(max=max_neighbours)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    edges = int(starts[-1])
    source, room = starts.new_empty(edges), positions.new_empty(edges)
    call("mspt_fill", *atoms, order, cell_start, n, cutoff, loop, starts, source, room)
    target = torch.repeat_interleave(counts, output_size=edges)
    return reference.Graph(source, target, starts, *reference.pairs(source, target))
