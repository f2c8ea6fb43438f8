"""3D-EMGP: an energy whose slope undoes noise, and how much noise there was (Jiao et al., AAAI 2023).

Legend: m molecules, n atoms, L noise levels.
"""

import math

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import cross_entropy

from mspt.models.heads import ScalarHead, mlp
from mspt.objectives import noise
from mspt.objectives.noise import NoiseLevels
from mspt.settings import Settings


class EMGPSettings(Settings):
    """weight: in the joint loss. level_weight: of the noise level's cross-entropy within it.

    levels: of the noise; a molecule gets one of them. steps: of Langevin dynamics towards the Riemann-Gaussian
    distribution; the public code takes one, which adds plain Gaussian noise.
    """

    weight: float = Field(1.0, ge=0)
    level_weight: float = Field(0.2, ge=0)
    levels: NoiseLevels = NoiseLevels()
    steps: int = Field(1, ge=1)


def force(noisy, clean, batch):
    """F = −2 (x̃ G̃ − x O) / (‖G̃‖ + ‖O‖), G̃ = x̃ᵀx̃, O = xᵀx̃, of positions [n, 3] about their molecules' centres.

    As x̃ G̃ − x O = (x̃x̃ᵀ − xxᵀ) x̃, it sees of the clean structure its Gram matrix alone: it turns with the noisy
    structure and does not change when the clean one is turned, mirrored or moved. Zero for a single atom.
    """
    own, counts = batch.molecule, batch.ptr.diff().clamp(min=1)[:, None]
    noisy, clean = (x - (batch.sum(x) / counts)[own] for x in (noisy, clean))
    gram = batch.sum(noisy[:, :, None] * noisy[:, None])  # [m, 3, 3]
    overlap = batch.sum(clean[:, :, None] * noisy[:, None])
    size = gram.norm(dim=(1, 2)) + overlap.norm(dim=(1, 2))
    pull = torch.einsum("ni,nij->nj", noisy, gram[own]) - torch.einsum("ni,nij->nj", clean, overlap[own])
    return -2 * pull / size.clamp(min=torch.finfo(size.dtype).tiny)[own][:, None]


class EMGP(nn.Module):
    """x̃ is drawn by Langevin steps of the Gram matrix's energy, from x; −∂E/∂x̃ of the network's energy E predicts
    F / σ. An MLP on the vectors of the clean and the noisy molecule, means over atoms, tells which of L levels σ is.

    What other objectives see is the clean structure: at half of the published levels the noise is above 0.3 Å, and a
    molecule is no longer itself.

    Sums: over atoms of the square error over the three components; over molecules of the cross-entropy. Weights: the
    number of molecules, twice.
    """

    takes_forces = True

    def __init__(self, settings, network):
        super().__init__()
        self.settings = settings
        self.terms = {"emgp": 1.0, "emgp_level": settings.level_weight}
        self.energy = ScalarHead(network.width)
        self.level = mlp(2 * network.width, network.width, settings.levels.count)

    def noisy(self, batch, generator):
        """x̃ [n, 3], level [m], and F / σ [n, 3]."""
        level, sigma = self.settings.levels.draw("emgp/level", batch, generator)
        sigma = sigma[batch.molecule, None]
        noisy = batch.positions
        for step in range(1, self.settings.steps + 1):
            size = 0.5**step
            drift = size * force(noisy, batch.positions, batch)
            kick = math.sqrt(2 * size) * sigma * noise.of_atoms(f"emgp/{step}", batch, generator)
            noisy = noisy + drift + kick
        return noisy, level, force(noisy, batch.positions, batch) / sigma

    def corrupt(self, model, batch, generator):
        """The noisy structure is a view of its own."""

    def weights(self, batch, generator):
        return batch.positions.new_tensor([len(batch.keys)] * 2)

    def forward(self, model, batch, generator):
        noisy, level, target = self.noisy(batch, generator)
        view = model.view(noisy, differentiable=True)
        energies, forces = view.energies_and_forces(self.energy)
        # A constant in the energy moves nothing; the zero keeps it in the graph on every rank.
        error = (forces - target).square().sum() + 0.0 * energies.sum()
        vectors = torch.cat([model.molecules, view.molecules], 1) / batch.ptr.diff().clamp(min=1)[:, None]
        logits = self.level(vectors.to(self.level[0].weight.dtype)).to(vectors.dtype)
        wrong = cross_entropy(logits, level, reduction="sum")
        return torch.stack([error, wrong])

    def trivial(self, batch, generator):
        """The sums of no force and of a level guessed blindly."""
        target = self.noisy(batch, generator)[2]
        guessed = len(batch.keys) * math.log(self.settings.levels.count)
        return torch.stack([target.square().sum(), target.new_tensor(guessed)])
