"""Transformer-M: the contract of every encoder, and its arithmetic atom by atom, with bonds and without.

No package holds an independent implementation of it; the loops below are written from the paper and its public code.
"""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from encoder_contract import EncoderContract, molecules
from torch.nn.functional import gelu

from mspt.data.batch import Bonds, MoleculeBatch
from mspt.data.keyed import Keyed
from mspt.models import encoders
from mspt.models.encoders import transformer_m
from mspt.models.pretraining import NetworkSettings, Pass
from mspt.objectives import ObjectivesSettings, Pretraining
from tests.data.molecules import record
from tests.data.test_batch import bonded

BOTH, BONDS, POSITIONS = transformer_m.BOTH, transformer_m.BONDS, transformer_m.POSITIONS


class TestTransformerM(EncoderContract):
    settings = transformer_m.TINY

    def test_smooth_at_the_cut_off(self):
        pytest.skip("has no cut-off")

    def test_single_and_lonely_atoms(self):
        """A lone atom has finite features and no force; far atoms still see that they are two."""
        encoder = self.build()
        positions = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        scalars, vectors = encoder(torch.tensor([6]), positions, torch.tensor([0, 1]))
        assert torch.isfinite(scalars).all() and (vectors == 0).all()
        assert (torch.autograd.grad(scalars.sum(), positions)[0] == 0).all()
        far = torch.tensor([[0, 0, 0], [0, 100.0, 0]], dtype=torch.float64)
        two = encoder(torch.tensor([6, 6]), far, torch.tensor([0, 2]))[0]
        assert torch.isfinite(two).all() and not torch.allclose(two[0], scalars[0])


def build(**changes):
    settings = transformer_m.TINY.model_copy(update=changes)
    return type("Built", (EncoderContract,), {"settings": settings})().build()


# A ring of four with a tail and a double bond (two shortest paths across), a pair without a bond, one unknown.
SIZES = (7, 2, 3)
PAIRS = [[0, 1], [1, 2], [2, 3], [3, 0], [3, 4], [5, 4], [5, 6], [9, 10], [10, 11]]
KINDS = [1, 2, 1, 1, 4, 3, 0, 1, 1]


def example():
    """numbers, positions, ptr and bonds; of the molecule of two, none are known, of the third they are a chain."""
    bonds = Bonds(torch.tensor(PAIRS), torch.tensor(KINDS), torch.tensor([True, False, True]))
    return *molecules(SIZES, seed=4), bonds


def paths(i, j, neighbours):
    """The shortest paths from i to j as lists of atoms, by breadth."""
    found = [[i]]
    for _ in range(20):
        ends = [path for path in found if path[-1] == j]
        if ends:
            return ends
        found = [[*path, k] for path in found for k in neighbours.get(path[-1], {}) if k not in path]
    return []


def share(i, j, place, neighbours):
    """Types of the bond at a place on the way from i to j, with their shares: the mean over what comes last."""
    routes = paths(i, j, neighbours)
    if not routes or place >= len(routes[0]) - 1:
        return {}
    if place == len(routes[0]) - 2:
        last = {path[-2] for path in routes}
        parts = [{neighbours[k][j]: 1.0} for k in last]
    else:
        parts = [share(i, k, place, neighbours) for k in {path[-2] for path in routes}]
    return {kind: sum(part.get(kind, 0.0) for part in parts) / len(parts) for kind in {k for p in parts for k in p}}


def by_atom(model, numbers, positions, neighbours, seen):
    """Scalars and vectors of one molecule; neighbours: atom -> atom -> type of the bond; seen: flat, spatial."""
    s, n = model.settings, len(numbers)
    flat, spatial = seen
    distance, path, heads = model.by_distance, model.by_path, s.heads

    def functions(i, j):
        a = distance.scale[0][numbers[i]] + distance.scale[1][numbers[j]]
        b = distance.shift[0][numbers[i]] + distance.shift[1][numbers[j]]
        d = float((positions[j] - positions[i]).norm())
        width = distance.widths.abs() + 0.01
        return torch.exp(-(((a * d + b - distance.means) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))

    def bias(i, j):
        total = torch.zeros(heads, dtype=torch.float64)
        if spatial:
            total = total + distance.second(gelu(distance.first(functions(i, j))))
        if flat:
            routes = paths(i, j, neighbours)
            hops = len(routes[0]) - 1 if routes else s.longest_path + 1
            total = total + path.lengths.weight[hops]
            for place in range(s.typed_bonds):
                for kind, weight in share(i, j, place, neighbours).items():
                    divisor = min(max(hops, 1), s.typed_bonds)
                    total = total + weight / divisor * (path.kinds[kind] @ path.places[place])
        return total

    def attend(layer, x, between, values_of):
        queries, keys, values = (part.view(len(x), heads, -1) for part in layer.qkv(x).split(s.channels, 1))
        rows = []
        for i in range(len(x)):
            row = []
            for h in range(heads):
                scores = torch.stack(
                    [queries[i, h] @ keys[j, h] / math.sqrt(keys.shape[2]) + between[i][j][h] for j in range(len(x))]
                )
                row.append(values_of(i, torch.softmax(scores, 0), values[:, h]))
            rows.append(torch.cat(row, -1))
        return torch.stack(rows)

    x = [model.token]
    for i in range(n):
        own = model.elements.weight[numbers[i]]
        if flat:
            own = own + model.degrees.weight[len(neighbours.get(i, {}))]
        if spatial:
            own = own + 0.01 * distance.centrality(sum(functions(i, j) for j in range(n)))
        x.append(own)
    x = model.norm(torch.stack(x))
    atoms = [[bias(i, j) for j in range(n)] for i in range(n)]
    between = [[model.token_bias] * (n + 1)] + [[model.token_bias, *row] for row in atoms]
    for layer in model.layers:
        x = layer.norm(x + layer.out(attend(layer.attention, x, between, lambda i, w, v: w @ v)))
        x = layer.last_norm(x + layer.second(gelu(layer.first(x))))

    def directed(i, weights, values):
        total = torch.zeros(3, values.shape[1], dtype=torch.float64)
        for j in range(n):
            offset = positions[j] - positions[i]
            total = total + weights[j] * (offset / (offset.norm() + 1e-5))[:, None] * values[j]
        return total * spatial

    return x[1:], attend(model.directions.attention, x[1:], atoms, directed)


@pytest.mark.parametrize("modes", [None, (BOTH, BOTH, BONDS), (BONDS, BONDS, POSITIONS), (POSITIONS, BOTH, BOTH)])
def test_atom_by_atom(modes):
    """Outputs and gradients against loops, for every way in which a molecule may be seen."""
    numbers, positions, ptr, bonds = example()
    encoder = build(typed_bonds=2)
    scalars, vectors = encoder(numbers, positions, ptr, bonds, None if modes is None else torch.tensor(modes))
    parts = []
    for index, (first, last) in enumerate(pairwise(ptr.tolist())):
        neighbours = {}
        for (one, other), kind in zip(PAIRS, KINDS, strict=True):
            if first <= one < last:
                neighbours.setdefault(one - first, {})[other - first] = kind
                neighbours.setdefault(other - first, {})[one - first] = kind
        mode = POSITIONS if not bonds.known[index] else BOTH if modes is None else modes[index]
        seen = mode != POSITIONS, mode != BONDS
        parts.append(by_atom(encoder, numbers[first:last], positions[first:last], neighbours, seen))
    expected = [torch.cat(part) for part in zip(*parts, strict=True)]
    weights = torch.randn_like(scalars), torch.randn_like(vectors)
    totals = [sum((a * w).sum() for a, w in zip(each, weights, strict=True)) for each in ((scalars, vectors), expected)]
    gradients = [torch.autograd.grad(total, list(encoder.parameters()), allow_unused=True) for total in totals]
    # What a path's bonds count is rounded to float32.
    for one, other in zip((scalars, vectors), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-7, atol=1e-7)


def test_bonds_move_with_the_atoms():
    """Another order of atoms and of bonds, either way round: the same features in that order."""
    numbers, positions, ptr, bonds = example()
    encoder = build()
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([a + torch.randperm(b - a, generator=generator) for a, b in pairwise(ptr.tolist())])
    shuffled = torch.randperm(len(KINDS), generator=generator)
    moved = Bonds(order.argsort()[bonds.pairs][shuffled].flip(1), bonds.types[shuffled], bonds.known)
    for one, other in zip(
        encoder(numbers[order], positions[order], ptr, moved), encoder(numbers, positions, ptr, bonds), strict=True
    ):
        torch.testing.assert_close(one, other[order], rtol=1e-10, atol=1e-10)


def test_what_is_hidden_is_not_seen():
    numbers, positions, ptr, bonds = example()
    encoder, moved = build(), positions + 0.3 * torch.randn_like(positions)
    unlike = bonds._replace(types=(bonds.types + 1) % 5)
    flat, spatial = torch.full((3,), BONDS), torch.full((3,), POSITIONS)
    known = torch.repeat_interleave(bonds.known, ptr.diff())
    one, other = (encoder(numbers, x, ptr, bonds, flat) for x in (positions, moved))
    assert torch.equal(one[0][known], other[0][known]) and (one[1][known] == 0).all()
    assert not torch.allclose(one[0][~known], other[0][~known])
    one, other, none = (encoder(numbers, positions, ptr, b, spatial) for b in (bonds, unlike, None))
    assert torch.equal(one[0], other[0]) and torch.equal(one[0], none[0]) and torch.equal(one[1], none[1])
    one, other = (encoder(numbers, positions, ptr, b) for b in (bonds, unlike))
    assert not torch.allclose(one[0][known], other[0][known]) and torch.equal(one[0][~known], other[0][~known])


def test_a_long_chain_and_no_path():
    """Paths longer than the longest share the bias of no path at all; the search does not go on for ever."""
    numbers, ptr = torch.full((9,), 6), torch.tensor([0, 9])
    positions = torch.arange(9.0)[:, None].double() * torch.tensor([1.4, 0, 0])
    chain = torch.stack([torch.arange(8), torch.arange(1, 9)], 1)
    at = torch.zeros(9, dtype=torch.long), torch.arange(9)
    settings = transformer_m.TINY.model_copy(update={"longest_path": 3})
    bonds = Bonds(chain[:7], torch.ones(7, dtype=torch.long), torch.tensor([True]))
    degree, hops, _ = transformer_m.bond_paths(bonds, at, 1, 9, settings)
    expected = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    expected = torch.where(expected > 3, 4, expected)
    expected[8, :8] = expected[:8, 8] = 4
    assert torch.equal(hops[0], expected) and degree[0].tolist() == [1, 2, 2, 2, 2, 2, 2, 1, 0]
    assert torch.isfinite(build(longest_path=3)(numbers, positions, ptr, bonds)[0]).all()


def test_parameters():
    """12 layers of 768 as published, and the other parts; the published 47.1 M have larger tables.

    There 4608 features of atoms, two tables of 512 degrees, 1536 features of bonds, 128 places, 512 lengths and 1536
    scales and shifts; and no head for vectors.
    """
    f, h, k = 768, 32, 128
    model = encoders.build(transformer_m.L12)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert count["layers"] == 12 * (4 * (f * f + f) + 2 * (f * f + f) + 4 * f) == 42_559_488
    assert count["directions"] == 3 * (f * f + f)
    maps = (k * k + k) + (k * h + h) + (k * f + f)
    assert count["by_distance"] == maps + 2 * k + 4 * 119
    published = count["layers"] + maps + 2 * k + f + h + 2 * f  # with the token, its bias and the first norm
    published += 4609 * f + 2 * 512 * f + 1537 * h + 128 * h * h + 512 * h + 2 * 1536
    assert published / 1e6 == pytest.approx(47.1, abs=0.15)


def test_heads_and_modes_must_fit():
    with pytest.raises(ValueError, match="channels \\(10\\) must be a multiple of heads \\(4\\)"):
        transformer_m.TransformerMSettings(channels=10, heads=4)
    with pytest.raises(ValueError, match="must sum to 1"):
        transformer_m.Modes(both=0.5)


def test_modes_are_drawn_for_records_and_only_in_training():
    """As often as set, the same in any company, and another time in another epoch."""
    records = torch.arange(20000)
    modes = transformer_m.Modes()
    drawn = modes.drawn(records, Keyed(0, 0))
    for mode, often in ((BOTH, 0.2), (BONDS, 0.2), (POSITIONS, 0.6)):
        assert (drawn == mode).double().mean() == pytest.approx(often, abs=0.015)
    assert torch.equal(modes.drawn(records.flip(0)[:50], Keyed(0, 0)), drawn.flip(0)[:50])
    assert not torch.equal(modes.drawn(records, Keyed(0, 1)), drawn)

    batch = MoleculeBatch.from_records([bonded(record(f"r{i}", 4, seed=i), i) for i in range(40)])
    module = Pretraining(NetworkSettings(encoder=transformer_m.TINY), ObjectivesSettings.model_validate({"coord": {}}))
    generator = Keyed(0, 0)
    trained = module.corrupted(batch, generator)
    assert torch.equal(trained.modes, modes.drawn(batch.records, generator))
    assert module.eval().corrupted(batch, generator).modes is None
    # What the Pass hands on: bonds count where nothing is hidden.
    seen, unseen = Pass(module.network, batch), Pass(module.network, replace(batch, bonds=None))
    assert not torch.allclose(seen.structure[0], unseen.structure[0])
