"""The radius graph, with what the message pass wants to know of it."""

import torch

from mspt.kernels import reference
from mspt.kernels.cuda import radius_graph as on_gpu


def radius_graph(positions, ptr, cutoff, max_neighbours, loop):
    """reference.radius_graph."""
    search = on_gpu.radius_graph if positions.is_cuda else reference.radius_graph
    return planned(search(positions, ptr, cutoff, max_neighbours, loop))


@torch.no_grad()
def planned(graph):
    """The graph with its plan: target [e]; by_source [e], the edges in order of their sources, source_ptr [n + 1];
    and of items (pairs, then atoms as their own neighbours) the two atoms [P + n, 2] and which edges there are
    [P + n]: bit 0 for one that ends at the first atom, bit 1 for one that ends at the second.
    """
    n, pairs = len(graph.ptr) - 1, len(graph.first)
    by_source = graph.source.argsort(stable=True)
    counts = torch.bincount(graph.source, minlength=n)
    source_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    atoms = torch.arange(n, device=graph.ptr.device)
    ends = torch.stack([torch.cat([graph.first, atoms]), torch.cat([graph.second, atoms])], 1)
    item = torch.where(graph.pair == 0, pairs + graph.target, graph.pair.abs().long() - 1)
    bit = torch.where(graph.pair < 0, 2, 1).int()
    present = bit.new_zeros(pairs + n).index_add(0, item, bit)
    return graph._replace(plan=(graph.target, source_ptr, by_source, ends, present))
