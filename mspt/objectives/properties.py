"""A property of molecules, learnt from labels (fine-tuning; Thölke & De Fabritiis, ICLR 2022, section 4.1).

Legend: m molecules.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from mspt.models.heads import DipoleNorm, ScalarReadout, SpatialExtent
from mspt.objectives.statistics import Statistics
from mspt.settings import Settings

READOUTS = {"scalar": ScalarReadout, "dipole_norm": DipoleNorm, "spatial_extent": SpatialExtent}
# What the targets of QM9 are read off as, if not as scalars; and those that are sums over atoms for the most part.
PHYSICAL = {"mu": "dipole_norm", "r2": "spatial_extent"}
TOTAL_ENERGIES = ("u0", "u298", "h298", "g298")


class PropertySettings(Settings):
    """target: its name in the shards. weight: in the joint loss. loss: of the standardised target.

    head: what the molecule's value is: `scalar`, a sum over atoms; `dipole_norm`; `spatial_extent`; null: that of the
    name (mu: dipole_norm, r2: spatial_extent, any other: scalar). references: fit what an atom of each element adds
    and learn the rest, of scalars only; null: of u0, u298, h298 and g298.
    """

    target: str
    weight: float = Field(1.0, ge=0)
    loss: Literal["mse", "l1"] = "mse"
    head: Literal["scalar", "dipole_norm", "spatial_extent"] | None = None
    references: bool | None = None

    @property
    def readout(self):
        """The name of the head, chosen."""
        return self.head or PHYSICAL.get(self.target, "scalar")

    @property
    def with_references(self):
        """Whether references are fitted, chosen."""
        chosen = self.target in TOTAL_ENERGIES if self.references is None else self.references
        return chosen and self.readout == "scalar"


class Property(nn.Module):
    """ŷ = mean + references + deviation · head for scalars; deviation · head for norm and extent, which are not
    negative by what they are.

    Sum: over the molecules that have the target, of the square (or absolute) error over the deviation. Weight: their
    number.
    """

    supervised = True

    def __init__(self, settings, network):
        super().__init__()
        self.settings = settings
        self.terms = {"property": 1.0}
        self.head = READOUTS[settings.readout](network.width)
        self.statistics = Statistics()

    @property
    def labels(self):
        """Names of the targets it learns from, and whether it does from forces."""
        return (self.settings.target,), False

    @property
    def learns(self):
        """What its statistics and its head are for: a run cannot change it."""
        return {
            "target": self.settings.target,
            "head": self.settings.readout,
            "references": self.settings.with_references,
        }

    def fit(self, shardsets, settings):
        """Take the target's statistics from the records to train on. Raises UserError where none has it."""
        self.statistics.fit(shardsets, self.settings.target, self.settings.with_references, settings.on_bad_block)

    def corrupt(self, model, batch, generator):
        """It sees what the others leave: the noisy structure, where noise regularises."""

    def weights(self, batch, generator):
        return self.known(batch)[0].sum()[None].to(batch.positions.dtype)

    def forward(self, model, batch, generator):
        known, truth = self.known(batch)
        error = (torch.where(known, self.values(model), 0.0) - truth) / self.statistics.deviation
        error = error.abs() if self.settings.loss == "l1" else error.square()
        return torch.where(known, error, 0.0).sum()[None].to(batch.positions.dtype)

    def known(self, batch):
        """Which molecules have the target, bool [m], and its values [m] float64, zero where they do not."""
        values = batch.targets.get(self.settings.target)
        if values is None:
            values = torch.full((len(batch.keys),), torch.nan, dtype=torch.float64, device=batch.ptr.device)
        return values.isfinite(), torch.where(values.isfinite(), values, 0.0)

    def values(self, model):
        """ŷ [m] float64 of the structures that a pass sees."""
        value = self.statistics.deviation * self.head(*model.structure, model.batch, model.positions).double()
        return value + self.statistics.baseline(model.batch) if self.settings.readout == "scalar" else value

    def predict(self, model):
        """name -> values of a clean pass, in the unit of the labels."""
        return {self.settings.target: self.values(model)}

    def baseline(self, batch):
        """The same for what is known of the elements alone."""
        return {self.settings.target: self.statistics.baseline(batch)}

    def metric(self, errors):
        """What the best model is chosen by, from name -> error with its mae."""
        return errors[self.settings.target].mae
