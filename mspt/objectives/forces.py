"""Energies and the forces that are their slope, learnt from labels (fine-tuning; MD17 in Thölke & De Fabritiis, ICLR
2022, section 4.1).

Legend: m molecules, n atoms.
"""

import torch
from pydantic import Field
from torch import nn

from mspt.chemistry.units import HARTREE_EV, HARTREE_KCAL_MOL
from mspt.models import heads
from mspt.objectives.statistics import Statistics
from mspt.settings import Settings

KCAL_MOL = HARTREE_KCAL_MOL / HARTREE_EV  # of one eV


class ForcesSettings(Settings):
    """weight: in the joint loss; energy_weight and force_weight: of its two terms. target: the energy's name in the
    shards. references: fit what an atom of each element adds to the energy, for sets of several molecules.
    """

    target: str = "energy"
    weight: float = Field(1.0, ge=0)
    energy_weight: float = Field(0.2, ge=0)
    force_weight: float = Field(0.8, ge=0)
    references: bool = False


class Forces(nn.Module):
    """E = mean + references + deviation · scalar head, F = −∂E/∂x. Errors are taken in kcal/mol and kcal/mol/Å, as
    published, so that the weight of a denoising term beside them means the same.

    Sums: over molecules with an energy of its square error; over atoms with forces of the mean square error over the
    three components. Weights: their numbers.
    """

    supervised = True
    takes_forces = True

    def __init__(self, settings, network):
        super().__init__()
        self.settings = settings
        self.terms = {"energy": settings.energy_weight, "forces": settings.force_weight}
        self.head = heads.ScalarReadout(network.width)
        self.statistics = Statistics()

    @property
    def labels(self):
        """Names of the targets it learns from, and whether it does from forces."""
        return (self.settings.target,), True

    @property
    def learns(self):
        """What its statistics are of: a run cannot change it."""
        return {"target": self.settings.target, "references": self.settings.references}

    def fit(self, shardsets, settings):
        """Take the energy's statistics from the records to train on. Raises UserError where none has it."""
        self.statistics.fit(shardsets, self.settings.target, self.settings.references, settings.on_bad_block)

    def corrupt(self, model, batch, generator):
        """It sees what the others leave, and keeps the way from the energy back to the positions."""
        model.positions = model.positions.detach().requires_grad_()

    def weights(self, batch, generator):
        counts = [known.sum() for known, _ in self.known(batch)]
        return torch.stack(counts).to(batch.positions.dtype)

    def forward(self, model, batch, generator):
        sums = []
        for value, (known, truth) in zip(self.values(model), self.known(batch), strict=True):
            error = KCAL_MOL * (torch.where(known if value.dim() == 1 else known[:, None], value, 0.0) - truth)
            square = error.square() if error.dim() == 1 else error.square().mean(1)
            sums.append(torch.where(known, square, 0.0).sum())
        return torch.stack(sums).to(batch.positions.dtype)

    def known(self, batch):
        """Which molecules have the energy, and its values [m] float64; which atoms have forces, and these [n, 3].

        Zeros stand where there are none.
        """
        energies, forces = batch.targets.get(self.settings.target), batch.forces
        if energies is None:
            energies = torch.full((len(batch.keys),), torch.nan, dtype=torch.float64, device=batch.ptr.device)
        if forces is None:
            forces = torch.full_like(batch.positions, torch.nan)
        labelled = energies.isfinite(), forces.isfinite().all(1)
        return (
            (labelled[0], torch.where(labelled[0], energies, 0.0)),
            (labelled[1], torch.where(labelled[1][:, None], forces, 0.0)),
        )

    def values(self, model):
        """Energies [m] float64 and forces [n, 3] at the positions that a pass sees, which must require a gradient.

        Where gradients are on, the forces have a graph of their own to be trained through.
        """
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            own = self.head(*model.structure, model.batch, model.positions)
            forces = self.statistics.deviation * heads.forces(own, model.positions, create_graph)
        return self.statistics.deviation * own + self.statistics.baseline(model.batch), forces

    def predict(self, model):
        """name -> values of a clean pass, in the unit of the labels."""
        self.corrupt(model, model.batch, None)
        energies, forces = self.values(model)
        return {self.settings.target: energies.detach(), "forces": forces.detach()}

    def baseline(self, batch):
        """The same for what is known of the elements alone: no forces."""
        return {self.settings.target: self.statistics.baseline(batch), "forces": torch.zeros_like(batch.positions)}

    def metric(self, errors):
        """What the best model is chosen by, from name -> error with its mae."""
        weights = {self.settings.target: self.settings.energy_weight, "forces": self.settings.force_weight}
        return sum(weight * errors[name].mae for name, weight in weights.items())
