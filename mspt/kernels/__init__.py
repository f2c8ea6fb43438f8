"""The fused operations of the networks.

Every operation is written in plain PyTorch in reference.py, which says what it means; an implementation for a device
may stand in for it. MSPT_KERNELS names one; `auto`, the default, takes the C++ kernels on a CPU where a compiler is
found, Triton's on a GPU, and the reference for what they leave out.
"""

from mspt.kernels.reference import (
    Geometry,
    Graph,
    gated_messages,
    neighbour_embedding,
    pair_geometry,
    sum_by_target,
)
from mspt.kernels.selection import implementation, pick, use
from mspt.kernels.spline import RadialBasis

__all__ = [
    "Geometry",
    "Graph",
    "RadialBasis",
    "carried_score_attention",
    "edge_features",
    "filtered_messages",
    "gate_table",
    "gated_messages",
    "gated_sums",
    "implementation",
    "linear",
    "neighbour_embedding",
    "pair_geometry",
    "radius_graph",
    "radius_graph_attention",
    "spherical_harmonics",
    "sum_by_target",
    "triplet_messages",
    "triplets",
    "update",
    "use",
    "whiten",
]


def radius_graph(positions, ptr, cutoff, max_neighbours, loop):
    """reference.radius_graph."""
    return pick("radius_graph", positions.device)(positions, ptr, cutoff, max_neighbours, loop)


def gate_table(weight, bias, heads, basis, geometry):
    """reference.gate_table."""
    return pick("gate_table", weight.device, weight.dtype)(weight, bias, heads, basis, geometry)


def radius_graph_attention(qkv, vec, table, graph, geometry, vector_cutoff):
    """reference.radius_graph_attention."""
    return pick("radius_graph_attention", qkv.device, qkv.dtype)(qkv, vec, table, graph, geometry, vector_cutoff)


def filtered_messages(sent, vec, filters, graph, direction):
    """reference.filtered_messages."""
    return pick("filtered_messages", sent.device, sent.dtype)(sent, vec, filters, graph, direction)


def edge_features(target, source, along, squared, graph):
    """reference.edge_features."""
    return pick("edge_features", target.device, target.dtype)(target, source, along, squared, graph)


def gated_sums(x, weight, bias, fade, graph):
    """reference.gated_sums."""
    return pick("gated_sums", x.device, x.dtype)(x, weight, bias, fade, graph)


def triplets(direction, graph):
    """reference.triplets."""
    return pick("triplets", direction.device)(direction, graph)


def spherical_harmonics(seen, degrees, dtype):
    """reference.spherical_harmonics."""
    return pick("spherical_harmonics", seen.device, dtype)(seen, degrees, dtype)


def triplet_messages(sent, harmonics, spherical, angle_down, torsion_down, angle_up, torsion_up, begin, outgoing, ptr):
    """reference.triplet_messages."""
    function = pick("triplet_messages", sent.device, sent.dtype)
    return function(sent, harmonics, spherical, angle_down, torsion_down, angle_up, torsion_up, begin, outgoing, ptr)


def linear(x, weight, bias, heads=1):
    """reference.linear."""
    return pick("linear", x.device, x.dtype)(x, weight, bias, heads)


def update(x, vec, outputs, projected):
    """reference.update."""
    return pick("update", x.device, x.dtype)(x, vec, outputs, projected)


def whiten(vec, weight, regular):
    """reference.whiten."""
    return pick("whiten", vec.device, vec.dtype)(vec, weight, regular)


def carried_score_attention(queries, keys, values, mask):
    """reference.carried_score_attention."""
    return pick("carried_score_attention", values.device, values.dtype)(queries, keys, values, mask)
