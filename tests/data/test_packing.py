"""Micro-batches: within budget, as full as it allows, nothing lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mspt.data.packing import NEIGHBOURS, Budget, check, cut
from mspt.errors import UserError


def edges(atoms):
    return (atoms * np.minimum(atoms, NEIGHBOURS)).sum()


def fits(atoms, budget):
    return (
        len(atoms) <= budget.molecules
        and atoms.sum() <= budget.atoms
        and (budget.edges is None or edges(atoms) <= budget.edges)
    )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 60), max_size=80),
    st.integers(1, 9),
    st.integers(60, 300),
    st.one_of(st.none(), st.integers(60 * NEIGHBOURS, 5000)),
)
def test_greedy_and_within_budget(sizes, molecules, atoms, most_edges):
    sizes, budget = np.array(sizes, np.int32), Budget(molecules=molecules, atoms=atoms, edges=most_edges)
    starts = cut(sizes, budget)
    assert starts[0] == 0 and starts[-1] == len(sizes) and (np.diff(starts) > 0).all()
    for begin, end in zip(starts[:-1], starts[1:], strict=True):
        assert fits(sizes[begin:end], budget)
        assert end == len(sizes) or not fits(sizes[begin : end + 1], budget)


def test_a_molecule_over_the_budget_stands_alone_and_is_refused():
    budget = Budget(molecules=4, atoms=10)
    assert cut(np.array([3, 50, 3, 3]), budget).tolist() == [0, 1, 2, 4]
    check(10, budget, "set")
    with pytest.raises(UserError, match=r"data\.budget\.atoms is 10, but a molecule of set alone needs 11; set it to"):
        check(11, budget, "set")
    check(3, Budget(molecules=1, atoms=10, edges=9), "set")
    with pytest.raises(UserError, match=r"data\.budget\.edges is 9, but a molecule of set alone needs 16"):
        check(4, Budget(molecules=1, atoms=10, edges=9), "set")
    with pytest.raises(UserError, match=f"alone needs {100 * NEIGHBOURS}"):
        check(100, Budget(molecules=1, atoms=100, edges=9), "set")


def test_work_is_level_where_atoms_bind():
    """Sizes like QM9's: the fullest micro-batch of a step over the mean of 8 lanes."""
    rng = np.random.default_rng(0)
    budget = Budget(molecules=10_000, atoms=1280)
    loads = []
    for _ in range(8):
        sizes = rng.normal(18, 3, 20_000).round().clip(3, 29).astype(np.int64)
        starts = cut(sizes, budget)
        loads.append(np.add.reduceat(sizes, starts[:-1])[:250])
    loads = np.array(loads)
    assert (loads.max(0) / loads.mean(0)).mean() < 1.05
