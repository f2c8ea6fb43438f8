"""Spectra predicted from structures, and how much closer they come than what needs no network.

Names in a store of predictions for N molecules, in the order of the set; NAME: ir, raman, uv_vis, as the run predicts:

    keys, keys_ptr [N + 1]    UTF-8 text end to end
    spectra/NAME [N, L]       intensities on the grid, in the units of training, float32
    scores/NAME/SCORE [N]     cosine, pearson, sis against the set's own spectrum, NaN where it has none

Attributes: kind ("predicted spectra"), run, data, records, grids, scores (their means) and arrays.

Legend: N molecules, m of a batch, c compositions, L points of a spectrum's grid.
"""

import numpy as np
import torch

from mspt import files
from mspt.chemistry.elements import MAX_NUMBER
from mspt.chemistry.spectra import GRIDS
from mspt.data.block import ptr_of
from mspt.data.look import table
from mspt.data.opening import broadened
from mspt.data.shardset import grids
from mspt.data.zarr_arrays import StoreWriter
from mspt.downstream import similarity
from mspt.errors import UserError
from mspt.models.pretraining import Pass

KIND = "predicted spectra"
SCORES = ("cosine", "pearson", "sis")
PREDICTORS = {"model": "the run", "composition": "same composition", "mean": "mean spectrum"}


class Training:
    """The spectra of a training set as baselines: their mean, and their means over molecules of one composition."""

    def __init__(self, names):
        self.rows = {}  # composition -> row of the tables
        self.sums = {name: torch.zeros(0, GRIDS[name].length) for name in names}
        self.counts = {name: torch.zeros(0) for name in names}

    def learn(self, batch):
        """Take in a MoleculeBatch, broadened."""
        found = [self.rows.setdefault(tuple(row), len(self.rows)) for row in compositions(batch).int().tolist()]
        rows = torch.tensor(found, dtype=torch.int64)
        for name, sums in self.sums.items():
            own = batch.present[name].cpu()
            missing = len(self.rows) - len(sums)
            sums = torch.cat([sums, sums.new_zeros(missing, sums.shape[1])])
            counts = torch.cat([self.counts[name], torch.zeros(missing)])
            self.sums[name] = sums.index_add(0, rows[own], batch.spectra[name].cpu()[own].float())
            self.counts[name] = counts.index_add(0, rows[own], torch.ones(int(own.sum())))

    def mean(self, name):
        """[L]; zeros where no molecule has the spectrum."""
        return self.sums[name].sum(0) / self.counts[name].sum().clamp(min=1)

    def composition(self, name, batch):
        """The mean over the molecules whose composition is a molecule's own, or nearest by the atoms that differ.

        -> [m, L]
        """
        own = self.counts[name] > 0
        if not own.any():
            return torch.zeros(len(batch.keys), GRIDS[name].length)
        known = torch.tensor(list(self.rows), dtype=torch.float32)[own]
        apart = torch.cdist(compositions(batch), known, p=1)
        nearest = (apart <= apart.min(1, keepdim=True).values + 0.5).float()
        return nearest @ self.sums[name][own] / (nearest @ self.counts[name][own])[:, None]


def compositions(batch):
    """How many atoms of each element a MoleculeBatch's molecules have: float32 [m, elements known + 1], on the CPU."""
    counts = torch.zeros(len(batch.keys), MAX_NUMBER + 1)
    ones = torch.ones(len(batch.numbers))
    return counts.index_put_((batch.molecule.cpu(), batch.numbers.cpu()), ones, accumulate=True)


@torch.no_grad()
def predict(network, objective, batch):
    """name -> intensities [m, L] of the molecules of a MoleculeBatch. objective: a SpectrumPrediction."""
    predicted = objective.predict(Pass(network, batch))
    return {name: (10 ** values.float() - 1).clamp(min=0) for name, values in predicted.items()}


def compare(network, objective, molecules, training, settings, device, out, about):
    """Write the predictions for a set as the store out -> name -> predictor -> score -> its values [N].

    training: a Training. settings: DataSettings. about: what the store's attributes say of run and data. A molecule
    without a spectrum, or with one that is zero throughout, has NaN scores. Raises UserError where what is predicted is
    not finite.
    """
    names = list(objective.heads)
    found = {name: {who: {score: [] for score in SCORES} for who in PREDICTORS} for name in names}
    with files.new_folder(out) as aside:
        store = StoreWriter(aside)
        for batch in broadened(molecules, settings, device):
            predicted = {name: values.cpu() for name, values in predict(network, objective, batch).items()}
            texts = [key.encode() for key in batch.keys]
            columns = {"keys": np.frombuffer(b"".join(texts), np.uint8)}
            for name in names:
                broken = (~predicted[name].isfinite().all(1)).nonzero()[:, 0].tolist()
                if broken:
                    raise UserError(f"the {name} predicted of {batch.keys[broken[0]]} is not finite; give another run")
                true = batch.spectra[name].cpu()
                there = batch.present[name].cpu() & (true > 0).any(1)
                others = {
                    "model": predicted[name],
                    "composition": training.composition(name, batch),
                    "mean": training.mean(name).expand_as(true),
                }
                columns[f"spectra/{name}"] = predicted[name].numpy()
                for who, values in others.items():
                    for score, row in similarity.scores(name, true, values).items():
                        found[name][who][score].append(torch.where(there, row, torch.nan).numpy())
                for score in SCORES:
                    columns[f"scores/{name}/{score}"] = found[name]["model"][score][-1]
            for column, values in columns.items():
                store.column(column, values).extend(values)
            ptr = ptr_of([len(text) for text in texts])
            store.column("keys_ptr", ptr).extend_ptr(ptr)
        whole = {
            name: {
                who: {score: np.concatenate(parts) for score, parts in rows.items()} for who, rows in predictors.items()
            }
            for name, predictors in found.items()
        }
        about = about | {"kind": KIND, "records": len(molecules), "grids": grids(), "scores": means(whole)}
        store.close(about)
    return whole


def means(found):
    """What compare gives -> name -> molecules that were compared, and predictor -> score -> mean, or None of none."""
    result = {}
    for name, predictors in found.items():
        there = np.isfinite(predictors["model"]["cosine"])
        result[name] = {"molecules": int(there.sum())}
        for who, rows in predictors.items():
            result[name][who] = {
                score: float(values[there].mean()) if there.any() else None for score, values in rows.items()
            }
    return result


def report(means):
    """What means gives as text for a person."""
    rows = [("spectrum", "molecules", "by", "cosine", "Pearson", "SIS")]
    for name, own in means.items():
        if own["molecules"]:
            for who, title in PREDICTORS.items():
                values = (f"{own[who][score]:.3f}" for score in SCORES)
                rows.append((name, str(own["molecules"]), title, *values))
    return "\n".join(table(rows, indent="")) if len(rows) > 1 else "nothing to compare with: the set has no spectra"
