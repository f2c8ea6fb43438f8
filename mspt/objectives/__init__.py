"""The objectives, and the one module that the engine wraps: network and objectives together.

An objective is an nn.Module built from (settings, network) with

- `terms`: name -> factor of the terms of its loss, k of them;
- `corrupt(model, batch, generator)`: sets on the pass what the network gets to see (noise, masks);
- `weights(batch, generator) -> [k]`: what each term's sum is to be divided by, known before any forward pass;
- `forward(model, batch, generator) -> sums [k]`, to be divided by the weights;
- where it denoises, `trivial(batch, generator) -> sums [k]`: what predicting nothing gives;
- where it needs statistics of what it learns from, `fit(shardsets, settings)`: takes them before training
  (settings: DataSettings);
- where it learns from labels, `supervised = True`, `labels`: names of the targets and whether forces are needed,
  `learns`: what a run cannot change of it,
  `predict(model)` and `baseline(batch)`: name -> values as the labels are, by the network and by the statistics alone,
  `metric(errors)`: what the best model is chosen by.

Class attributes say what it needs of others: `takes_forces` (its forward differentiates an energy by the positions) and
`needs_bonds`.

model is the Pass over this micro-batch, batch the clean MoleculeBatch, generator a Keyed source of random numbers.
Sums and weights are added up over micro-batches and ranks before one is divided by the other, so that the gradient
of a global batch is the same however the batch was cut.
"""

import torch
from torch import nn

from mspt.errors import UserError
from mspt.models.pretraining import Network, Pass
from mspt.objectives.contrast import Contrast, ContrastSettings
from mspt.objectives.coord import Coord, CoordSettings
from mspt.objectives.distance import SE3DDM, SE3DDMSettings
from mspt.objectives.energy import EMGP, EMGPSettings
from mspt.objectives.forces import Forces, ForcesSettings
from mspt.objectives.fractional import Frad, FradSettings
from mspt.objectives.masked_patches import MaskedPatches, MaskedPatchesSettings
from mspt.objectives.properties import Property, PropertySettings
from mspt.objectives.spectrum_prediction import SpectrumPrediction, SpectrumPredictionSettings
from mspt.settings import Settings

# Of these one at most: each says at which positions the network sees the molecules.
DENOISING = {"coord": Coord, "se3_ddm": SE3DDM, "emgp": EMGP, "frad": Frad}
# Each corrupts what those before it leave: forces come last, they are taken at the positions that the network sees.
OBJECTIVES = DENOISING | {
    "masked_patches": MaskedPatches,
    "contrast": Contrast,
    "spectrum_prediction": SpectrumPrediction,
    "property": Property,
    "forces": Forces,
}


class ObjectivesSettings(Settings):
    """Which objectives train together; null leaves one out."""

    coord: CoordSettings | None = None
    se3_ddm: SE3DDMSettings | None = None
    emgp: EMGPSettings | None = None
    frad: FradSettings | None = None
    masked_patches: MaskedPatchesSettings | None = None
    contrast: ContrastSettings | None = None
    property: PropertySettings | None = None
    forces: ForcesSettings | None = None
    spectrum_prediction: SpectrumPredictionSettings | None = None

    def chosen(self):
        """name -> settings of the objectives that are on."""
        return {name: settings for name in OBJECTIVES if (settings := getattr(self, name)) is not None}


class Pretraining(nn.Module):
    """Network and objectives; its forward gives a micro-batch's share of the global loss.

    Raises UserError where no objective is on, two of them denoise, or one needs spectra and there is no SpecFormer.
    """

    def __init__(self, network_settings, objectives_settings):
        super().__init__()
        chosen = objectives_settings.chosen()
        if not chosen:
            raise UserError(f"objectives: none is on; set at least one of {', '.join(OBJECTIVES)}")
        denoising = [name for name in chosen if name in DENOISING]
        if len(denoising) > 1:
            raise UserError(
                f"objectives: {' and '.join(denoising)} are two ways of denoising, and a structure has one noise; set "
                f"objectives.{denoising[0]}=null, or the other"
            )
        for name in ("masked_patches", "contrast"):
            if name in chosen and network_settings.specformer is None:
                raise UserError(f"objectives.{name} needs spectra, but model.specformer is null; set it")
        self.network = Network(network_settings)
        self.objectives = nn.ModuleDict({name: OBJECTIVES[name](chosen[name], self.network) for name in chosen})
        # term -> its weight in the joint loss, in the order of sums and weights
        self.terms = {
            term: chosen[name].weight * factor
            for name, objective in self.objectives.items()
            for term, factor in objective.terms.items()
        }

    @property
    def supervised(self):
        """The objectives that learn from labels, by name."""
        return {name: each for name, each in self.objectives.items() if getattr(each, "supervised", False)}

    @property
    def labels(self):
        """Names of all targets that batches must carry, and whether they must carry forces."""
        labels = [objective.labels for objective in self.supervised.values()]
        targets = dict.fromkeys(name for names, _ in labels for name in names)
        return tuple(targets), any(forces for _, forces in labels)

    @property
    def takes_forces(self):
        """Whether a step differentiates an energy by the positions; the Engine must know."""
        return self._any("takes_forces")

    @property
    def needs_bonds(self):
        """Whether records should have their bonds."""
        return self._any("needs_bonds")

    def _any(self, attribute):
        return any(getattr(objective, attribute, False) for objective in self.objectives.values())

    @property
    def two_passes(self):
        """Whether a step needs the embeddings of all its micro-batches first (contrast with global negatives)."""
        return "contrast" in self.objectives and self.objectives["contrast"].settings.negatives == "global"

    def weights(self, batch, generator):
        """What each term's sum over this micro-batch is to be divided by, [terms] in float64."""
        return torch.cat([objective.weights(batch, generator) for objective in self.objectives.values()]).double()

    def corrupted(self, batch, generator):
        """The Pass over batch with every objective's noise and masks set, and in training what the encoder sees."""
        model = Pass(self.network, batch)
        if self.training and getattr(self.network.encoder, "sees_bonds", False):
            model.modes = self.network.encoder.settings.modes.drawn(batch.records, generator)
        for objective in self.objectives.values():
            objective.corrupt(model, batch, generator)
        return model

    def forward(self, method, *arguments):
        """The engine hooks into forward alone, so everything that needs the parameters comes in through it."""
        methods = {"loss": self.loss, "embed": self.embed, "evaluate": self.evaluate, "predict": self.predict}
        return methods[method](*arguments)

    def loss(self, batch, generator, totals, share=None):
        """A micro-batch's share of the global loss.

        totals [terms]: the weights of the global batch. share: of contrast, where the negatives are global.
        -> loss (scalar), sums [terms] (detached, float64).
        """
        model = self.corrupted(batch, generator)
        sums = torch.cat(
            [
                objective(model, batch, generator, *([share] if name == "contrast" else []))
                for name, objective in self.objectives.items()
            ]
        )
        factors = torch.tensor(list(self.terms.values()), dtype=sums.dtype, device=sums.device)
        loss = (factors * sums / totals.clamp(min=1).to(sums.dtype)).sum() + model.anchor()
        return loss, sums.detach().double()

    def embed(self, batch, generator):
        """Contrast's unit vectors of the micro-batch as the loss will see it: molecules [p, F], spectra [p, F]; and the
        pairs' names [p].
        """
        contrast = self.objectives["contrast"]
        return *contrast.embeddings(self.corrupted(batch, generator), batch), contrast.names(batch)

    def evaluate(self, batch, generator):
        """What evaluation looks at, without gradient.

        -> sums [terms] of the corrupted batch (contrast, which depends on its company, and what predict() is for, as
        0); of a denoising objective those of predicting nothing (term -> sum); where there is a SpecFormer the
        reconstruction (name -> [m, N, P]) and masks (name -> [m, N]); where there is contrast the unit vectors of the
        clean molecules and whole spectra [p, F] twice.
        """
        model = self.corrupted(batch, generator)
        sums, extras = [], {}
        for name, objective in self.objectives.items():
            if name == "contrast" or name in self.supervised:
                sums.append(torch.zeros(len(objective.terms), dtype=torch.float64, device=batch.ptr.device))
            if name == "contrast":
                extras["embeddings"] = objective.embeddings(Pass(self.network, batch), batch)
            elif name not in self.supervised:
                sums.append(objective(model, batch, generator).double())
            if name in DENOISING:
                trivial = objective.trivial(batch, generator).double()
                extras["trivial"] = dict(zip(objective.terms, trivial, strict=True))
            if name == "masked_patches":
                extras["reconstruction"], extras["masked"] = model.reconstruction, model.masked
        return torch.cat(sums), extras

    def predict(self, batch):
        """What the supervised objectives make of the clean structures: name -> values, in the units of the labels."""
        # Each in a pass of its own: forces are by positions that the energy must be computed from anew.
        parts = [each.predict(Pass(self.network, batch)) for each in self.supervised.values()]
        return {name: value for part in parts for name, value in part.items()}

    def baseline(self, batch):
        """The same without the network."""
        return {name: value for each in self.supervised.values() for name, value in each.baseline(batch).items()}
