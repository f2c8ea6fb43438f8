"""The fused operations. MSPT_KERNELS names the implementation; today there is `reference`, plain PyTorch."""

import os

from mspt.errors import UserError
from mspt.kernels import reference
from mspt.kernels.reference import Graph, RadialBasis

__all__ = [
    "Graph",
    "RadialBasis",
    "carried_score_attention",
    "implementation",
    "neighbour_embedding",
    "radius_graph",
    "radius_graph_attention",
    "whiten",
]

IMPLEMENTATIONS = {"reference": reference}


def implementation():
    """The name of the implementation in use. Raises UserError where MSPT_KERNELS names none."""
    name = os.environ.get("MSPT_KERNELS", "reference")
    if name not in IMPLEMENTATIONS:
        raise UserError(f"MSPT_KERNELS is {name!r}; known: {', '.join(IMPLEMENTATIONS)}")
    return name


_chosen = IMPLEMENTATIONS[implementation()]
radius_graph = _chosen.radius_graph
neighbour_embedding = _chosen.neighbour_embedding
radius_graph_attention = _chosen.radius_graph_attention
whiten = _chosen.whiten
carried_score_attention = _chosen.carried_score_attention
