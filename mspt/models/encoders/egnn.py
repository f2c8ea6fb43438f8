"""EGNN, the E(n)-equivariant graph network (Satorras, Hoogeboom & Welling, ICML 2021), as for molecules' properties:
positions stay as they are, messages are gated.

Legend: n atoms, e edges, P pairs, F channels.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import linear

from mspt import kernels
from mspt.chemistry.elements import MAX_NUMBER
from mspt.models.layers import LentLinear
from mspt.settings import Settings


class EGNNSettings(Settings):
    """cutoff: Å, towards which messages fade out; null joins every two atoms of a molecule, as published, so that edges
    grow with the square of its atoms. max_neighbours: nearest ones kept, where there is a cut-off.

    vectors: the published update of positions (eq. 4), one a channel, from the last layer's messages and along unit
    vectors, an option of the published code: with whole offsets far atoms count most, and denoising is learnt later.
    The published QM9 model moves no atoms and so has none.
    """

    name: Literal["egnn"] = "egnn"
    layers: int = Field(7, ge=1)
    channels: int = Field(128, ge=1)
    cutoff: float | None = Field(None, gt=0)
    max_neighbours: int = Field(128, ge=1)
    vectors: bool = True

    @property
    def gives_vectors(self):
        return self.vectors


QM9 = EGNNSettings(vectors=False)
TINY = EGNNSettings(layers=2, channels=16, cutoff=5.0)


class EGNN(nn.Module):
    """Parameters may be of low precision: distances and sums over edges are not.

    An atom starts from an embedding of its number. The published code maps one-hot ⊗ (Z / 9)^{0, 1, 2} of five elements
    linearly instead, which is an embedding too, with other initial values and a gradient shared between elements.
    """

    def __init__(self, settings):
        super().__init__()
        self.settings = settings
        channels = settings.channels
        # Messages see the distance itself: no radial functions.
        self.basis = kernels.RadialBasis(0, math.inf if settings.cutoff is None else settings.cutoff, None)
        self.embedding = nn.Embedding(MAX_NUMBER + 1, channels)
        self.layers = nn.ModuleList(Layer(channels) for _ in range(settings.layers))
        self.out = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.moves = None
        if settings.vectors:
            self.moves = nn.Sequential(
                nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels, bias=False)
            )

    def forward(self, numbers, positions, ptr):
        """numbers [n], positions [n, 3] Å, ptr [m + 1] -> scalars [n, F], vectors [n, 3, F] or None."""
        most = len(numbers) if self.settings.cutoff is None else self.settings.max_neighbours
        graph = kernels.radius_graph(positions, ptr, self.basis.cutoff, most, loop=False)
        x = self.embedding(numbers)
        geometry = kernels.pair_geometry(positions, graph, self.basis, x.dtype)
        pair = graph.pair.abs().long() - 1
        squared = geometry.distance.square().to(geometry.fade.dtype)[pair]
        fade = geometry.fade[pair]
        for layer in self.layers:
            x, *message = layer(x, squared, fade, graph)
        if self.moves is None:
            return self.out(x), None
        direction = -geometry.direction[pair] * graph.pair.sign()[:, None]  # from an edge's source to its target
        message = kernels.gated_messages(*message, fade)
        moves = self.moves(message.to(x.dtype)).to(fade.dtype) * fade[:, None]
        return self.out(x), kernels.sum_by_target(direction[..., None] * moves[:, None], graph).to(x.dtype)


class Layer(nn.Module):
    """Messages along edges, gated, and the update of atoms by their sum (eqs. 3, 5, 6 and 8).

    weight [F, 2F + 1], bias [F]: the first map of a message, of both atoms' scalars and the squared distance. It is
    applied in parts, so that what depends on an atom alone is multiplied once an atom and not once an edge.
    """

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Linear(2 * channels + 1, channels).parameters()
        self.message = nn.Linear(channels, channels)
        self.gate = LentLinear(channels, 1)
        self.update = nn.Sequential(nn.Linear(2 * channels, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, x, squared, fade, graph):
        """x [n, F], squared distances [e] Å², fade [e] -> x [n, F] after the layer; and what the messages are made of
        (reference.gated_messages): [e, F], and the gate's weight and bias.
        """
        of_target, of_source, of_squared = self.weight.split([x.shape[1], x.shape[1], 1], 1)
        target, source = linear(x, of_target, self.bias), linear(x, of_source)
        hidden = kernels.edge_features(target, source, of_squared[:, 0], squared, graph)
        message = self.message(hidden.to(x.dtype)), *self.gate()
        around = kernels.gated_sums(*message, fade, graph).to(x.dtype)
        return x + self.update(torch.cat([x, around], 1)), *message
