"""PaiNN, the polarizable atom interaction network (Schütt, Unke & Gastegger, ICML 2021).

Legend: n atoms, e edges, P pairs, F channels, K radial functions.
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn

from mspt import kernels
from mspt.chemistry.elements import MAX_NUMBER
from mspt.models.layers import linear
from mspt.settings import Settings


class PaiNNSettings(Settings):
    """layers: interactions, each a message and an update. radial_functions: sines. cutoff: Å.

    max_neighbours: nearest ones kept. The published model keeps all within the cut-off, and no molecule has as many
    within 5 Å as the default.
    """

    gives_vectors: ClassVar[bool] = True
    name: Literal["painn"] = "painn"
    layers: int = Field(3, ge=1)
    channels: int = Field(128, ge=1)
    radial_functions: int = Field(20, ge=1)
    cutoff: float = Field(5.0, gt=0)
    max_neighbours: int = Field(128, ge=1)


QM9 = PaiNNSettings()
TINY = PaiNNSettings(layers=2, channels=16, radial_functions=8)


class SineBasis(NamedTuple):
    """K functions sin(k π r / cutoff) / r, k = 1 … K (Klicpera et al., ICLR 2020, without their constant factor)."""

    functions: int
    cutoff: float
    knots: None = None  # filters are evaluated at every distance

    def evaluate(self, distance):
        """distance [P] Å -> [P, K] Å⁻¹."""
        order = torch.arange(1, self.functions + 1, dtype=distance.dtype, device=distance.device)
        frequency = math.pi / self.cutoff * order
        x = distance[:, None] * frequency
        # torch.sinc has no second derivative at zero.
        small = x < 0.01
        square = torch.where(small, x, 0.0).square()
        series = 1 - square / 6 * (1 - square / 20 * (1 - square / 42))
        apart = torch.where(small, 1.0, x)
        return frequency * torch.where(small, series, torch.sin(apart) / apart)


class PaiNN(nn.Module):
    """Parameters may be of low precision: distances and sums over edges are not."""

    def __init__(self, settings):
        super().__init__()
        self.settings = settings
        channels, layers = settings.channels, settings.layers
        self.basis = SineBasis(settings.radial_functions, settings.cutoff)
        self.embedding = nn.Embedding(MAX_NUMBER + 1, channels)
        self.filters = linear(settings.radial_functions, 3 * channels * layers)
        self.messages = nn.ModuleList(Message(channels) for _ in range(layers))
        self.updates = nn.ModuleList(Update(channels) for _ in range(layers))

    def forward(self, numbers, positions, ptr):
        """numbers [n], positions [n, 3] Å, ptr [m + 1] -> scalars [n, F], vectors [n, 3, F]."""
        settings = self.settings
        x = self.embedding(numbers)
        graph = kernels.radius_graph(positions, ptr, settings.cutoff, settings.max_neighbours, loop=False)
        geometry = kernels.pair_geometry(positions, graph, self.basis, x.dtype)
        filters = self.filters(self.basis.evaluate(geometry.distance).to(x.dtype)) * geometry.fade[:, None]
        vec = None  # stands for zeros, which the first layer need not send
        for message, update, of_layer in zip(
            self.messages, self.updates, filters.chunk(settings.layers, 1), strict=True
        ):
            x, vec = update(*message(x, vec, of_layer, graph, geometry))
        return x, vec


class Message(nn.Module):
    """Sums over neighbours of their scalars and vectors, filtered by distance, and of directions (eqs. 7 and 8)."""

    def __init__(self, channels):
        super().__init__()
        self.sent = nn.Sequential(linear(channels, channels), nn.SiLU(), linear(channels, 3 * channels))

    def forward(self, x, vec, filters, graph, geometry):
        """x [n, F], vec [n, 3, F] or None for zeros, filters [P, 3F] -> both with the sums added."""
        wide = filters.dtype  # float32 at least
        heard = None if vec is None else vec.to(wide)
        scalars, vectors = kernels.filtered_messages(self.sent(x).to(wide), heard, filters, graph, geometry.direction)
        vectors = vectors.to(x.dtype)
        return x + scalars.to(x.dtype), vectors if vec is None else vec + vectors


class Update(nn.Module):
    """An atom's scalars and vectors mixed: U v scaled, ⟨U v, V v⟩ and ‖V v‖ into scalars (eqs. 9 and 10)."""

    epsilon = 1e-8  # under the root of the length, as in the published code, so that it has a gradient at zero

    def __init__(self, channels):
        super().__init__()
        self.mix = linear(channels, 2 * channels, bias=False)
        self.scales = nn.Sequential(linear(2 * channels, channels), nn.SiLU(), linear(channels, 3 * channels))

    def forward(self, x, vec):
        """x [n, F], vec [n, 3, F] -> both after the update."""
        v, u = self.mix(vec).chunk(2, 2)
        length = (v.square().sum(1) + self.epsilon).sqrt()
        scalar, vector, product = self.scales(torch.cat([x, length], 1)).chunk(3, 1)
        return x + scalar + product * (u * v).sum(1), vec + vector[:, None] * u
