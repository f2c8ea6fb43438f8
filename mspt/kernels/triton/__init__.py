"""The operations as Triton kernels, for GPUs, or for its interpreter on a CPU (TRITON_INTERPRET=1)."""

from mspt.kernels.triton.attention import radius_graph_attention
from mspt.kernels.triton.graph import radius_graph
from mspt.kernels.triton.table import gate_table
from mspt.kernels.triton.update import update
from mspt.kernels.triton.whiten import whiten

__all__ = ["gate_table", "radius_graph", "radius_graph_attention", "update", "whiten"]
