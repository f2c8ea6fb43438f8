"""TorchMD-Net's equivariant transformer (Thölke & De Fabritiis, ICLR 2022).

Legend: n atoms, F channels, H heads, D = F / H, K radial functions.
"""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from mspt import kernels
from mspt.chemistry.elements import MAX_NUMBER
from mspt.settings import Settings


class TorchMDETSettings(Settings):
    """norm: `whitened`, a layer norm on scalars and a whitened norm on vectors after every layer and at the end (the
    published QM9 model), or `none`, a layer norm on scalars at the end alone (the MD17 model). `whitened_published`
    regularises the covariance by ε diag(1, 2, 3), as the published code does to keep its SVD's gradient finite, and is
    not equivariant where vectors are small; `whitened` by 2 ε, the mean of the three, and is. Both give every direction
    the same spread: where a molecule is exactly flat, rounding off its plane grows by up to 1 / √ε a layer.

    cutoff: Å. max_neighbours: nearest ones kept, the atom itself among them. vector_cutoff: vector messages fade out
    towards the cut-off, so that forces do not jump when an atom crosses it; as published they do not.
    """

    name: Literal["torchmd_et"] = "torchmd_et"
    layers: int = Field(8, ge=1)
    channels: int = Field(256, ge=1)
    heads: int = Field(8, ge=1)
    radial_functions: int = Field(64, ge=2)
    cutoff: float = Field(5.0, gt=0)
    max_neighbours: int = Field(32, ge=1)
    norm: Literal["whitened", "whitened_published", "none"] = "whitened"
    vector_cutoff: bool = False

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.channels % self.heads:
            raise ValueError(f"channels ({self.channels}) must be a multiple of heads ({self.heads})")
        return self


QM9 = TorchMDETSettings(norm="whitened_published")
MD17 = TorchMDETSettings(layers=6, channels=128, radial_functions=32, norm="none")
TINY = TorchMDETSettings(layers=2, channels=16, heads=2, radial_functions=8)


class TorchMDET(nn.Module):
    """Parameters may be of low precision: distances and radial functions stay in the positions' type."""

    def __init__(self, settings):
        super().__init__()
        self.settings = settings
        channels, functions = settings.channels, settings.radial_functions
        self.embedding = nn.Embedding(MAX_NUMBER + 1, channels)
        self.neighbours = NeighbourEmbedding(channels, functions)
        self.layers = nn.ModuleList(Layer(settings) for _ in range(settings.layers))
        self.norms, self.vector_norms = nn.ModuleList(), nn.ModuleList()
        if settings.norm != "none":
            regular = (2.0, 2.0, 2.0) if settings.norm == "whitened" else (1.0, 2.0, 3.0)
            self.norms.extend(nn.LayerNorm(channels) for _ in range(settings.layers))
            self.vector_norms.extend(WhitenedNorm(channels, regular) for _ in range(settings.layers + 1))
        self.out_norm = nn.LayerNorm(channels)

    def basis(self, device):
        """The fixed radial basis: μ even in [e^{−cutoff}, 1], β = (2 / K (1 − e^{−cutoff}))^{−2}."""
        settings = self.settings
        first = math.exp(-settings.cutoff)
        means = torch.linspace(first, 1, settings.radial_functions, dtype=torch.float64, device=device)
        return kernels.RadialBasis(means, (2 / settings.radial_functions * (1 - first)) ** -2, settings.cutoff)

    def forward(self, numbers, positions, ptr):
        """numbers [n], positions [n, 3] Å, ptr [m + 1] -> scalars [n, F], vectors [n, 3, F]."""
        settings, basis = self.settings, self.basis(positions.device)
        graph = kernels.radius_graph(positions, ptr, settings.cutoff, settings.max_neighbours, loop=True)
        x = self.neighbours(numbers, self.embedding(numbers), positions, basis, graph)
        vec = x.new_zeros(len(numbers), 3, settings.channels)
        for index, layer in enumerate(self.layers):
            dx, dvec = layer(x, vec, positions, basis, graph)
            x, vec = x + dx, vec + dvec
            if self.norms:
                x, vec = self.norms[index](x), self.vector_norms[index](vec)
        if self.norms:
            vec = self.vector_norms[-1](vec)
        return self.out_norm(x), vec


class NeighbourEmbedding(nn.Module):
    """An atom's embedding joined with those of its neighbours, filtered by distance (eqs. 3 and 4)."""

    def __init__(self, channels, functions):
        super().__init__()
        self.embedding = nn.Embedding(MAX_NUMBER + 1, channels)
        self.filter_weight, self.filter_bias = _gate(functions, [channels])
        self.combine = _linear(2 * channels, channels)

    def forward(self, numbers, x, positions, basis, graph):
        features = self.embedding(numbers)
        around = kernels.neighbour_embedding(positions, features, self.filter_weight, self.filter_bias, basis, graph)
        return self.combine(torch.cat([x, around], 1))


class Layer(nn.Module):
    """Attention over neighbours and the update of scalars and vectors (eqs. 5 to 11)."""

    def __init__(self, settings):
        super().__init__()
        channels, functions = settings.channels, settings.radial_functions
        self.heads, self.vector_cutoff = settings.heads, settings.vector_cutoff
        self.norm = nn.LayerNorm(channels)
        self.q = _linear(channels, channels)
        self.k = _linear(channels, channels)
        self.v = _linear(channels, 3 * channels)
        self.gate_weight, self.gate_bias = _gate(functions, [channels, 3 * channels])
        self.o = _linear(channels, 3 * channels)
        self.vectors = _linear(channels, 3 * channels, bias=False)

    def forward(self, x, vec, positions, basis, graph):
        """x [n, F], vec [n, 3, F] -> their changes."""
        x = self.norm(x)
        n, width = len(x), x.shape[1] // self.heads
        q, k = self.q(x).view(n, self.heads, width), self.k(x).view(n, self.heads, width)
        v = self.v(x).view(n, self.heads, 3 * width)
        message, dvec = kernels.radius_graph_attention(
            q, k, v, vec, positions, self.gate_weight, self.gate_bias, basis, graph, self.vector_cutoff
        )
        o1, o2, o3 = self.o(message).chunk(3, dim=-1)
        u1, u2, u3 = self.vectors(vec).chunk(3, dim=-1)
        return (u1 * u2).sum(1) * o2 + o3, u3 * o1[:, None] + dvec


class WhitenedNorm(nn.Module):
    """kernels.whiten with a learned weight a channel. regular: what is added to the covariance's diagonal, times ε."""

    epsilon = 1e-5

    def __init__(self, channels, regular):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.regular = tuple(self.epsilon * value for value in regular)

    def forward(self, vec):
        return kernels.whiten(vec, self.weight, self.regular)


def _linear(inputs, outputs, bias=True):
    """A linear layer with the published initial values: Xavier weights, zero biases."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _gate(functions, blocks):
    """Weight [sum of blocks, functions] and zero bias of linear maps of the radial functions, laid end to end.

    Each block has the initial values of a layer of its own. They are not layers because a kernel applies them: the
    module that calls it owns them, so that an engine that shards parameters gathers them in time.
    """
    weight = torch.cat([nn.init.xavier_uniform_(torch.empty(rows, functions)) for rows in blocks])
    return nn.Parameter(weight), nn.Parameter(torch.zeros(sum(blocks)))
