"""SE(3)-DDM: denoising of the distances of one view of a molecule, given another (GeoSSL; Liu et al., ICLR 2023).

Legend: m molecules, n atoms, p pairs of atoms, F channels.
"""

import torch
from pydantic import Field
from torch import nn

from mspt.models.heads import mlp
from mspt.objectives import noise
from mspt.objectives.noise import NoiseLevels
from mspt.settings import Settings


class SE3DDMSettings(Settings):
    """weight: in the joint loss. sigma: standard deviation in Å of what the second view differs by from the first.

    levels: of the noise on distances; a molecule gets one of them, in each direction its own. anneal_power: a in σ^a.
    """

    weight: float = Field(1.0, ge=0)
    sigma: float = Field(0.3, gt=0)
    levels: NoiseLevels = NoiseLevels()
    anneal_power: float = 2.0


def pairs(ptr):
    """All unordered pairs of atoms of one molecule, int64 [2, p], ordered by the first atom, then the second."""
    atoms = torch.arange(int(ptr[-1]), device=ptr.device)
    molecule = torch.repeat_interleave(torch.arange(len(ptr) - 1, device=ptr.device), ptr.diff())
    after = ptr[1:][molecule] - atoms - 1  # atoms of the same molecule that follow
    first = torch.repeat_interleave(atoms, after)
    start = torch.cumsum(after, 0) - after
    return torch.stack([first, torch.arange(len(first), device=ptr.device) - start[first] + first + 1])


class ScoreHead(nn.Module):
    """σ times the score of noisy distances [p], from the sum of the pair's scalars [p, F], as the public code's."""

    def __init__(self, channels):
        super().__init__()
        self.distance = mlp(1, channels, 1)
        self.score = mlp(channels + 1, channels, channels // 2, 1)

    def forward(self, x, distance):
        distance = self.distance(distance.to(x.dtype)[:, None])
        return self.score(torch.cat([x, distance], 1))[:, 0]


class SE3DDM(nn.Module):
    """From the scalars of one view the score of the other's distances d̃ = d + σ ε, ∂ log p / ∂d̃ = −ε / σ; and back.

    The first view is the structure itself, which is what other objectives see, the second has moved atoms. The loss of
    a pair of atoms is ½ (s − target)² σ^a, s = MLP(h_i + h_j, MLP(d̃)) / σ, one MLP for each direction.

    Sum: over all pairs of atoms of a molecule, the mean of both directions. Weight: the number of molecules.
    """

    def __init__(self, settings, network):
        super().__init__()
        self.settings = settings
        self.terms = {"se3_ddm": 1.0}
        self.forth, self.back = ScoreHead(network.width), ScoreHead(network.width)

    def corrupt(self, model, batch, generator):
        """The second view is a view of its own."""

    def weights(self, batch, generator):
        return batch.positions.new_tensor([len(batch.keys)])

    def moved(self, model, batch, generator):
        """Positions [n, 3] of the second view."""
        return model.positions + self.settings.sigma * noise.of_atoms("se3_ddm", batch, generator)

    def drawn(self, direction, batch, pair, generator):
        """ε and σ of each pair [p]; an unordered pair has one ε."""
        own, start = batch.molecule[pair[0]], batch.ptr[batch.molecule[pair[0]]]
        # Atoms are numbered within the record, and a number of two words is enough for both of them.
        counter = (pair[0] - start << 32) + (pair[1] - start)
        epsilon = generator.normal(f"se3_ddm/{direction}", batch.records[own], counter, 1, batch.positions.dtype)
        _, sigma = self.settings.levels.draw(f"se3_ddm/{direction}/level", batch, generator)
        return epsilon[:, 0], sigma[own]

    def _direction(self, direction, head, scalars, positions, batch, pair, generator):
        epsilon, sigma = self.drawn(direction, batch, pair, generator)
        distance = (positions[pair[0]] - positions[pair[1]]).norm(dim=-1) + sigma * epsilon
        score = head(scalars[pair[0]] + scalars[pair[1]], distance).to(sigma.dtype) / sigma
        return self._loss(score, epsilon, sigma)

    def _loss(self, score, epsilon, sigma):
        return 0.5 * ((score + epsilon / sigma).square() * sigma**self.settings.anneal_power).sum()

    def forward(self, model, batch, generator):
        second, pair = model.view(self.moved(model, batch, generator)), pairs(batch.ptr)
        forth = self._direction("forth", self.forth, model.structure[0], second.positions, batch, pair, generator)
        back = self._direction("back", self.back, second.structure[0], model.positions, batch, pair, generator)
        return (forth + back)[None] / 2

    def trivial(self, batch, generator):
        """The sum of a score of zero."""
        drawn = [self.drawn(direction, batch, pairs(batch.ptr), generator) for direction in ("forth", "back")]
        return sum(self._loss(0.0, *pair) for pair in drawn)[None] / 2
