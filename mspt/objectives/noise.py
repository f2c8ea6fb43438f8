"""Noise of the denoising objectives, the same for a record wherever it is processed.

Legend: m molecules, n atoms.
"""

import math

import torch
from pydantic import Field

from mspt.settings import Settings


class NoiseLevels(Settings):
    """count standard deviations in Å, evenly spaced in their logarithm from first to last."""

    first: float = Field(10.0, gt=0)
    last: float = Field(0.01, gt=0)
    count: int = Field(50, ge=2)

    def draw(self, purpose, batch, generator):
        """One for each molecule: which of them int64 [m], and the standard deviations [m]."""
        uniform = generator.uniform(purpose, batch.records, torch.zeros_like(batch.records), 1)[:, 0]
        level = (uniform * self.count).long()
        sigmas = torch.linspace(math.log(self.first), math.log(self.last), self.count, dtype=torch.float64).exp()
        return level, sigmas.to(batch.positions)[level]


def of_atoms(purpose, batch, generator):
    """Standard normal noise of a batch's positions, [n, 3]."""
    atom = torch.arange(len(batch.numbers), device=batch.ptr.device) - batch.ptr[batch.molecule]
    return generator.normal(purpose, batch.records[batch.molecule], atom, 3, batch.positions.dtype)
