"""SphereNet: messages between edges that see distances, angles and torsions (Liu et al., ICLR 2022).

An edge j → i of the graph hears of every edge k → j with k ≠ i. Seen from j with the axis towards i, k lies at a polar
angle θ and at an azimuth; φ is the azimuth to the next neighbour of j around the axis, which stands for the torsion.
Mirror images differ: the next neighbour around the axis is another one there.

The energy surface jumps as two neighbours pass each other around an axis, or as one that is next to another leaves the
cut-off: then another neighbour is the next. With distances and angles alone nothing jumps.

Legend: n atoms, e edges, t triplets, F channels, K radial functions, S degrees of spherical functions.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import silu

from mspt import kernels
from mspt.chemistry.elements import MAX_NUMBER
from mspt.models.encoders.spherical import bessel_roots, harmonics, spherical_bessel
from mspt.settings import Settings

# Neighbours as close as this in azimuth (radians) are passed over as one, and so are those as close to the axis: in a
# flat molecule rounding would choose between them.
SAME = 1e-5


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
        incoming, outgoing = triplets(graph)
        basis = self.basis(positions.double(), graph, incoming, outgoing, dtype)
        x = self.embedding(numbers, graph, basis[0])
        scalars = self.outputs[0](x, basis[0], graph, len(numbers))
        for block, output in zip(self.blocks, self.outputs[1:], strict=True):
            x = block(x, basis, incoming, outgoing)
            scalars = scalars + output(x, basis[0], graph, len(numbers))
        return scalars, None


def triplets(graph):
    """Edges k → j and j → i that meet, k ≠ i: their numbers, int64 [t] twice, by j → i."""
    begin, end = graph.ptr[graph.source], graph.ptr[graph.source + 1]
    outgoing = torch.repeat_interleave(end - begin)
    row = torch.arange(len(outgoing), device=outgoing.device) - (torch.cumsum(end - begin, 0) - (end - begin))[outgoing]
    incoming = begin[outgoing] + row
    apart = graph.source[incoming] != graph.target[outgoing]
    return incoming[apart], outgoing[apart]


def safe_norm(vectors):
    """Lengths [...] of vectors [..., 3], and unit vectors; both zero, with zero gradient, where a vector is zero."""
    squared = vectors.square().sum(-1)
    apart = squared > 0
    root = torch.where(apart, squared, 1.0).sqrt()
    return torch.where(apart, root, 0.0), vectors / root[..., None]


@torch.no_grad()
def next_around(axes, normals, outgoing):
    """The triplet [t] of the same edge j → i whose k comes next around the axis, in the sense of the right hand.

    axes: unit vectors from j to i [t, 3]. normals: axis × unit vector from j to k [t, 3]. A triplet without another k
    that is SAME neither as its own nor as the axis, gets itself.
    """
    least = torch.zeros_like(axes).scatter(1, axes.abs().argmin(1, keepdim=True), 1.0)
    zero = torch.linalg.cross(axes, least)
    azimuth = torch.atan2((torch.linalg.cross(zero, normals) * axes).sum(-1), (zero * normals).sum(-1))
    result = torch.arange(len(outgoing), device=outgoing.device)
    order = result[normals.norm(dim=-1) > SAME]
    order = order[azimuth[order].argsort()]
    order = order[outgoing[order].argsort(stable=True)]
    if not len(order):
        return result
    angle, count = azimuth[order], torch.unique_consecutive(outgoing[order], return_counts=True)[1]
    last = torch.cumsum(count, 0) - 1
    first = torch.repeat_interleave(last - count + 1, count)
    place = torch.arange(len(order), device=order.device)
    following = place + 1
    following[last] = first[last]
    gap = angle[following] - angle
    gap[last] += 2 * math.pi
    # The last of those at one azimuth is followed by another; its edge has one, since its gaps make up a turn.
    ends = torch.where(gap > SAME, place, len(place))
    ends = ends.flip(0).cummin(0).values.flip(0)
    beyond = ends > torch.repeat_interleave(last, count)
    ends = torch.where(beyond, ends[first], ends)
    result[order] = order[following[ends]]
    return result


class Basis(nn.Module):
    """What edges and triplets see of the geometry: [e, K], [t, S K] and [t, S² K] (eqs. 3 to 5 of the paper).

    Torsions: harmonic f of the S², in the order of spherical.harmonics, comes with the Bessel functions of order f mod
    S and not of its own degree, as in the public code.
    """

    def __init__(self, settings):
        super().__init__()
        self.cutoff, self.exponent = settings.cutoff, settings.envelope
        self.degrees, self.functions = settings.spherical_functions, settings.radial_functions
        self.frequencies = nn.Parameter(math.pi * torch.arange(1, self.functions + 1, dtype=torch.float32))

    def forward(self, positions, graph, incoming, outgoing, dtype):
        distance, direction = safe_norm(positions[graph.target] - positions[graph.source])
        x = distance / self.cutoff
        axes, others = direction[outgoing], -direction[incoming]
        normals = torch.linalg.cross(axes, others)
        reference = safe_norm(normals)[1][next_around(axes, normals, outgoing)]
        # sin θ cos φ and sin θ sin φ: of these the harmonics are polynomials, smooth where θ is 0 and φ is not defined.
        cosine, sine = (normals * reference).sum(-1), (torch.linalg.cross(normals, reference) * axes).sum(-1)
        angular = harmonics((axes * others).sum(-1), cosine, sine, self.degrees).to(dtype)
        radial = self.spherical(x).to(dtype)[incoming]
        zonal = angular[:, [degree**2 for degree in range(self.degrees)]]
        angles = radial * zonal[:, :, None]
        torsions = radial[:, None] * angular.unflatten(1, (self.degrees, self.degrees))[..., None]
        return self.radial(x).to(dtype), angles.flatten(1), torsions.flatten(1)

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

        def two_maps(inputs, outputs):
            return nn.Sequential(linear(inputs, basis, bias=False), linear(basis, outputs, bias=False))

        self.radial = two_maps(functions, channels)
        self.angles = two_maps(degrees * functions, inner)
        self.torsions = two_maps(degrees**2 * functions, inner)
        self.incoming, self.own = linear(channels, channels), linear(channels, channels)
        self.down, self.up = linear(channels, inner, bias=False), linear(inner, channels, bias=False)
        self.before, self.combine = Residual(channels), linear(channels, channels)
        self.after = nn.Sequential(Residual(channels), Residual(channels))

    def forward(self, x, basis, incoming, outgoing):
        radial, angles, torsions = basis
        sent = silu(self.down(silu(self.incoming(x)) * self.radial(radial)))
        heard = sent[incoming] * self.angles(angles) * self.torsions(torsions)
        message = silu(self.own(x)) + silu(self.up(summed(heard, outgoing, len(x))))
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
    return wide.new_zeros(count, values.shape[1]).index_add(0, index, wide).to(values.dtype)


def linear(inputs, outputs, bias=True, zero_bias=True):
    """A linear layer with the published initial values: orthogonal, scaled to Glorot's variance; zero bias."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.orthogonal_(layer.weight)
    with torch.no_grad():
        variance = layer.weight.var() if layer.weight.numel() > 1 else torch.tensor(1.0)
        layer.weight *= torch.sqrt(2.0 / ((inputs + outputs) * variance))
        if bias and zero_bias:
            layer.bias.zero_()
    return layer
