"""Transformer-M: one transformer over a molecule's atoms, their positions and their bonds (Luo et al., ICLR 2023).

What is known of two atoms comes in as a bias of their attention, the same in every layer: of positions, Gaussian
functions of the distance; of bonds, the length of the shortest path and the types of its first bonds. Atoms also get
the sum of their Gaussian functions and their number of bonds. Either may be hidden from a molecule.

Molecules are padded to the largest of the batch, N atoms: time and memory of attention go with m N². Functions of
the distance, which cost more, are taken of the p pairs of atoms that are there.

Legend: m molecules, n atoms, N atoms of the largest, p ordered pairs of atoms of one molecule (an
atom with itself among them), b bonds, F channels, H heads, D = F / H, K Gaussian functions.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn.functional import gelu

from mspt.chemistry.elements import MAX_NUMBER
from mspt.data.batch import Bonds
from mspt.models.encoders.bond_paths import KINDS, bond_paths
from mspt.settings import Settings

# What a molecule is seen by; one without a list of bonds is always seen by its positions.
BOTH, BONDS, POSITIONS = 0, 1, 2
DEGREES = 16  # an atom of more bonds counts as one of so many


class Modes(Settings):
    """How often a molecule with known bonds is seen by both, by its bonds alone and by its positions alone.

    The paper calls these p(2D & 3D), p(2D) and p(3D); drawn for each molecule and epoch in training. Where nothing is
    drawn, both are seen. Defaults: those of the public code's training command.
    """

    both: float = Field(0.2, ge=0)
    bonds: float = Field(0.2, ge=0)
    positions: float = Field(0.6, ge=0)

    @model_validator(mode="after")
    def _sum(self):
        if abs(self.both + self.bonds + self.positions - 1) > 1e-6:
            raise ValueError(f"both, bonds and positions ({self.both}, {self.bonds}, {self.positions}) must sum to 1")
        return self

    def drawn(self, records, generator):
        """A mode for each record: int64 [m], the same wherever the record is processed."""
        value = generator.uniform("modes", records, torch.zeros_like(records), 1, torch.float64)[:, 0]
        return (value >= self.both).long() + (value >= self.both + self.bonds).long()


class TransformerMSettings(Settings):
    """gaussians: functions K of the distance. longest_path: bonds; longer paths and none at all share one bias.

    typed_bonds: how many of a path's first bonds count by their types. modes: what is seen in training.
    """

    gives_vectors: ClassVar[bool] = True
    cutoff: ClassVar[None] = None  # every two atoms of a molecule are neighbours
    name: Literal["transformer_m"] = "transformer_m"
    layers: int = Field(12, ge=1)
    channels: int = Field(768, ge=1)
    heads: int = Field(32, ge=1)
    feed_forward: int = Field(768, ge=1)
    gaussians: int = Field(128, ge=1)
    longest_path: int = Field(20, ge=1)
    typed_bonds: int = Field(5, ge=1)
    modes: Modes = Modes()

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.channels % self.heads:
            raise ValueError(f"channels ({self.channels}) must be a multiple of heads ({self.heads})")
        return self


L12 = TransformerMSettings()
L18 = TransformerMSettings(layers=18)
TINY = TransformerMSettings(layers=2, channels=16, heads=2, feed_forward=16, gaussians=8)


class TransformerM(nn.Module):
    """Parameters may be of low precision: distances, functions of them and the softmax are not.

    Without the published dropout and stochastic depth. Atoms are known by their elements alone, and bonds by their
    types, where the published model has the nine and three features of the Open Graph Benchmark.
    """

    sees_bonds = True  # takes bonds and modes beside what every encoder takes

    def __init__(self, settings):
        super().__init__()
        self.settings = settings
        channels = settings.channels
        self.elements = nn.Embedding(MAX_NUMBER + 1, channels)
        self.degrees = nn.Embedding(DEGREES + 1, channels)
        self.token = nn.Parameter(torch.empty(channels))
        self.by_distance = DistanceBias(settings)
        self.by_path = PathBias(settings)
        self.token_bias = nn.Parameter(torch.empty(settings.heads))
        self.norm = nn.LayerNorm(channels)
        self.layers = nn.ModuleList(Layer(settings) for _ in range(settings.layers))
        self.directions = Directions(settings)
        for parameter in (self.token, self.token_bias):
            nn.init.normal_(parameter, std=0.02)
        self.apply(_initialise)

    def forward(self, numbers, positions, ptr, bonds=None, modes=None):
        """numbers [n], positions [n, 3] Å, ptr [m + 1] -> scalars [n, F], vectors [n, 3, F].

        bonds: the Bonds of the molecules, or None where none are known. modes: int64 [m] of BOTH, BONDS and POSITIONS;
        None: both. Molecules that are seen by their bonds alone get vectors of zeros.
        """
        sizes = ptr.diff()
        count, largest = len(sizes), int(sizes.max()) if len(sizes) else 0
        molecule = torch.repeat_interleave(torch.arange(count, device=ptr.device), sizes)
        at = molecule, torch.arange(len(numbers), device=ptr.device) - ptr[molecule]

        def padded(values):
            return values.new_zeros(count, largest, *values.shape[1:]).index_put(at, values)

        present = padded(torch.ones_like(numbers, dtype=torch.bool))
        if bonds is None:
            none = numbers.new_zeros(0)
            bonds = Bonds(none.view(0, 2), none, present.new_zeros(count))
        modes = torch.zeros_like(sizes) if modes is None else modes
        flat, spatial = bonds.known & (modes != POSITIONS), ~(bonds.known & (modes == BONDS))

        degree, hops, shares = bond_paths(bonds, at, count, largest, self.settings)
        units, features, near = self.by_distance(padded(positions.double()), padded(numbers), present)
        x = self.elements(padded(numbers)) + self.degrees(degree.clamp(max=DEGREES)) * flat[:, None, None]
        x = x + (0.01 * spatial)[:, None, None].to(x.dtype) * features
        x = torch.cat([self.token.expand(count, 1, -1), x.to(self.token.dtype)], 1)
        between = near * spatial[:, None, None, None] + self.by_path(hops, shares) * flat[:, None, None, None]
        bias = self._with_token(between, present)
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, bias)
        x = x[:, 1:]
        vectors = self.directions(x, bias[:, :, 1:, 1:], units * spatial[:, None, None, None])
        return x[at], vectors[at]

    def _with_token(self, between, present):
        """Biases between atoms [m, N, N, H] -> of token and atoms [m, H, 1 + N, 1 + N]; none looks at padding."""
        token = self.token_bias.to(between.dtype)
        count, largest = present.shape
        column = torch.cat([token.expand(count, largest, 1, -1), between], 2)
        bias = torch.cat([token.expand(count, 1, largest + 1, -1), column], 1).permute(0, 3, 1, 2)
        hidden = torch.cat([present.new_zeros(count, 1), ~present], 1)
        # Not −∞: a molecule without atoms would have a softmax over nothing else.
        return bias.masked_fill(hidden[:, None, None], -1e9)


class DistanceBias(nn.Module):
    """Gaussian functions of a d + b, where a and b are sums of what the elements of the two atoms say."""

    def __init__(self, settings):
        super().__init__()
        count = settings.gaussians
        self.scale = nn.Parameter(torch.ones(2, MAX_NUMBER + 1))
        self.shift = nn.Parameter(torch.zeros(2, MAX_NUMBER + 1))
        self.means = nn.Parameter(torch.empty(count).uniform_(0, 3))
        self.widths = nn.Parameter(torch.empty(count).uniform_(0, 3))
        self.first, self.second = nn.Linear(count, count), nn.Linear(count, settings.heads)
        self.centrality = nn.Linear(count, settings.channels)

    def forward(self, positions, numbers, present):
        """positions [m, N, 3], numbers [m, N], present [m, N] -> of atoms i and j

        d / (|d| + 10⁻⁵) for d = x_j − x_i [m, N, N, 3]; features of the atoms [m, N, F]; biases [m, N, N, H]. Both in
        float32 at least, the biases too. Zeros where there is no atom.
        """
        dtype = self.first.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        pair = (present[:, :, None] & present[:, None]).nonzero(as_tuple=True)
        one, other = (pair[0], pair[1]), (pair[0], pair[2])
        offset = positions[other] - positions[one]
        squared = offset.square().sum(-1)
        apart = squared > 0
        # The root of zero has no gradient: there, the root of a constant is taken instead.
        distance = torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)
        scale, shift = (
            table[0].to(wide)[numbers][one] + table[1].to(wide)[numbers][other] for table in (self.scale, self.shift)
        )
        functions = self.gaussians(scale * distance.to(wide) + shift)
        bias = self.second(gelu(self.first(functions.to(dtype))))
        units = (offset / (distance + 1e-5)[:, None]).to(wide)
        around = functions.new_zeros(*present.shape, functions.shape[1]).index_put(one, functions, accumulate=True)

        def padded(values):
            return values.new_zeros(*present.shape, present.shape[1], values.shape[1]).index_put(pair, values)

        return padded(units), self.centrality(around.to(dtype)), padded(bias.to(wide))

    def gaussians(self, x):
        """The functions of x [p], normal densities with means and widths of their own: [p, K]."""
        inverse = 1 / (self.widths.to(x.dtype).abs() + 1e-2)
        z = (x[:, None] - self.means.to(x.dtype)) * inverse
        # Tails that float32 holds as denormals would slow a matrix product down tenfold: they end at e^{−40}.
        return torch.exp((-0.5 * z.square()).clamp(min=-40)) * (inverse / math.sqrt(2 * math.pi))


class PathBias(nn.Module):
    """Biases by the shortest path of bonds: one of its length, and the mean over its first bonds of one by their type.

    Each place on the path has a map of its own for the types (as in Graphormer, Ying et al., 2021).
    """

    def __init__(self, settings):
        super().__init__()
        self.lengths = nn.Embedding(settings.longest_path + 2, settings.heads)
        # No layer of its own, which an engine that shards parameters would gather only where it is called.
        self.kinds = nn.Parameter(torch.empty(KINDS, settings.heads))
        self.places = nn.Parameter(torch.empty(settings.typed_bonds, settings.heads, settings.heads))
        for parameter in (self.kinds, self.places):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, hops, shares):
        """hops [m, N, N], shares [m, N, N, typed · KINDS] (bond_paths) -> [m, N, N, H], in float32 at least."""
        wide = torch.promote_types(self.places.dtype, torch.float32)
        maps = (self.kinds.to(wide) @ self.places.to(wide)).flatten(0, 1)
        return self.lengths(hops).to(wide) + shares.to(wide) @ maps


class Attention(nn.Module):
    """Softmax attention of H heads with a bias."""

    def __init__(self, settings):
        super().__init__()
        self.heads = settings.heads
        self.qkv = nn.Linear(settings.channels, 3 * settings.channels)

    def forward(self, x, bias):
        """x [m, T, F], bias [m, H, T, T] -> weights [m, H, T, T] and values [m, H, T, D]."""
        queries, keys, values = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(2, 3)
        return torch.softmax(scores.to(bias.dtype) + bias, -1), values


class Layer(nn.Module):
    """Attention and two maps, a layer norm after each."""

    def __init__(self, settings):
        super().__init__()
        channels, inner = settings.channels, settings.feed_forward
        self.attention, self.out = Attention(settings), nn.Linear(channels, channels)
        self.first, self.second = nn.Linear(channels, inner), nn.Linear(inner, channels)
        self.norm, self.last_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)

    def forward(self, x, bias):
        weights, values = self.attention(x, bias)
        heard = (weights.to(values.dtype) @ values).transpose(1, 2).flatten(2)
        x = self.norm(x + self.out(heard))
        return self.last_norm(x + self.second(gelu(self.first(x))))


class Directions(nn.Module):
    """Vectors: attention once more, over the directions to the other atoms (the published head for noise).

    There a map of each Cartesian axis of its own follows, which turns with nothing; here the vectors are the result.
    """

    def __init__(self, settings):
        super().__init__()
        self.attention = Attention(settings)

    def forward(self, x, bias, units):
        """x [m, N, F], bias [m, H, N, N], units [m, N, N, 3] -> [m, N, 3, F]."""
        weights, values = self.attention(x, bias)
        turned = weights[:, :, None] * units.permute(0, 3, 1, 2)[:, None]  # [m, H, 3, N, N]
        vectors = turned.to(values.dtype) @ values[:, :, None]
        return vectors.permute(0, 3, 2, 1, 4).flatten(3)


def _initialise(module):
    """The published initial values of maps and tables; Gaussian functions keep those of their own layer."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
