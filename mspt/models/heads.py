"""What is read off an encoder's atoms."""

import torch
from torch import nn
from torch.nn.functional import silu


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
        # The smallest number under the root keeps its gradient finite at zero vectors.
        length = (self.lengths(vec).square().sum(1) + torch.finfo(vec.dtype).tiny).sqrt()
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
