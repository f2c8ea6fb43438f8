"""Micro-batches under a budget of atoms, edges and molecules."""

import numpy as np
from pydantic import Field

from mspt.data.gather import library
from mspt.errors import UserError
from mspt.settings import Settings

# The published limit of neighbours, for the bound on edges.
NEIGHBOURS = 32
NO_LIMIT = np.iinfo(np.int64).max


class Budget(Settings):
    """What a micro-batch may hold at most; None is no limit. edges: counted as n · min(n, 32) of a molecule of n atoms.

    Where atoms are what binds, every micro-batch but a lane's last is within one molecule of the budget, so that the
    work of a step is level over ranks.
    """

    molecules: int = Field(ge=1)
    atoms: int = Field(ge=1)
    edges: int | None = Field(None, ge=1)


def work(records, atoms, budget):
    """What part of a micro-batch blocks of so many records and atoms [B] take: by the limit that binds them most."""
    return np.maximum(records / budget.molecules, atoms / budget.atoms)


def check(largest, budget, source):
    """Raise UserError where the largest molecule of source (its number of atoms) alone is over budget."""
    for name, needed in (("atoms", largest), ("edges", largest * min(largest, NEIGHBOURS))):
        limit = getattr(budget, name)
        if limit is not None and needed > limit:
            raise UserError(
                f"data.budget.{name} is {limit}, but a molecule of {source} alone needs {needed}; "
                "set it to that or more"
            )


def cut(atoms, budget):
    """Cut a sequence of molecules into micro-batches: each takes as many as the budget allows.

    atoms [k] -> starts [b + 1] of the micro-batches, the last one being k. A molecule that is over the budget by
    itself, which check refuses, would be a micro-batch of its own.
    """
    if library() is not None:
        atoms = np.ascontiguousarray(atoms, np.int32)
        starts = np.empty(len(atoms) + 1, np.int64)
        limits = (NEIGHBOURS, budget.molecules, budget.atoms, budget.edges or NO_LIMIT)
        return starts[: library().cut(atoms.ctypes.data, len(atoms), *limits, starts.ctypes.data)].copy()
    sums = [np.concatenate([[0], np.cumsum(atoms, dtype=np.int64)])]
    limits = [budget.atoms]
    if budget.edges is not None:
        sums.append(np.concatenate([[0], np.cumsum(atoms.astype(np.int64) * np.minimum(atoms, NEIGHBOURS))]))
        limits.append(budget.edges)
    starts, at = [0], 0
    while at < len(atoms):
        ends = [np.searchsorted(s, s[at] + limit, side="right") - 1 for s, limit in zip(sums, limits, strict=True)]
        at = max(at + 1, int(min(*ends, at + budget.molecules)))
        starts.append(at)
    return np.array(starts)
