"""Structure → spectrum: the spectra of a molecule from its structure, learnt from spectra that are known.

Legend: m molecules, F channels of the encoder, L points of a spectrum's grid.
"""

import math
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from mspt.chemistry.spectra import GRIDS, SPECTRA
from mspt.settings import Settings


class SpectrumPredictionSettings(Settings):
    """weight: in the joint loss. spectra: which are predicted. hidden: width of each one's multilayer perceptron."""

    weight: float = 1.0
    spectra: tuple[Literal[SPECTRA], ...] = SPECTRA
    hidden: int = Field(256, ge=1)

    @field_validator("spectra")
    @classmethod
    def _in_order(cls, spectra):
        if not spectra:
            raise ValueError("names no spectrum; leave objectives.spectrum_prediction out instead")
        return tuple(name for name in SPECTRA if name in spectra)


def head(channels, hidden, points):
    """A multilayer perceptron: molecule vectors [m, F] -> [m, L]."""
    first, second, last = nn.Linear(channels, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, points)
    for layer in (first, second, last):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)


class SpectrumPrediction(nn.Module):
    """Mean square error over the points of a spectrum of log10(1 + y), one mean a spectrum, their means summed.

    Sums: over the molecules that have the spectrum. Weights: their number. The structure is as the other objectives
    leave it: beside coord it is the noisy one.
    """

    def __init__(self, settings, network):
        super().__init__()
        self.terms = {f"spectrum_{name}": 1.0 for name in settings.spectra}
        self.heads = nn.ModuleDict(
            {name: head(network.width, settings.hidden, GRIDS[name].length) for name in settings.spectra}
        )

    def predict(self, model):
        """name -> log10(1 + y) of the Pass's molecules, [m, L]."""
        return {name: head(model.molecules) for name, head in self.heads.items()}

    def corrupt(self, model, batch, generator):
        """Nothing is hidden from it: spectra are what it learns from, not what it sees."""

    def weights(self, batch, generator):
        counts = [batch.present[name].sum() for name in self.heads]
        return torch.stack(counts).to(batch.positions.dtype)

    def forward(self, model, batch, generator):
        sums = []
        for name, predicted in self.predict(model).items():
            true = torch.log1p(batch.spectra[name]) / math.log(10)
            error = (predicted.to(true.dtype) - true).square().mean(1)
            sums.append(torch.where(batch.present[name], error, 0.0).sum())
        return torch.stack(sums)
