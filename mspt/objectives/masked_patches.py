"""Masked patch reconstruction of the spectra (MolSpectra, ICLR 2025)."""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from mspt.chemistry.spectra import SPECTRA
from mspt.settings import Settings


class MaskedPatchesSettings(Settings):
    """weight: in the joint loss. ratio: share of patches masked.

    masking: `patches` zeroes the masked patches alone, as published; windows overlap, so that a lone masked patch can
    be read off its neighbours. `spans` hides every point of the masked patches from all windows.
    """

    weight: float = Field(1.0, ge=0)
    ratio: float = Field(0.1, gt=0, le=1)
    masking: Literal["patches", "spans"] = "patches"


class MaskedPatches(nn.Module):
    """Mean square error over masked patches, one mean a spectrum, the three summed.

    Sums [3]: over the masked patches of a spectrum that is there, of the mean over the patch. Weights [3]: their
    number.
    """

    def __init__(self, settings, network):
        super().__init__()
        self.settings = settings
        self.terms = {f"masked_{name}": 1.0 for name in SPECTRA}
        self.lengths = dict(network.specformer.patch_counts)

    def masks(self, batch, generator):
        """name -> bool [m, N]: for each molecule the same number of patches (at least one), drawn by its record."""
        zeros = torch.zeros_like(batch.records)
        masks = {}
        for name in SPECTRA:
            patches = self.lengths[name]
            count = max(1, round(self.settings.ratio * patches))
            draws = generator.uniform(f"masked_patches/{name}", batch.records, zeros, patches)
            order = draws.argsort(1)
            masks[name] = torch.zeros_like(draws, dtype=torch.bool).scatter(1, order[:, :count], True)
        return masks

    def corrupt(self, model, batch, generator):
        specformer = model.network.specformer
        model.masked = self.masks(batch, generator)
        for name, masked in model.masked.items():
            patches = model.patches[name]
            hidden = masked[..., None].expand_as(patches)
            if self.settings.masking == "spans":
                hidden = specformer.hidden_points(name, masked)
            model.patches[name] = patches.masked_fill(hidden, 0.0)

    def weights(self, batch, generator):
        masks = self.masks(batch, generator)
        counts = [(masks[name] & batch.present[name][:, None]).sum() for name in SPECTRA]
        return torch.stack(counts).to(batch.positions.dtype)

    def forward(self, model, batch, generator):
        true = model.network.specformer.patches(batch.spectra)
        sums = []
        for name in SPECTRA:
            error = (model.reconstruction[name].to(true[name].dtype) - true[name]).square().mean(-1)
            counted = model.masked[name] & batch.present[name][:, None]
            sums.append(torch.where(counted, error, 0.0).sum())
        return torch.stack(sums)
