"""Coord: denoising of coordinates, a learned force field (Zaidi et al., ICLR 2023)."""

from torch import nn

from mspt.models.heads import VectorHead
from mspt.objectives import noise
from mspt.settings import Settings


class CoordSettings(Settings):
    """weight: in the joint loss. sigma: standard deviation of the noise, Å."""

    weight: float = 1.0
    sigma: float = 0.04


class Coord(nn.Module):
    """x̃ = x + σ ε; the vector head predicts ε. The target has zero mean and unit variance by construction, so that
    the published running normalisation of it has nothing to do here.

    Sum: over atoms, of the mean square error over the three components. Weight: the number of atoms.
    """

    def __init__(self, settings, network):
        super().__init__()
        self.terms = {"coord": 1.0}
        self.sigma = settings.sigma
        self.head = VectorHead(network.width)

    def noise(self, batch, generator):
        """ε [n, 3]."""
        return noise.of_atoms("coord", batch, generator)

    def corrupt(self, model, batch, generator):
        model.positions = batch.positions + self.sigma * self.noise(batch, generator)

    def weights(self, batch, generator):
        return batch.positions.new_tensor([len(batch.numbers)])

    def forward(self, model, batch, generator):
        predicted = self.head(*model.structure).to(batch.positions.dtype)
        error = (predicted - self.noise(batch, generator)).square().mean(-1).sum()
        return error[None]
