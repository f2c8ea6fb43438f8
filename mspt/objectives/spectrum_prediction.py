"""Structure → spectrum: the spectra of a molecule from its structure, learnt from spectra that are known.

Legend: m molecules, F channels of the encoder, L points of a spectrum's grid.
"""

import math
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import nn
from torch.nn.functional import softplus

from mspt.chemistry.spectra import GRIDS, SPECTRA
from mspt.data.opening import broadened
from mspt.errors import UserError
from mspt.settings import Settings

# Means below it count as it: no molecule's spectrum is zero for certain.
LEAST = 1e-5
# Of means and variances; so many records with the spectrum fix them well enough.
RECORDS = 20_000


class SpectrumPredictionSettings(Settings):
    """weight: in the joint loss. spectra: which are predicted. hidden: width of each one's multilayer perceptron."""

    weight: float = Field(1.0, ge=0)
    spectra: tuple[Literal[SPECTRA], ...] = SPECTRA
    hidden: int = Field(256, ge=1)

    @field_validator("spectra")
    @classmethod
    def _in_order(cls, spectra):
        if not spectra:
            raise ValueError("names no spectrum; leave objectives.spectrum_prediction out instead")
        return tuple(name for name in SPECTRA if name in spectra)


class Head(nn.Module):
    """A multilayer perceptron from molecule vectors [m, F] to log10(1 + y) [m, L], which is positive: softplus of what
    it gives beside the training set's mean. So an untrained one predicts that mean.

    mean [L], variance (over molecules and points) of log10(1 + y): of the training set, by fit().
    """

    def __init__(self, channels, hidden, points):
        super().__init__()
        first, second, last = nn.Linear(channels, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, points)
        for layer in (first, second):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        # A random start would stay as noise from point to point, which no few steps take away.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)
        self.register_buffer("mean", torch.full((points,), math.log(2)))
        self.register_buffer("variance", torch.ones(()))

    def forward(self, molecules):
        """Of the molecule vectors' type, float32 at least, whatever the weights are."""
        beside = self.layers(molecules.to(self.layers[0].weight.dtype)).to(molecules.dtype)
        return softplus(beside + torch.log(torch.expm1(self.mean.to(molecules.dtype).clamp(min=LEAST))))


class SpectrumPrediction(nn.Module):
    """Mean square error of log10(1 + y) over the points of a spectrum, over its variance: 1 is predicting the mean.

    Sums: over the molecules that have the spectrum. Weights: their number. The structure is as the other objectives
    leave it: beside coord it is the noisy one.
    """

    def __init__(self, settings, network):
        super().__init__()
        self.terms = {f"spectrum_{name}": 1.0 for name in settings.spectra}
        self.heads = nn.ModuleDict(
            {name: Head(network.width, settings.hidden, GRIDS[name].length) for name in settings.spectra}
        )

    def fit(self, shardsets, settings):
        """Take means and variances from the spectra to train on; settings: DataSettings.

        Raises UserError where a spectrum is nowhere.
        """
        sums = {name: torch.zeros(2, GRIDS[name].length, dtype=torch.float64) for name in self.heads}
        counts = dict.fromkeys(self.heads, 0)
        for shardset in shardsets:
            seen = {name: 0 for name in self.heads if name in settings.spectra and name in shardset.manifest["spectra"]}
            for batch in broadened(shardset, settings, "cpu") if seen else ():
                for name in seen:
                    values = transformed(batch.spectra[name][batch.present[name]]).double()
                    sums[name] += torch.stack([values.sum(0), values.square().sum(0)])
                    counts[name] += len(values)
                    seen[name] += len(values)
                if min(seen.values()) >= RECORDS // len(shardsets):
                    break
        for name, head in self.heads.items():
            if not counts[name]:
                raise UserError(
                    f"objectives.spectrum_prediction.spectra: no record to train on has {name}, or data.spectra "
                    "lacks it; leave it out"
                )
            mean, square = sums[name] / counts[name]
            variance = (square - mean.square()).mean()
            head.mean.copy_(mean)
            # Where all spectra are one and the same there is nothing to divide by.
            head.variance.fill_(variance if variance > 0 else 1.0)

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
            true = transformed(batch.spectra[name])
            error = (predicted.to(true.dtype) - true).square().mean(1) / self.heads[name].variance
            sums.append(torch.where(batch.present[name], error, 0.0).sum())
        return torch.stack(sums)


def transformed(spectra):
    """Intensities y -> log10(1 + y), as SpecFormer's patches are."""
    return torch.log1p(spectra) / math.log(10)
