"""The equivariant transformer: the contract of every encoder, and the published arithmetic edge by edge."""

import math
from itertools import pairwise

import pytest
import torch
from encoder_contract import EncoderContract, molecules

from mspt import kernels
from mspt.models import encoders
from mspt.models.encoders import torchmd_et


class TestTorchMDET(EncoderContract):
    settings = torchmd_et.TINY.model_copy(update={"vector_cutoff": True})


class TestTorchMDETWithoutNorms(EncoderContract):
    settings = torchmd_et.TINY.model_copy(update={"vector_cutoff": True, "norm": "none"})


def by_edge(model, numbers, positions, ptr):
    """The forward pass as in the papers' equations, one edge after the other, with the model's parameters."""
    s, silu = model.settings, torch.nn.functional.silu
    n, width = len(numbers), s.channels // s.heads

    def fade(r):
        return 0.5 * (math.cos(math.pi * r / s.cutoff) + 1) if r < s.cutoff else 0.0

    def basis(r):
        first = math.exp(-s.cutoff)
        beta = (2 / s.radial_functions * (1 - first)) ** -2
        means = [first + k * (1 - first) / (s.radial_functions - 1) for k in range(s.radial_functions)]
        return torch.tensor(
            [fade(r) * math.exp(-beta * (math.exp(-5 / s.cutoff * r) - mean) ** 2) for mean in means],
            dtype=torch.float64,
        )

    def norm(layer, x):
        x = x - x.mean()
        return x / (x.square().mean() + 1e-5).sqrt() * layer.weight + layer.bias

    def whiten(layer, v):
        v = v - v.mean(-1, keepdim=True)
        u, values, _ = torch.linalg.svd(v @ v.T / s.channels + torch.diag(torch.tensor(layer.regular).double()))
        return (u / values.sqrt()) @ u.T @ v * layer.weight

    edges = {}  # target -> [(source, distance, unit direction)]
    for first, last in pairwise(ptr.tolist()):
        for i in range(first, last):
            found = [(i, 0.0, torch.zeros(3, dtype=torch.float64))]
            for j in range(first, last):
                offset = positions[j] - positions[i]
                r = float(offset.norm())
                if j != i and r < s.cutoff:
                    found.append((j, r, offset / r))
            edges[i] = sorted(found, key=lambda edge: edge[1])[: s.max_neighbours]

    block, x = model.neighbours, []
    for i in range(n):
        around = torch.zeros(s.channels, dtype=torch.float64)
        for j, r, _ in edges[i]:
            if j != i:
                filters = (block.filter_weight @ basis(r) + block.filter_bias) * fade(r)
                around = around + block.embedding.weight[numbers[j]] * filters
        x.append(block.combine(torch.cat([model.embedding.weight[numbers[i]], around])))
    vec = [torch.zeros(3, s.channels, dtype=torch.float64) for _ in range(n)]

    for index, layer in enumerate(model.layers):
        normed = [norm(layer.norm, row) for row in x]
        triples = 3 * width
        qkv = [layer.qkv(row).view(s.heads, 5 * width).split([width, width, triples], dim=1) for row in normed]
        new_x, new_vec = [], []
        for i in range(n):
            scalars, vectors = torch.zeros(s.channels).double(), torch.zeros(3, s.channels).double()
            for j, r, direction in edges[i]:
                gates = silu(layer.gate_weight @ basis(r) + layer.gate_bias).view(s.heads, 4 * width)
                for h in range(s.heads):
                    own = slice(h * width, (h + 1) * width)
                    score = (qkv[i][0][h] * qkv[j][1][h] * gates[h, :width]).sum()
                    value = qkv[j][2][h] * gates[h, width:]
                    scalars[own] += silu(score) * fade(r) * value[:width]
                    message = vec[j][:, own] * value[width : 2 * width] + direction[:, None] * value[2 * width :]
                    vectors[:, own] += message * (fade(r) if s.vector_cutoff else 1)
            o1, o2, o3 = layer.o(scalars).split(s.channels)
            u1, u2, u3 = layer.vectors(vec[i]).split(s.channels, dim=1)
            new_x.append(x[i] + (u1 * u2).sum(0) * o2 + o3)
            new_vec.append(vec[i] + u3 * o1 + vectors)
        x, vec = new_x, new_vec
        if s.norm != "none":
            x = [norm(model.norms[index], row) for row in x]
            vec = [whiten(model.vector_norms[index], row) for row in vec]
    if s.norm != "none":
        vec = [whiten(model.vector_norms[-1], row) for row in vec]
    return torch.stack([norm(model.out_norm, row) for row in x]), torch.stack(vec)


@pytest.mark.parametrize(
    "change",
    [
        {"norm": "none"},
        {"norm": "whitened"},
        {"norm": "whitened_published", "vector_cutoff": True},
        {"norm": "none", "cutoff": 2.5, "max_neighbours": 4, "heads": 1, "radial_functions": 5},
    ],
    ids=["none", "whitened", "whitened_published", "few_neighbours"],
)
def test_published_arithmetic(change):
    """The vectorised layers against the loops over edges: outputs, and without norms every parameter's gradient.

    With norms, the SVD's gradient is not finite for a single atom. Whitening enlarges rounding by up to 1 / √ε a layer
    where vectors are small.
    """
    settings = torchmd_et.TINY.model_copy(update=change | {"gates": "direct"})
    model = type("Built", (EncoderContract,), {"settings": settings})().build()
    numbers, positions, ptr = molecules((5, 1, 3))
    results, weights = [], None
    for forward in (model, lambda *inputs: by_edge(model, *inputs)):
        scalars, vectors = forward(numbers, positions, ptr)
        if weights is None:
            weights = torch.randn_like(scalars), torch.randn_like(vectors)
        total = (scalars * weights[0]).sum() + (vectors * weights[1]).sum()
        gradients = torch.autograd.grad(total, list(model.parameters())) if settings.norm == "none" else ()
        results.append([scalars, vectors, *gradients])
    tolerance = 1e-10 if settings.norm == "none" else 1e-6
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def test_initial_values_are_the_published_ones():
    """Xavier in the bounds of each projection by itself; zero biases."""
    torch.manual_seed(0)
    model = encoders.build(torchmd_et.MD17)
    channels, functions = 128, 32
    for layer in model.layers:
        assert all((bias == 0).all() for bias in (layer.qkv.bias, layer.gate_bias, layer.o.bias))
        width = channels // 8
        query, key, value = layer.qkv.weight.view(8, 5 * width, channels).split([width, width, 3 * width], dim=1)
        key_gate, value_gate = layer.gate_weight.view(8, 4 * width, functions).split([width, 3 * width], dim=1)
        for weight, fans in (
            (query, 2 * channels),
            (key, 2 * channels),
            (value, 4 * channels),
            (key_gate, functions + channels),
            (value_gate, functions + 3 * channels),
        ):
            bound = math.sqrt(6 / fans)
            assert 0.99 * bound < weight.abs().max() <= bound
    assert (model.neighbours.filter_bias == 0).all()


def test_presets():
    """The published sizes; parameters without the embeddings of elements, counted by hand."""
    for settings, layers, f, k, norms in ((torchmd_et.QM9, 8, 256, 64, 1), (torchmd_et.MD17, 6, 128, 32, 0)):
        assert (settings.layers, settings.channels, settings.heads, settings.radial_functions) == (layers, f, 8, k)
        assert (settings.cutoff, settings.max_neighbours) == (5.0, 32)
        model = encoders.build(settings)
        count = sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name)
        layer = 2 * f + 2 * (f * f + f) + 2 * (3 * f * f + 3 * f) + 3 * f * f + 4 * f * (k + 1) + norms * 3 * f
        assert count == layers * layer + f * (k + 1) + f * (2 * f + 1) + 2 * f + norms * f


def test_heads_must_divide_channels():
    with pytest.raises(ValueError, match="channels \\(10\\) must be a multiple of heads \\(4\\)"):
        torchmd_et.TorchMDETSettings(channels=10, heads=4)


def test_vectors_jump_at_the_cut_off_as_published_and_not_with_vector_cutoff():
    """The published value gate does not vanish at the cut-off once its bias is trained."""
    jumps = {}
    for smooth in (False, True):
        settings = torchmd_et.TINY.model_copy(update={"norm": "none", "vector_cutoff": smooth})
        model = type("Built", (EncoderContract,), {"settings": settings})().build()
        inside, outside = (
            model(
                torch.tensor([6, 1]), torch.tensor([[0.0, 0, 0], [x, 0, 0]], dtype=torch.float64), torch.tensor([0, 2])
            )
            for x in (settings.cutoff - 1e-6, settings.cutoff + 1e-6)
        )
        jumps[smooth] = (inside[1] - outside[1]).abs().max()
    assert jumps[True] < 1e-9
    assert jumps[False] > 1e-3


def test_under_the_compiler():
    """The encoder compiles around its search for neighbours, a layer in one graph; kernels are operators to both."""
    encoder = encoders.build(torchmd_et.TINY)
    numbers, positions, ptr = molecules()
    positions = positions.float()
    torch.manual_seed(0)
    weights = torch.randn(len(numbers), 16), torch.randn(len(numbers), 3, 16)

    def gradients(function):
        total = sum((out * w).sum() for out, w in zip(function(numbers, positions, ptr), weights, strict=True))
        return torch.autograd.grad(total, list(encoder.parameters()))

    compiled = torch.compile(encoder, backend="aot_eager")
    for one, other in zip(gradients(compiled), gradients(encoder), strict=True):
        torch.testing.assert_close(one, other)

    graph = kernels.radius_graph(positions, ptr, 5.0, 32, loop=True)
    geometry = kernels.pair_geometry(positions, graph, encoder.basis, torch.float32)
    layer = encoder.layers[1]
    inputs = *weights, encoder.basis, graph, geometry
    for one, other in zip(
        torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs), layer(*inputs), strict=True
    ):
        torch.testing.assert_close(one, other)
