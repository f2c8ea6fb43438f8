"""The radius graph, its pairs and its tiles, against brute force."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mspt import kernels
from mspt.kernels import RadialBasis, cpu, reference

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [reference, cpu], ids=["reference", "cpu"])


def brute_force(positions, ptr, cutoff, max_neighbours, loop):
    """Set of sources of every atom."""
    neighbours = []
    for first, last in pairwise(ptr):
        for i in range(first, last):
            near = [(math.dist(positions[i], positions[j]), j) for j in range(first, last) if j != i]
            chosen = [(-1.0, i)] * loop + sorted((r, j) for r, j in near if r < cutoff)
            neighbours.append({j for _, j in chosen[:max_neighbours]})
    return neighbours


@IMPLEMENTATIONS
@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 12), max_size=4),
    seed=st.integers(0, 2**31),
    cutoff=st.floats(0.3, 4.0),
    max_neighbours=st.integers(1, 13),
    loop=st.booleans(),
)
def test_neighbours_are_those_of_brute_force(implementation, sizes, seed, cutoff, max_neighbours, loop):
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randn(sum(sizes), 3, dtype=torch.float64, generator=generator)
    ptr = torch.cat([torch.zeros(1, dtype=torch.long), torch.tensor(sizes, dtype=torch.long).cumsum(0)])
    graph = implementation.radius_graph(positions, ptr, cutoff, max_neighbours, loop)
    expected = brute_force(positions.tolist(), ptr.tolist(), cutoff, max_neighbours, loop)
    assert len(graph.ptr) == sum(sizes) + 1
    assert len(graph.source) == len(graph.target) == graph.ptr[-1]
    for i, neighbours in enumerate(expected):
        edges = slice(graph.ptr[i], graph.ptr[i + 1])
        assert (graph.target[edges] == i).all()
        assert graph.source[edges].tolist() == sorted(neighbours)
    check_pairs(graph)


def check_pairs(graph):
    """Every edge names its pair, from the side that it ends at, and every pair has an edge."""
    assert (graph.first < graph.second).all()
    number = graph.pair.abs().long() - 1
    loops = graph.source == graph.target
    assert torch.equal(number < 0, loops)
    source, target, number, sign = (t[~loops] for t in (graph.source, graph.target, number, graph.pair.sign()))
    assert torch.equal(number.unique(), torch.arange(len(graph.first)))
    assert torch.equal(graph.first[number], torch.minimum(source, target))
    assert torch.equal(graph.second[number], torch.maximum(source, target))
    assert torch.equal(sign > 0, target < source)


@IMPLEMENTATIONS
def test_the_cut_off_itself_is_outside(implementation):
    positions = torch.tensor([[0.0, 0, 0], [2.0, 0, 0], [0, 3.0, 0]])
    ptr = torch.tensor([0, 3])
    assert len(implementation.radius_graph(positions, ptr, 2.0, 32, loop=False).source) == 0
    assert len(implementation.radius_graph(positions, ptr, 2.0 + 1e-6, 32, loop=False).source) == 2


@IMPLEMENTATIONS
def test_an_atom_stays_its_own_neighbour_among_atoms_in_one_place(implementation):
    graph = implementation.radius_graph(torch.zeros(4, 3), torch.tensor([0, 4]), 1.0, 1, loop=True)
    assert graph.source.tolist() == graph.target.tolist() == [0, 1, 2, 3]


def test_pairs_without_length_have_zero_direction_and_gradient():
    positions = torch.tensor([[1.0, 2, 3], [1, 2, 3], [1, 2, 4]], dtype=torch.float64, requires_grad=True)
    graph = kernels.radius_graph(positions, torch.tensor([0, 3]), 5.0, 32, loop=True)
    geometry = kernels.pair_geometry(positions, graph, RadialBasis(8, 5.0, 64), torch.float64)
    total = geometry.distance.sum() + geometry.direction.square().sum()
    gradient = torch.autograd.grad(total, positions, create_graph=True)[0]
    assert sorted(geometry.distance.tolist()) == [0, 1, 1]
    # Two pairs of length one meet at the third atom.
    torch.testing.assert_close(gradient[2], torch.tensor([0, 0, 2.0], dtype=torch.float64))
    assert torch.isfinite(torch.autograd.grad(gradient.sum(), positions)[0]).all()


@pytest.mark.parametrize("spread", [4.0, 40.0, 4000.0], ids=["dense", "sparse", "scattered"])
@pytest.mark.parametrize("most", [8, 64])
def test_cells_of_a_large_system_miss_nothing(spread, most):
    torch.manual_seed(0)
    positions = torch.randn(1500, 3, dtype=torch.float64) * spread
    ptr = torch.tensor([0, 1400, 1400, 1500])
    found = cpu.radius_graph(positions, ptr, 3.0, most, loop=True)
    expected = reference.radius_graph(positions, ptr, 3.0, most, loop=True)
    for one, other in zip(found[:6], expected[:6], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("most", [6, 64])
def test_tiles_hold_every_edge_once_each_way(most):
    torch.manual_seed(0)
    positions, ptr = torch.randn(640, 3) * 4, torch.tensor([0, 20, 21, 620, 640])
    graph = cpu.radius_graph(positions, ptr, 3.0, most, loop=True)
    names = ["own_ptr", "atom_ptr", "atom", "pair_ptr", "pair", "in_ptr", "in_atom", "in_pair"]
    plan = dict(zip([*names, "out_ptr", "out_atom", "out_pair"], (t.tolist() for t in graph.plan), strict=True))
    into, out_of = [], []
    for tile in range(len(plan["own_ptr"]) - 1):
        atoms = plan["atom"][plan["atom_ptr"][tile] : plan["atom_ptr"][tile + 1]]
        pairs = plan["pair"][plan["pair_ptr"][tile] : plan["pair_ptr"][tile + 1]]
        for local, own in enumerate(range(plan["own_ptr"][tile], plan["own_ptr"][tile + 1])):
            for side, edges in (("in", into), ("out", out_of)):
                for e in range(plan[f"{side}_ptr"][own], plan[f"{side}_ptr"][own + 1]):
                    signed = plan[f"{side}_pair"][e]
                    number = (pairs[abs(signed) - 1] + 1) * (1 if signed > 0 else -1) if signed else 0
                    other = atoms[plan[f"{side}_atom"][e]]
                    edges.append((other, atoms[local], number) if side == "in" else (atoms[local], other, -number))
    expected = sorted(zip(graph.source.tolist(), graph.target.tolist(), graph.pair.tolist(), strict=True))
    assert sorted(into) == expected
    assert sorted(out_of) == expected
