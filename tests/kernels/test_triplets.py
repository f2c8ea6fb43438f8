"""Triplets and the next neighbour around an edge: one by one as published, and in C++ as in the reference."""

import math
from itertools import pairwise

import pytest
import torch
from agreement import molecules
from cpu_levels import level, threads  # noqa: F401

from mspt import kernels

# sizes of molecules, nearest neighbours kept
CASES = {
    "small": ((5, 1, 4), 32),
    "one by one": ((6, 1, 2, 3, 9), 32),
    "few neighbours": ((12, 9, 0, 30), 4),
    "many": ((40, 25), 32),
    "no triplets": ((2, 2), 32),
    "no edges": ((1, 1), 32),
    "nothing": ((0,), 32),
}


def case(name):
    """Positions, a graph, and unit vectors along its edges [3, e]."""
    sizes, most = CASES[name]
    positions, ptr = molecules(sizes)
    graph = kernels.radius_graph(positions, ptr, 5.0, most, loop=False)
    return positions, graph, along(positions, graph)


def along(positions, graph):
    offset = (positions[graph.target] - positions[graph.source]).T
    return offset / offset.norm(dim=0)


def found(direction, graph, implementation="cpu"):
    with kernels.use(implementation):
        return kernels.triplets(direction, graph)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["one by one", "few neighbours"])
def test_torsions_one_by_one(name, implementation):
    """The smallest positive torsion over all quadruplets, as it is published, against the next around the axis."""
    positions, graph, direction = case(name)
    into = {
        atom: [(e, int(graph.source[e])) for e in range(first, last)]
        for atom, (first, last) in enumerate(pairwise(graph.ptr.tolist()))
    }
    expected = {}
    for out, (j, i) in enumerate(zip(graph.source.tolist(), graph.target.tolist(), strict=True)):
        for edge, k in into[j]:
            if k == i:
                continue
            axis, own = positions[i] - positions[j], positions[k] - positions[j]
            normal, torsion = torch.linalg.cross(axis, own), 2 * math.pi
            for _, other in into[j]:
                if other not in (i, k):
                    plane = torch.linalg.cross(axis, positions[other] - positions[j])
                    sine = torch.linalg.cross(normal, plane) @ axis / axis.norm()
                    torsion = min(torsion, float(torch.atan2(sine, normal @ plane)) % (2 * math.pi))
            expected[edge, out] = torsion % (2 * math.pi)
    met = found(direction, graph, implementation)
    keys = list(zip(met.incoming.tolist(), met.outgoing.tolist(), strict=True))
    assert keys == sorted(expected)
    assert met.begin.tolist() == [sum(incoming < edge for incoming, _ in keys) for edge in range(len(graph.source) + 1)]
    assert torch.equal(met.outgoing[met.following], met.outgoing)
    normals = torch.linalg.cross(direction[:, met.outgoing], -direction[:, met.incoming], dim=0)
    next_ones = normals[:, met.following]
    sine = (torch.linalg.cross(normals, next_ones, dim=0) * direction[:, met.outgoing]).sum(0)
    angles = torch.atan2(sine, (normals * next_ones).sum(0)) % (2 * math.pi)
    wanted = torch.tensor([expected[key] for key in keys], dtype=torch.float64)
    apart = (angles - wanted).abs()
    assert torch.minimum(apart, 2 * math.pi - apart).max() < 1e-9  # a whole turn is none


@pytest.mark.parametrize("name", CASES)
def test_as_the_reference(name):
    _, graph, direction = case(name)
    for one, other in zip(found(direction, graph), found(direction, graph, "reference"), strict=True):
        assert torch.equal(one, other)


def test_every_instruction_set(level):  # noqa: F811
    _, graph, direction = case("many")
    for one, other in zip(found(direction, graph), found(direction, graph, "reference"), strict=True):
        assert torch.equal(one, other)


def test_any_number_of_threads():
    _, graph, direction = case("many")
    with threads(3):
        several = found(direction, graph)
    for one, other in zip(several, found(direction, graph), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_neighbours_at_one_azimuth_are_passed_over_as_one(implementation):
    """Two of a star's arms one behind the other: both are followed by the third, and that by one of the two."""
    positions = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 0, 0.3], [1, 1e-7, 0.6], [-1, 0.5, 0]], dtype=torch.float64)
    graph = kernels.radius_graph(positions, torch.tensor([0, 5]), 5.0, 32, loop=False)
    met = found(along(positions, graph), graph, implementation)
    next_of = {}
    for incoming, outgoing, following in zip(met.incoming, met.outgoing, met.incoming[met.following], strict=True):
        if (graph.source[outgoing], graph.target[outgoing]) == (0, 1):
            next_of[int(graph.source[incoming])] = int(graph.source[following])
    assert next_of[2] == next_of[3] == 4
    assert next_of[4] in (2, 3)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_what_lies_along_an_axis_is_followed_by_itself(implementation):
    """Carbon dioxide, and an atom in another's place."""
    positions = torch.tensor([[-1.16, 0, 0], [0, 0, 0], [1.16, 0, 0], [1.16, 0, 0]], dtype=torch.float64)
    graph = kernels.radius_graph(positions, torch.tensor([0, 4]), 5.0, 32, loop=False)
    direction = along(positions, graph).nan_to_num()
    met = found(direction, graph, implementation)
    assert len(met.incoming) == 4 * 3 * 2
    assert torch.equal(met.following, torch.arange(len(met.following)))
