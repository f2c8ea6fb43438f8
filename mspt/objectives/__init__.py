"""The objectives, and the one module that the engine wraps: network and objectives together.

An objective is an nn.Module built from (settings, network) with

- `terms`: the names of the terms of its loss, k of them;
- `corrupt(model, batch, generator)`: sets on the pass what the network gets to see (noise, masks);
- `weights(batch, generator) -> [k]`: what each term's sum is to be divided by, known before any forward pass;
- `forward(model, batch, generator) -> sums [k]`, to be divided by the weights.

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
from mspt.objectives.masked_patches import MaskedPatches, MaskedPatchesSettings
from mspt.settings import Settings

OBJECTIVES = {"coord": Coord, "masked_patches": MaskedPatches, "contrast": Contrast}


class ObjectivesSettings(Settings):
    """Which objectives train together; null leaves one out."""

    coord: CoordSettings | None = None
    masked_patches: MaskedPatchesSettings | None = None
    contrast: ContrastSettings | None = None

    def chosen(self):
        """name -> settings of the objectives that are on."""
        return {name: settings for name in OBJECTIVES if (settings := getattr(self, name)) is not None}


class Pretraining(nn.Module):
    """Network and objectives; its forward gives a micro-batch's share of the global loss.

    Raises UserError where no objective is on, or one needs spectra and there is no SpecFormer.
    """

    def __init__(self, network_settings, objectives_settings):
        super().__init__()
        chosen = objectives_settings.chosen()
        if not chosen:
            raise UserError(f"objectives: none is on; set at least one of {', '.join(OBJECTIVES)}")
        for name in ("masked_patches", "contrast"):
            if name in chosen and network_settings.specformer is None:
                raise UserError(f"objectives.{name} needs spectra, but model.specformer is null; set it")
        self.network = Network(network_settings)
        self.objectives = nn.ModuleDict({name: OBJECTIVES[name](chosen[name], self.network) for name in chosen})
        # term -> its objective's weight in the joint loss, in the order of sums and weights
        self.terms = {
            term: chosen[name].weight for name, objective in self.objectives.items() for term in objective.terms
        }

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
        return {"loss": self.loss, "embed": self.embed, "evaluate": self.evaluate}[method](*arguments)

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
        """Contrast's unit vectors of the micro-batch as the loss will see it: molecules [p, F], spectra [p, F]."""
        return self.objectives["contrast"].embeddings(self.corrupted(batch, generator), batch)

    def evaluate(self, batch, generator):
        """What evaluation looks at, without gradient.

        -> sums [terms] of the corrupted batch (contrast, which depends on its company, as 0); where there is a
        SpecFormer the reconstruction (name -> [m, N, P]) and masks (name -> [m, N]); where there is contrast the
        unit vectors of the clean molecules and whole spectra [p, F] twice.
        """
        model = self.corrupted(batch, generator)
        sums, extras = [], {}
        for name, objective in self.objectives.items():
            if name == "contrast":
                sums.append(torch.zeros(1, dtype=torch.float64, device=batch.ptr.device))
                extras["embeddings"] = objective.embeddings(Pass(self.network, batch), batch)
            else:
                sums.append(objective(model, batch, generator).double())
            if name == "masked_patches":
                extras["reconstruction"], extras["masked"] = model.reconstruction, model.masked
        return torch.cat(sums), extras
