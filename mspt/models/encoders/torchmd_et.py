"""TorchMD-Net's equivariant transformer (Thölke & De Fabritiis, ICLR 2022).

Legend: n atoms, F channels, H heads, D = F / H, K radial functions.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from mspt import kernels
from mspt.chemistry.elements import MAX_NUMBER
from mspt.models.layers import Linear, linear
from mspt.settings import Settings


class TorchMDETSettings(Settings):
    """norm: `whitened`, a layer norm on scalars and a whitened norm on vectors after every layer and at the end (the
    published QM9 model), or `none`, a layer norm on scalars at the end alone (the MD17 model). `whitened_published`
    regularises the covariance by ε diag(1, 2, 3), as the published code does to keep its SVD's gradient finite, and is
    not equivariant where vectors are small; `whitened` by 2 ε, the mean of the three, and is. Both give every direction
    the same spread: where a molecule is exactly flat, rounding off its plane grows by up to 1 / √ε a layer.

    cutoff: Å. max_neighbours: nearest ones kept, the atom itself among them. vector_cutoff: vector messages fade out
    towards the cut-off, so that forces do not jump when an atom crosses it; as published they do not.

    gates: the radial gates, functions of the distance alone, are read off a spline through their values at knots, of
    which there are so many for each radial function (at 6 their relative error is 1e-6 and their slope's 6e-5), or
    evaluated at every distance (`direct`; knots mean nothing then).
    """

    gives_vectors: ClassVar[bool] = True
    name: Literal["torchmd_et"] = "torchmd_et"
    layers: int = Field(8, ge=1)
    channels: int = Field(256, ge=1)
    heads: int = Field(8, ge=1)
    radial_functions: int = Field(64, ge=2)
    cutoff: float = Field(5.0, gt=0)
    max_neighbours: int = Field(32, ge=1)
    norm: Literal["whitened", "whitened_published", "none"] = "whitened"
    vector_cutoff: bool = False
    gates: Literal["tabulated", "direct"] = "tabulated"
    knots_per_function: int = Field(6, ge=4)

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.channels % self.heads:
            raise ValueError(f"channels ({self.channels}) must be a multiple of heads ({self.heads})")
        return self


QM9 = TorchMDETSettings(norm="whitened_published")
MD17 = TorchMDETSettings(layers=6, channels=128, radial_functions=32, norm="none")
TINY = TorchMDETSettings(layers=2, channels=16, heads=2, radial_functions=8)


class TorchMDET(nn.Module):
    """Parameters may be of low precision: distances and radial functions do not."""

    def __init__(self, settings):
        super().__init__()
        self.settings = settings
        channels, functions = settings.channels, settings.radial_functions
        knots = settings.knots_per_function * functions if settings.gates == "tabulated" else None
        self.basis = kernels.RadialBasis(functions, settings.cutoff, knots)
        self.embedding = nn.Embedding(MAX_NUMBER + 1, channels)
        self.neighbours = NeighbourEmbedding(channels, functions)
        self.layers = nn.ModuleList(Layer(settings) for _ in range(settings.layers))
        self.norms, self.vector_norms = nn.ModuleList(), nn.ModuleList()
        if settings.norm != "none":
            regular = (2.0, 2.0, 2.0) if settings.norm == "whitened" else (1.0, 2.0, 3.0)
            self.norms.extend(nn.LayerNorm(channels) for _ in range(settings.layers))
            self.vector_norms.extend(WhitenedNorm(channels, regular) for _ in range(settings.layers + 1))
        self.out_norm = nn.LayerNorm(channels)

    def forward(self, numbers, positions, ptr):
        """numbers [n], positions [n, 3] Å, ptr [m + 1] -> scalars [n, F], vectors [n, 3, F]."""
        settings, basis = self.settings, self.basis
        graph = kernels.radius_graph(positions, ptr, settings.cutoff, settings.max_neighbours, loop=True)
        geometry = kernels.pair_geometry(positions, graph, basis, self.embedding.weight.dtype)
        x = self.neighbours(numbers, self.embedding(numbers), basis, graph, geometry)
        vec = None  # stands for zeros, which the first layer need not multiply
        for index, layer in enumerate(self.layers):
            x, vec = layer(x, vec, basis, graph, geometry)
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
        self.filter_weight, self.filter_bias = _stacked(functions, [channels])
        self.combine = linear(2 * channels, channels)

    def forward(self, numbers, x, basis, graph, geometry):
        around = kernels.neighbour_embedding(
            numbers, self.embedding.weight, self.filter_weight, self.filter_bias, basis, graph, geometry
        )
        return self.combine(torch.cat([x, around], 1))


class Layer(nn.Module):
    """Attention over neighbours and the update of scalars and vectors (eqs. 5 to 11).

    Rows of the joint maps are ordered by head. qkv: query, key, and three parts of the value, D each; gates: of the
    key and of the three parts of the value.
    """

    def __init__(self, settings):
        super().__init__()
        channels, functions = settings.channels, settings.radial_functions
        self.heads, self.vector_cutoff = settings.heads, settings.vector_cutoff
        self.norm = nn.LayerNorm(channels)
        self.qkv = Linear(channels, 5 * channels, heads=settings.heads)
        self.qkv.weight, self.qkv.bias = _stacked(channels, [channels, channels, 3 * channels], settings.heads)
        self.gate_weight, self.gate_bias = _stacked(functions, [channels, 3 * channels], settings.heads)
        self.o = linear(channels, 3 * channels)
        self.vectors = linear(channels, 3 * channels, bias=False)

    def forward(self, x, vec, basis, graph, geometry):
        """x [n, F], vec [n, 3, F] or None for zeros -> both after the layer."""
        qkv = self.qkv(self.norm(x))
        table = kernels.gate_table(self.gate_weight, self.gate_bias, self.heads, basis, geometry)
        message, summed = kernels.radius_graph_attention(qkv, vec, table, graph, geometry, self.vector_cutoff)
        # Without vectors their map has nothing to do; the zero keeps its weight in the graph on every rank.
        projected = self.vectors(vec) if vec is not None else None
        outputs = self.o(message) if vec is not None else self.o(message) + 0.0 * self.vectors.weight.sum()
        return kernels.update(x, summed, outputs, projected)


class WhitenedNorm(nn.Module):
    """kernels.whiten with a learned weight a channel. regular: what is added to the covariance's diagonal, times ε."""

    epsilon = 1e-5

    def __init__(self, channels, regular):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.regular = tuple(self.epsilon * value for value in regular)

    def forward(self, vec):
        return kernels.whiten(vec, self.weight, self.regular)


def _stacked(inputs, blocks, heads=1):
    """Weight [sum of blocks, inputs] and zero bias of linear maps, their rows laid end to end within each head.

    Each block has the initial values of a layer of its own. They are not layers because a kernel applies them: the
    module that calls it owns them, so that an engine that shards parameters gathers them in time.
    """
    parts = [nn.init.xavier_uniform_(torch.empty(rows, inputs)).view(heads, -1, inputs) for rows in blocks]
    return nn.Parameter(torch.cat(parts, 1).flatten(0, 1)), nn.Parameter(torch.zeros(sum(blocks)))
