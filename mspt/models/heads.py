"""What is read off an encoder's atoms.

Legend: n atoms, m molecules, F channels.
"""

from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import silu

from mspt.chemistry.elements import MASSES


def mlp(*widths):
    """Linear maps from width to width, silu between them; Xavier weights, zero biases."""
    layers = []
    for inputs, outputs in pairwise(widths):
        linear = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class GatedBlock(nn.Module):
    """Gated equivariant block (Schütt et al., 2021): scalars gate vectors and see their lengths."""

    def __init__(self, channels, out, activate):
        super().__init__()
        self.lengths = nn.Linear(channels, channels, bias=False)
        self.vectors = nn.Linear(channels, out, bias=False)
        self.update = nn.Sequential(nn.Linear(2 * channels, channels), nn.SiLU(), nn.Linear(channels, 2 * out))
        self.activate = activate
        for layer in (self.lengths, self.vectors, self.update[0], self.update[2]):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x, vec):
        """x [n, F], vec [n, 3, F] -> x [n, out], vec [n, 3, out]."""
        length = root(self.lengths(vec).square().sum(1))
        x, gate = self.update(torch.cat([x, length], 1)).chunk(2, dim=1)
        return silu(x) if self.activate else x, gate[:, None] * self.vectors(vec)


class VectorHead(nn.Module):
    """Scalars [n, F] and vectors [n, 3, F] -> one vector an atom [n, 3], as Coord's head."""

    def __init__(self, channels):
        super().__init__()
        self.first = GatedBlock(channels, channels // 2, activate=True)
        self.last = GatedBlock(channels // 2, 1, activate=False)

    def forward(self, x, vec):
        x, vec = self.last(*self.first(x, vec))
        # The last block's scalars are not asked for; a zero keeps their weights in the graph on every rank.
        return vec[..., 0] + 0.0 * x


class ScalarHead(nn.Module):
    """Scalars [n, F] -> one number an atom [n], as TorchMD-Net's scalar output: F -> F / 2 -> 1."""

    def __init__(self, channels):
        super().__init__()
        self.layers = mlp(channels, channels // 2, 1)

    def forward(self, x):
        return self.layers(x)[:, 0]


class Readout(nn.Module):
    """Base of what is read off a whole molecule: two gated blocks give each atom a scalar and a vector (Thölke &
    De Fabritiis, 2022, section 3.2).

    forward(x [n, F], vec [n, 3, F] or None, batch, positions [n, 3]) -> [m], in at least float32; positions: those that
    x and vec were computed from. An encoder without vectors counts as one whose vectors are zero.
    """

    def __init__(self, channels):
        super().__init__()
        self.first = GatedBlock(channels, channels // 2, activate=True)
        self.last = GatedBlock(channels // 2, 1, activate=False)

    def atoms(self, x, vec):
        """A number [n] and a vector [n, 3] of each atom."""
        vec = x.new_zeros(len(x), 3, x.shape[1]) if vec is None else vec
        x, vec = self.last(*self.first(x, vec))
        wide = torch.promote_types(x.dtype, torch.float32)
        return x[:, 0].to(wide), vec[..., 0].to(wide)


class ScalarReadout(Readout):
    """The sum over atoms of their numbers: an energy, or any other invariant."""

    def forward(self, x, vec, batch, positions):
        numbers, vectors = self.atoms(x, vec)
        return batch.sum(numbers + 0.0 * vectors.sum(1))


class DipoleNorm(Readout):
    """‖Σ q_i (r_i − r_c) + μ_i‖: of partial charges about the centre of mass r_c, and atomic dipoles (Schütt et al.,
    2021, eq. 8). The charges need not add up to zero; about r_c translation does not matter all the same.
    """

    def forward(self, x, vec, batch, positions):
        charges, dipoles = self.atoms(x, vec)
        return root(batch.sum(charges[:, None] * from_centre(batch, positions) + dipoles).square().sum(1))


class SpatialExtent(Readout):
    """⟨R²⟩ = Σ x_i ‖r_i − r_c‖², about the centre of mass r_c."""

    def forward(self, x, vec, batch, positions):
        numbers, vectors = self.atoms(x, vec)
        extent = from_centre(batch, positions).square().sum(1)
        return batch.sum(numbers * extent + 0.0 * vectors.sum(1))


def from_centre(batch, positions):
    """Positions [n, 3] as seen from their molecule's centre of mass."""
    mass = positions.new_tensor(MASSES)[batch.numbers][:, None]
    centre = batch.sum(mass * positions) / batch.sum(mass)
    return positions - centre[batch.molecule]


def root(squared):
    """Square root of what is not negative, with gradient zero at zero, where the root has none."""
    return torch.where(squared > 0, torch.where(squared > 0, squared, 1.0).sqrt(), 0.0)


def forces(energies, positions, create_graph):
    """−∂ Σ energies / ∂positions: energies [m], positions [n, 3] that they were computed from -> [n, 3].

    create_graph: keep what a loss on the forces needs, which is a second derivative. Under DeepSpeed this is called
    inside the wrapped module's forward, and the Engine is told so (takes_forces).
    """
    (gradient,) = torch.autograd.grad(energies.sum(), positions, create_graph=create_graph, materialize_grads=True)
    return -gradient
