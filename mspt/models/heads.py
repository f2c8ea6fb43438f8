"""What is read off an encoder's atoms.

Legend: n atoms, m molecules, F channels.
"""

from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import silu


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
        squared = self.lengths(vec).square().sum(1)
        # The root of zero has no gradient: there, the root of a constant is taken instead.
        length = torch.where(squared > 0, torch.where(squared > 0, squared, 1.0).sqrt(), 0.0)
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


def forces(energies, positions, create_graph):
    """−∂ Σ energies / ∂positions: energies [m], positions [n, 3] that they were computed from -> [n, 3].

    create_graph: keep what a loss on the forces needs, which is a second derivative. Under DeepSpeed this is called
    inside the wrapped module's forward, and the Engine is told so (takes_forces).
    """
    (gradient,) = torch.autograd.grad(energies.sum(), positions, create_graph=create_graph, materialize_grads=True)
    return -gradient
