"""PaiNN: the contract of every encoder, the published arithmetic edge by edge, and the published size."""

import math
from itertools import pairwise

import pytest
import torch
from encoder_contract import EncoderContract, molecules

from mspt.models import encoders
from mspt.models.encoders import painn


class TestPaiNN(EncoderContract):
    settings = painn.TINY


def by_edge(model, numbers, positions, ptr):
    """The forward pass as in the paper's equations, one edge after the other, with the model's parameters."""
    s, silu = model.settings, torch.nn.functional.silu
    n = len(numbers)

    def apply(layers, x):
        return layers[2](silu(layers[0](x)))

    edges = {i: [] for i in range(n)}  # target -> [(source, distance, direction)]
    for first, last in pairwise(ptr.tolist()):
        for i in range(first, last):
            for j in range(first, last):
                offset = positions[j] - positions[i]
                r = float(offset.norm())
                if i != j and r < s.cutoff:
                    edges[i].append((j, r, offset / r))
            edges[i] = sorted(edges[i], key=lambda edge: edge[1])[: s.max_neighbours]

    x = [model.embedding.weight[number] for number in numbers]
    vec = [torch.zeros(3, s.channels, dtype=torch.float64) for _ in range(n)]
    for index, (message, update) in enumerate(zip(model.messages, model.updates, strict=True)):
        rows = slice(3 * s.channels * index, 3 * s.channels * (index + 1))
        new_x, new_vec = [], []
        for i in range(n):
            scalars, vectors = x[i], vec[i]
            for j, r, direction in edges[i]:
                functions = [math.sin(k * math.pi * r / s.cutoff) / r for k in range(1, s.radial_functions + 1)]
                fade = 0.5 * (math.cos(math.pi * r / s.cutoff) + 1)
                filters = (
                    model.filters.weight[rows] @ torch.tensor(functions, dtype=torch.float64) + model.filters.bias[rows]
                ) * fade
                of_scalars, of_direction, of_vectors = (apply(message.sent, x[j]) * filters).split(s.channels)
                scalars = scalars + of_scalars
                vectors = vectors + direction[:, None] * of_direction + vec[j] * of_vectors
            of_length, mixed = update.mix.weight.split(s.channels)
            v, u = vectors @ of_length.T, vectors @ mixed.T
            length = torch.stack([(column @ column + 1e-8).sqrt() for column in v.T])
            a_ss, a_vv, a_sv = apply(update.scales, torch.cat([scalars, length])).split(s.channels)
            new_x.append(scalars + a_ss + a_sv * torch.stack([a @ b for a, b in zip(u.T, v.T, strict=True)]))
            new_vec.append(vectors + a_vv * u)
        x, vec = new_x, new_vec
    return torch.stack(x), torch.stack(vec)


@pytest.mark.parametrize(
    "change", [{}, {"layers": 3, "cutoff": 2.5, "max_neighbours": 3, "radial_functions": 5}], ids=["", "few neighbours"]
)
def test_published_arithmetic(change):
    """The vectorised layers against the loops over edges: outputs, and every parameter's gradient."""
    settings = painn.TINY.model_copy(update=change)
    model = type("Built", (EncoderContract,), {"settings": settings})().build()
    numbers, positions, ptr = molecules((5, 1, 3))
    torch.manual_seed(1)
    weights = torch.randn(9, 16, dtype=torch.float64), torch.randn(9, 3, 16, dtype=torch.float64)
    results = []
    for forward in (model, lambda *inputs: by_edge(model, *inputs)):
        outputs = forward(numbers, positions, ptr)
        total = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        results.append([*outputs, *torch.autograd.grad(total, list(model.parameters()))])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def test_second_derivative_where_atoms_coincide():
    """Losses on forces and of 3D-EMGP take it."""
    model = type("Built", (EncoderContract,), {"settings": painn.TINY})().build()
    positions = torch.tensor([[0.0, 0, 0], [0, 0, 0], [1, 0, 0.5]], dtype=torch.float64, requires_grad=True)
    scalars, _ = model(torch.tensor([6, 1, 8]), positions, torch.tensor([0, 3]))
    (slope,) = torch.autograd.grad(scalars.square().sum(), positions, create_graph=True)
    gradients = torch.autograd.grad(slope.square().sum(), [positions, *model.parameters()], materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in (slope, *gradients))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_basis_near_and_far(dtype, tolerance):
    """Values and two derivatives of sin(k π r / c) / r, where its series takes over too."""
    distance = torch.cat([torch.logspace(-9, -1, 60, dtype=dtype), torch.linspace(0.2, 5, 40, dtype=dtype)])
    distance = distance.requires_grad_()
    found = painn.SineBasis(20, 5.0).evaluate(distance)
    (slope,) = torch.autograd.grad(found.sum(), distance, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), distance)
    r = distance.detach().double()[:, None]
    frequency = math.pi / 5 * torch.arange(1, 21, dtype=torch.float64)
    expected = frequency * torch.sinc(r * frequency / math.pi)
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
    x = r * frequency
    near = x < 0.05
    series = -(frequency**3) * (1 / 3 - x.square() / 10 + x**4 / 168)
    exact = frequency**3 * ((2 - x.square()) * torch.sin(x) / x**3 - 2 * torch.cos(x) / x.square())
    second = torch.where(near, series, exact).sum(1)
    assert (bend - second).abs().max() < 1e3 * tolerance * second.abs().max()


def test_published_size():
    """With the published code's table of 100 elements and head, F -> F / 2 -> 1, the 600 k that the paper states."""
    model = encoders.build(painn.QM9)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    f, k = 128, 20
    assert parts.pop("embedding") == 119 * f
    assert parts == {
        "filters": 3 * 3 * f * (k + 1),
        "messages": 3 * (4 * f * f + 4 * f),
        "updates": 3 * (7 * f * f + 4 * f),
    }
    assert sum(parts.values()) + 100 * f + (f + 1) * f // 2 + f // 2 + 1 == 589_057
