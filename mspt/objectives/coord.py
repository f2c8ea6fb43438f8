"""Coord: denoising of coordinates, a learned force field (Zaidi et al., ICLR 2023)."""

from pydantic import Field
from torch import nn

from mspt.errors import UserError
from mspt.models.encoders import ENCODERS
from mspt.models.heads import VectorHead
from mspt.objectives import noise
from mspt.settings import Settings


class CoordSettings(Settings):
    """weight: in the joint loss. sigma: standard deviation of the noise, Å."""

    weight: float = Field(1.0, ge=0)
    sigma: float = Field(0.04, ge=0)


class Coord(nn.Module):
    """x̃ = x + σ ε; the vector head predicts ε. The target has zero mean and unit variance by construction, so that the
    published running normalisation of it has nothing to do here.

    Sum: over atoms, of the mean square error over the three components. Weight: the number of atoms. Raises UserError
    where the encoder has no vectors.
    """

    name = "coord"

    def __init__(self, settings, network):
        super().__init__()
        encoder = network.encoder.settings
        if not encoder.gives_vectors:
            able = [name for name, (defaults, _) in ENCODERS.items() if defaults().gives_vectors]
            raise UserError(
                f"objectives.{self.name} needs an encoder with vectors, and {encoder.name} as set here has none; set "
                f"model.encoder.name to one of {', '.join(able)} with its default keys, or take another objective"
            )
        self.settings = settings
        self.terms = {self.name: 1.0}
        self.head = VectorHead(network.width)

    def noise(self, batch, generator):
        """ε [n, 3]."""
        return noise.of_atoms(self.name, batch, generator)

    def start(self, batch, generator):
        """What noise is added to, [n, 3]."""
        return batch.positions

    def corrupt(self, model, batch, generator):
        model.positions = self.start(batch, generator) + self.settings.sigma * self.noise(batch, generator)

    def weights(self, batch, generator):
        return batch.positions.new_tensor([len(batch.numbers)])

    def forward(self, model, batch, generator):
        predicted = self.head(*model.structure).to(batch.positions.dtype)
        error = (predicted - self.noise(batch, generator)).square().mean(-1).sum()
        return error[None]

    def trivial(self, batch, generator):
        """The sum of predicting zero."""
        return self.noise(batch, generator).square().mean(-1).sum()[None]
