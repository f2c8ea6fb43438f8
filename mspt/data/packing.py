"""Micro-batches under a budget of atoms, edges and molecules."""

import numpy as np
from pydantic import Field

from mspt.errors import UserError
from mspt.settings import Settings

# The published limit of neighbours, for the bound on edges.
NEIGHBOURS = 32


class Budget(Settings):
    """What a micro-batch may hold at most; None is no limit. edges: counted as n · min(n, 32) of a molecule of n atoms.

    Molecules are close to each other in size within a lane, so that micro-batches cut by atoms are level over ranks.
    """

    molecules: int = Field(ge=1)
    atoms: int = Field(ge=1)
    edges: int | None = Field(None, ge=1)


def check(atoms, budget, source):
    """Raise UserError where a molecule alone (atoms [N] of source) is over budget."""
    largest = int(atoms.max())
    for name, needed in (("atoms", largest), ("edges", largest * min(largest, NEIGHBOURS))):
        limit = getattr(budget, name)
        if limit is not None and needed > limit:
            raise UserError(
                f"data.budget.{name} is {limit}, but a molecule of {source} alone needs {needed}; set it to at least that"
            )


def cut(atoms, budget):
    """Cut a sequence of molecules into micro-batches: each takes as many as the budget allows.

    atoms [k] -> starts [b + 1] of the micro-batches, the last one being k.
    """
    sums = [np.concatenate([[0], np.cumsum(atoms, dtype=np.int64)])]
    limits = [budget.atoms]
    if budget.edges is not None:
        sums.append(np.concatenate([[0], np.cumsum(atoms.astype(np.int64) * np.minimum(atoms, NEIGHBOURS))]))
        limits.append(budget.edges)
    starts, at = [0], 0
    while at < len(atoms):
        ends = [np.searchsorted(s, s[at] + limit, side="right") - 1 for s, limit in zip(sums, limits, strict=True)]
        at = int(min(*ends, at + budget.molecules, len(atoms)))
        starts.append(at)
    return np.array(starts)
