"""The operations in C++ for CPUs: vectors of the machine's own width, torch's own threads."""

from mspt.kernels.cpu.attention import radius_graph_attention
from mspt.kernels.cpu.carried_attention import carried_score_attention
from mspt.kernels.cpu.egnn import edge_features, gated_sums
from mspt.kernels.cpu.filtered_messages import filtered_messages
from mspt.kernels.cpu.graph import radius_graph
from mspt.kernels.cpu.harmonics import spherical_harmonics
from mspt.kernels.cpu.linear import linear
from mspt.kernels.cpu.table import gate_table
from mspt.kernels.cpu.triplet_messages import triplet_messages
from mspt.kernels.cpu.triplets import triplets
from mspt.kernels.cpu.update import update
from mspt.kernels.cpu.whiten import whiten

__all__ = [
    "carried_score_attention",
    "edge_features",
    "filtered_messages",
    "gate_table",
    "gated_sums",
    "linear",
    "radius_graph",
    "radius_graph_attention",
    "spherical_harmonics",
    "triplet_messages",
    "triplets",
    "update",
    "whiten",
]
