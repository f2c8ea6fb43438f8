"""SphereNet: messages between edges that see distances, angles and torsions (Liu et al., ICLR 2022).

An edge j → i of the graph hears of every edge k → j with k ≠ i. Seen from j with the axis towards i, k lies at a polar
angle θ and at an azimuth; φ is the azimuth to the next neighbour of j around the axis, which stands for the torsion.
Mirror images differ: the next neighbour around the axis is another one there.

The energy surface jumps as two neighbours pass each other around an axis, or as one that is next to another leaves the
cut-off: then another neighbour is the next. With distances and angles alone nothing jumps.

Legend: n atoms, e edges, t triplets by k → j, F channels, K radial functions, S degrees of spherical functions.
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import silu

from mspt import kernels
from mspt.chemistry.elements import MAX_NUMBER
from mspt.models.encoders.bessel import bessel_roots, spherical_bessel
from mspt.models.layers import LentLinear
from mspt.settings import Settings


class SphereNetSettings(Settings):
    """cutoff: Å. max_neighbours: nearest ones kept; the triplets of an atom are as many as their square.

    spherical_functions: degrees S, 0 to S − 1. triplet_channels, output_channels: widths of the messages of triplets
    and of an atom's layers. basis_channels: width that a map of the basis goes through. envelope: the exponent p of the
    polynomial that fades the radial functions out.
    """

    gives_vectors: ClassVar[bool] = False
    name: Literal["spherenet"] = "spherenet"
    layers: int = Field(4, ge=1)
    channels: int = Field(128, ge=1)
    triplet_channels: int = Field(64, ge=1)
    basis_channels: int = Field(8, ge=1)
    output_channels: int = Field(256, ge=1)
    output_layers: int = Field(3, ge=1)
    radial_functions: int = Field(6, ge=1)
    spherical_functions: int = Field(7, ge=2)
    envelope: int = Field(6, ge=2)
    cutoff: float = Field(5.0, gt=0)
    max_neighbours: int = Field(32, ge=1)


QM9 = SphereNetSettings()
TINY = SphereNetSettings(
    layers=2, channels=16, triplet_channels=8, basis_channels=4, output_channels=16, output_layers=1,
    radial_functions=3, spherical_functions=3,
)  # fmt: skip


class SphereNet(nn.Module):
    """Scalars alone. Geometry and basis functions are taken in float64, whatever the type of the parameters."""

    def __init__(self, settings):
        super().__init__()
        self.settings = settings
        self.basis = Basis(settings)
        self.embedding = EdgeEmbedding(settings)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.outputs = nn.ModuleList(Output(settings) for _ in range(settings.layers + 1))

    def forward(self, numbers, positions, ptr):
        """numbers [n], positions [n, 3] Å, ptr [m + 1] -> scalars [n, F], None."""
        settings = self.settings
        graph = kernels.radius_graph(positions, ptr, settings.cutoff, settings.max_neighbours, loop=False)
        dtype = self.embedding.elements.weight.dtype
        basis = self.basis(positions.double(), graph, dtype)
        x = self.embedding(numbers, graph, basis.radial)
        scalars = self.outputs[0](x, basis.radial, graph, len(numbers))
        for block, output in zip(self.blocks, self.outputs[1:], strict=True):
            x = block(x, basis, graph)
            scalars = scalars + output(x, basis.radial, graph, len(numbers))
        return scalars, None


class Seen(NamedTuple):
    """What edges and triplets see of the geometry (eqs. 3 to 5 of the paper), in factors.

    radial [e, K]; spherical [e, S, K], Bessel functions of the distance; harmonics [t, S²]; begin [e + 1], where the
    triplets of an edge k → j begin, and outgoing [t], the edge j → i of each.
    """

    radial: Tensor
    spherical: Tensor
    harmonics: Tensor
    begin: Tensor
    outgoing: Tensor


class Basis(nn.Module):
    """The Seen of a graph."""

    def __init__(self, settings):
        super().__init__()
        self.cutoff, self.exponent = settings.cutoff, settings.envelope
        self.degrees, self.functions = settings.spherical_functions, settings.radial_functions
        self.frequencies = nn.Parameter(math.pi * torch.arange(1, self.functions + 1, dtype=torch.float32))

    def forward(self, positions, graph, dtype):
        # Once a pair, and not once an edge. Vectors are columns: sums over rows are the fast ones.
        distance, direction = safe_norm((positions[graph.second] - positions[graph.first]).T)
        pair, x = graph.pair.abs().long() - 1, distance / self.cutoff
        direction = -direction[:, pair] * graph.pair.sign()  # from an edge's source to its target
        met = kernels.triplets(direction, graph)
        axes, others = direction[:, met.outgoing], -direction[:, met.incoming]
        normals = torch.linalg.cross(axes, others, dim=0)
        reference = safe_norm(normals)[1][:, met.following]
        # cos θ, sin θ cos φ and sin θ sin φ: of these the harmonics are polynomials, smooth where θ is 0 and φ is not
        # defined.
        products = axes * others, normals * reference, torch.linalg.cross(normals, reference, dim=0) * axes
        return Seen(
            radial=self.radial(x).to(dtype)[pair],
            spherical=self.spherical(x).to(dtype)[pair],
            harmonics=kernels.spherical_harmonics(
                torch.stack([product.sum(0) for product in products]), self.degrees, dtype
            ),
            begin=met.begin,
            outgoing=met.outgoing,
        )

    def radial(self, x):
        """sin(f x) / x, faded out so that value, slope and curvature vanish at x = 1: [e, K]."""
        p, x = self.exponent, x[:, None]
        fade = 1 + x**p * (-(p + 1) * (p + 2) / 2 + x * (p * (p + 2) - x * p * (p + 1) / 2))
        frequencies = self.frequencies.to(x.dtype)
        apart = x > 0
        safe = torch.where(apart, x, 1.0)
        return fade * torch.where(apart, torch.sin(frequencies * safe) / safe, frequencies)

    def spherical(self, x):
        """Spherical Bessel functions with roots at x = 1, scaled to norm 1 (spherical.bessel_roots): [e, S, K]."""
        roots, factors = (part.to(x.device) for part in bessel_roots(self.degrees, self.functions))
        values = [spherical_bessel(row * x[:, None], order) for order, row in enumerate(roots)]
        return factors * torch.stack(values, 1)


def safe_norm(vectors):
    """Lengths [t] of vectors [3, t], and unit vectors; both zero, with zero gradient, where a vector is zero."""
    squared = vectors.square().sum(0)
    apart = squared > 0
    root = torch.where(apart, squared, 1.0).sqrt()
    return torch.where(apart, root, 0.0), vectors / root


class EdgeEmbedding(nn.Module):
    """The first features of an edge, from its two elements and its distance: [e, F]."""

    def __init__(self, settings):
        super().__init__()
        channels = settings.channels
        self.elements = nn.Embedding(MAX_NUMBER + 1, channels)
        nn.init.uniform_(self.elements.weight, -math.sqrt(3), math.sqrt(3))
        self.radial = nn.Linear(settings.radial_functions, channels)
        self.combine = nn.Linear(3 * channels, channels)

    def forward(self, numbers, graph, radial):
        elements = self.elements(numbers)
        parts = elements[graph.target], elements[graph.source], silu(self.radial(radial))
        return silu(self.combine(torch.cat(parts, 1)))


class Block(nn.Module):
    """Messages of the edges k → j to an edge j → i, and what becomes of its features."""

    def __init__(self, settings):
        super().__init__()
        channels, inner, basis = settings.channels, settings.triplet_channels, settings.basis_channels
        degrees, functions = settings.spherical_functions, settings.radial_functions

        def two_maps(inputs, outputs, kind=nn.Linear):
            return nn.Sequential(*(linear(*each, False, kind=kind) for each in ((inputs, basis), (basis, outputs))))

        self.radial = two_maps(functions, channels)
        self.angles = two_maps(degrees * functions, inner, LentLinear)
        self.torsions = two_maps(degrees**2 * functions, inner, LentLinear)
        self.incoming, self.own = linear(channels, channels), linear(channels, channels)
        self.down, self.up = linear(channels, inner, bias=False), linear(inner, channels, bias=False)
        self.before, self.combine = Residual(channels), linear(channels, channels)
        self.after = nn.Sequential(Residual(channels), Residual(channels))

    def forward(self, x, basis, graph):
        sent = silu(self.down(silu(self.incoming(x)) * self.radial(basis.radial)))
        weights = [layer()[0] for layer in (self.angles[0], self.torsions[0], self.angles[1], self.torsions[1])]
        heard = kernels.triplet_messages(
            sent, basis.harmonics, basis.spherical, *weights, basis.begin, basis.outgoing, graph.ptr
        )
        message = silu(self.own(x)) + silu(self.up(heard))
        return self.after(silu(self.combine(self.before(message))) + x)


class Output(nn.Module):
    """What an atom gets of the edges that end at it: [n, F]."""

    def __init__(self, settings):
        super().__init__()
        channels, width = settings.channels, settings.output_channels
        self.radial = linear(settings.radial_functions, channels, bias=False)
        self.up = linear(channels, width, zero_bias=False)
        self.layers = nn.ModuleList(linear(width, width) for _ in range(settings.output_layers))
        self.last = linear(width, channels, bias=False)

    def forward(self, x, radial, graph, atoms):
        x = self.up(summed(self.radial(radial) * x, graph.target, atoms))
        for layer in self.layers:
            x = silu(layer(x))
        return self.last(x)


class Residual(nn.Module):
    """x + two layers of it."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.second = linear(channels, channels), linear(channels, channels)

    def forward(self, x):
        return x + silu(self.second(silu(self.first(x))))


def summed(values, index, count):
    """Sums [count, …] of values [t, …] with the same index [t], in float32 at least."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return wide.new_zeros(count, values.shape[1]).index_add_(0, index, wide).to(values.dtype)


def linear(inputs, outputs, bias=True, zero_bias=True, kind=nn.Linear):
    """A linear layer with the published initial values: orthogonal, scaled to Glorot's variance; zero bias."""
    layer = kind(inputs, outputs, bias=bias)
    nn.init.orthogonal_(layer.weight)
    with torch.no_grad():
        variance = layer.weight.var() if layer.weight.numel() > 1 else torch.tensor(1.0)
        layer.weight *= torch.sqrt(2.0 / ((inputs + outputs) * variance))
        if bias and zero_bias:
            layer.bias.zero_()
    return layer
