"""EGNN: the contract of every encoder, the published arithmetic edge by edge, and the published size."""

import math
from itertools import pairwise

import pytest
import torch
from encoder_contract import EncoderContract, molecules

from mspt.models import encoders
from mspt.models.encoders import egnn


class TestEGNN(EncoderContract):
    settings = egnn.TINY


class TestEGNNOfWholeMolecules(EncoderContract):
    """As published, every atom sees every other, however far."""

    settings = egnn.TINY.model_copy(update={"cutoff": None, "vectors": False})

    def test_smooth_at_the_cut_off(self):
        """Nothing happens at any distance: energies of atoms that move apart bend as little at 5 Å as elsewhere."""
        encoder, step = self.build(), 1e-3
        numbers, ptr = torch.tensor([6, 8, 1] * 3), torch.tensor([0, 3, 6, 9])
        for distance in (4.0, 5.0, 10.0):
            places = (distance - step, distance, distance + step)
            positions = torch.tensor([[[0, 0, 0], [0, 1.2, 0], [x, 0, 0]] for x in places], dtype=torch.float64)
            below, at, above = self.energies(encoder, numbers, positions.flatten(0, 1), ptr).tolist()
            assert above != below
            assert abs(above - 2 * at + below) / step**2 < 100 * abs(at)

    def test_single_and_lonely_atoms(self):
        """One atom has finite features; far ones see each other still, with a finite force."""
        encoder = self.build()
        far = torch.tensor([[0, 0, 0], [0, 100.0, 0]], dtype=torch.float64, requires_grad=True)
        numbers = torch.tensor([6, 6])
        together = encoder(numbers, far, torch.tensor([0, 2]))[0]
        alone = encoder(numbers, far, torch.tensor([0, 1, 2]))[0]
        force = torch.autograd.grad(together.sum(), far)[0]
        assert all(torch.isfinite(part).all() for part in (together, alone, force))
        assert (together - alone).abs().max() > 1e-3


def by_edge(model, numbers, positions, ptr):
    """The forward pass as in the paper's equations, one edge after the other, with the model's parameters."""
    s, silu = model.settings, torch.nn.functional.silu
    n, most = len(numbers), len(numbers) if model.settings.cutoff is None else model.settings.max_neighbours

    def apply(layers, x):
        return layers[2](silu(layers[0](x)))

    edges = {i: [] for i in range(n)}  # target -> [(source, distance, fade)]
    for first, last in pairwise(ptr.tolist()):
        for i in range(first, last):
            for j in range(first, last):
                r = float((positions[i] - positions[j]).norm())
                if i != j and (s.cutoff is None or r < s.cutoff):
                    fade = 1.0 if s.cutoff is None else 0.5 * (math.cos(math.pi * r / s.cutoff) + 1)
                    edges[i].append((j, r, fade))
            edges[i] = sorted(edges[i], key=lambda edge: edge[1])[:most]

    x = [model.embedding.weight[number] for number in numbers]
    for layer in model.layers:
        new, messages = [], {}
        for i in range(n):
            for j, r, fade in edges[i]:
                seen = torch.cat([x[i], x[j], torch.tensor([r * r], dtype=torch.float64)])
                message = silu(layer.message(silu(layer.weight @ seen + layer.bias)))
                score = layer.gate.weight @ message + layer.gate.bias
                messages[i, j] = message / (1 + torch.exp(-score)) * fade
            zero = torch.zeros(s.channels, dtype=torch.float64)
            around = sum((messages[i, j] for j, _, _ in edges[i]), start=zero)
            new.append(x[i] + apply(layer.update, torch.cat([x[i], around])))
        x = new
    scalars = torch.stack([apply(model.out, row) for row in x])
    if not s.vectors:
        return scalars, None
    vectors = [torch.zeros(3, s.channels, dtype=torch.float64) for _ in range(n)]
    for i in range(n):
        for j, r, fade in edges[i]:
            direction = (positions[i] - positions[j]) / r
            vectors[i] = vectors[i] + torch.outer(direction, apply(model.moves, messages[i, j])) * fade
    return scalars, torch.stack(vectors)


@pytest.mark.parametrize(
    "change",
    [{"cutoff": None}, {"cutoff": None, "vectors": False}, {}, {"layers": 3, "cutoff": 2.5, "max_neighbours": 3}],
    ids=["whole molecules", "no vectors", "cut-off", "few neighbours"],
)
def test_published_arithmetic(change):
    """The vectorised layers against the loops over edges: outputs, and every parameter's gradient."""
    settings = egnn.TINY.model_copy(update=change)
    model = type("Built", (EncoderContract,), {"settings": settings})().build()
    numbers, positions, ptr = molecules((5, 1, 3))
    torch.manual_seed(1)
    weights = torch.randn(9, 16, dtype=torch.float64), torch.randn(9, 3, 16, dtype=torch.float64)
    results = []
    for forward in (model, lambda *inputs: by_edge(model, *inputs)):
        outputs = [output for output in forward(numbers, positions, ptr) if output is not None]
        total = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=False))
        results.append([*outputs, *torch.autograd.grad(total, list(model.parameters()))])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def test_whole_molecules_larger_than_the_neighbours_that_a_cut_off_keeps():
    """Every two atoms are joined, also in a molecule that the search sorts into cells."""
    generator = torch.Generator().manual_seed(0)
    positions = 20 * torch.rand(250, 3, dtype=torch.float64, generator=generator)
    numbers, ptr = torch.randint(1, 10, (250,), generator=generator), torch.tensor([0, 200, 250])
    whole = egnn.TINY.model_copy(update={"cutoff": None, "layers": 1})
    model = type("Built", (EncoderContract,), {"settings": whole})().build()
    # A cut-off that is far away joins them all too, and fades nothing.
    wide = encoders.build(whole.model_copy(update={"cutoff": 1e9, "max_neighbours": 250})).double()
    wide.load_state_dict(model.state_dict())
    for one, other in zip(model(numbers, positions, ptr), wide(numbers, positions, ptr), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_published_size():
    """With the published code's map of 15 inputs and head, F -> F -> 1, that code's 745 224 parameters."""
    model = encoders.build(egnn.QM9)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    f = 128
    assert parts.pop("embedding") == 119 * f
    layer = (2 * f + 1) * f + f + f * f + f + f + 1 + 2 * f * f + f + f * f + f
    assert parts == {"layers": 7 * layer, "out": 2 * (f * f + f)}
    assert sum(parts.values()) + 15 * f + f + f * f + f + f + 1 == 745_224
