"""What a run has learnt, measured on held-out molecules."""

from dataclasses import dataclass, field
from itertools import chain

import torch

from mspt.chemistry.spectra import SPECTRA
from mspt.data.batch import MoleculeBatch
from mspt.data.keyed import Keyed
from mspt.data.stream import sequential
from mspt.downstream import ranking
from mspt.training.engine import all_reduce, gather_objects, rank_and_size

# Noise and masks of evaluation: an epoch that training never has, so that they are always the same.
EPOCH = -1
EXAMPLES = 3
# Molecules of the similarity picture: with more, a match is thinner than a pixel.
MOST_SIMILARITIES = 200
# The baseline is a mean over the training set; this many records fix it well enough.
BASELINE_RECORDS = 20_000


@dataclass
class Example:
    """One held-out molecule: per spectrum the true patches [N, P], what the model makes of them, which are masked."""

    key: str
    true: dict = field(default_factory=dict)
    predicted: dict = field(default_factory=dict)
    masked: dict = field(default_factory=dict)


@dataclass
class Evaluation:
    """metrics: flat names -> numbers, of what the molecules have. ranks: of ranking.ranks, and similarities [k, k]
    (molecule, spectrum) of the first of its pairs; both None without contrast and without a pair. examples: of
    reconstruction."""

    metrics: dict
    ranks: dict | None
    similarities: torch.Tensor | None
    examples: list


@torch.no_grad()
def evaluate(engine, pretraining, heldout, train, data, seed, device, between):
    """Every rank takes its share of the held-out set; the Evaluation is the same on all.

    engine: the wrapped module; pretraining: the module inside it. heldout: a ShardSet; train: several. data:
    DataSettings. between: called before each batch, as often on every rank.
    """
    generator = Keyed(seed, EPOCH)
    engine.eval()
    sums = torch.zeros(len(pretraining.terms), dtype=torch.float64, device=device)
    weights, pairs, examples = torch.zeros_like(sums), [], []
    trivial = {}  # term of a denoising objective -> its sum where nothing is predicted
    baseline = _Baseline(pretraining, generator, device) if "masked_patches" in pretraining.objectives else None
    if baseline:
        for shardset in [each for each in train if each.manifest["spectra"]]:
            for batch in share(shardset, data, device, BASELINE_RECORDS // len(train)):
                between()
                baseline.learn(batch)
        baseline.agree()
    for batch in share(heldout, data, device):
        between()
        own, extras = engine("evaluate", batch, generator)
        sums += own
        weights += pretraining.weights(batch, generator)
        for term, value in extras.get("trivial", {}).items():
            trivial[term] = trivial.get(term, 0.0) + value
        if "embeddings" in extras:
            pairs.append([part.float().cpu() for part in extras["embeddings"]])
        if baseline:
            baseline.measure(batch)
            examples += _examples(pretraining, batch, extras)[: EXAMPLES - len(examples)]
    engine.train()
    all_reduce(sums)
    all_reduce(weights)
    weights = dict(zip(pretraining.terms, weights.tolist(), strict=True))
    # Of what no molecule has, such as one of the spectra, there is no error.
    means = {term: value / weights[term] for term, value in zip(weights, sums.tolist(), strict=True) if weights[term]}
    metrics = {"molecules": len(heldout)}
    # The errors of predicted spectra, under the names of their terms.
    metrics |= {term: mean for term, mean in means.items() if term.startswith("spectrum_")}
    for term, value in trivial.items():
        all_reduce(value)
        if term in means:
            metrics |= {f"denoise_{term}": means[term], f"denoise_{term}_baseline": value.item() / weights[term]}
    masked = [name for name in SPECTRA if f"masked_{name}" in means]
    errors = baseline.errors() if baseline else {}
    if masked:
        metrics["masked_mse"] = sum(means[f"masked_{name}"] for name in masked)
        metrics["masked_mse_baseline"] = sum(errors[name] for name in masked)
        metrics |= {f"masked_mse_{name}": means[f"masked_{name}"] for name in masked}
        metrics |= {f"masked_mse_baseline_{name}": errors[name] for name in masked}
    ranks = similarities = None
    if "contrast" in pretraining.objectives:
        molecules, spectra = (torch.cat(parts) for parts in zip(*chain(*gather_objects(pairs)), strict=True))
        metrics["pairs"] = len(molecules)
        if len(molecules):
            ranks = ranking.ranks(molecules, spectra)
            similarities = molecules[:MOST_SIMILARITIES] @ spectra[:MOST_SIMILARITIES].T
            metrics |= ranking.recalls(ranks)
    return Evaluation(metrics, ranks, similarities, examples)


class _Baseline:
    """What predicting, for a masked patch, the mean of the visible patches at its position would give."""

    def __init__(self, pretraining, generator, device):
        self.specformer = pretraining.network.specformer
        self.objective = pretraining.objectives["masked_patches"]
        self.generator = generator
        shapes = {
            name: (self.specformer.patch_counts[name], self.specformer.settings.patches[name].length)
            for name in SPECTRA
        }
        double = {"dtype": torch.float64, "device": device}
        self.sums = {name: torch.zeros(shape, **double) for name, shape in shapes.items()}
        self.counts = {name: torch.zeros(shape[0], 1, **double) for name, shape in shapes.items()}
        self.wrong = {name: torch.zeros(2, **double) for name in shapes}

    def _patches(self, batch):
        """Per spectrum its patches [m, N, P], and bool [m, N]: masked, there."""
        masks, patches = self.objective.masks(batch, self.generator), self.specformer.patches(batch.spectra)
        for name in SPECTRA:
            yield name, patches[name].double(), masks[name], batch.present[name][:, None]

    def learn(self, batch):
        for name, patches, masked, present in self._patches(batch):
            visible = (~masked & present)[..., None]
            self.sums[name] += torch.where(visible, patches, 0.0).sum(0)
            self.counts[name] += visible.sum(0)

    def agree(self):
        """Add up what the ranks have learnt."""
        for tensor in (*self.sums.values(), *self.counts.values()):
            all_reduce(tensor)

    def measure(self, batch):
        for name, patches, masked, present in self._patches(batch):
            mean = self.sums[name] / self.counts[name].clamp(min=1)
            counted = masked & present
            error = (patches - mean).square().mean(-1)
            self.wrong[name] += torch.stack([torch.where(counted, error, 0.0).sum(), counted.sum()])

    def errors(self):
        """Mean square error per spectrum, over all ranks."""
        wrong = torch.stack(list(self.wrong.values()))
        all_reduce(wrong)
        return {
            name: (error / count.clamp(min=1)).item() for name, (error, count) in zip(self.wrong, wrong, strict=True)
        }


def _examples(pretraining, batch, extras):
    """Examples of the molecules in batch that have all three spectra."""
    true = pretraining.network.specformer.patches(batch.spectra)
    whole = torch.stack([batch.present[name] for name in SPECTRA]).all(0)
    return [
        Example(
            key=batch.keys[i],
            true={name: true[name][i].float().cpu() for name in SPECTRA},
            predicted={name: extras["reconstruction"][name][i].float().cpu() for name in SPECTRA},
            masked={name: extras["masked"][name][i].cpu() for name in SPECTRA},
        )
        for i in whole.nonzero()[:EXAMPLES, 0].tolist()
    ]


def share(shardset, data, device, records=None, labels=((), False)):
    """This rank's batches of a shard set, as many as every other rank's (ZeRO 3 needs all in every forward).

    records: about so many of those that have a spectrum. labels: names of the targets that they carry, and whether
    they carry forces.
    """
    rank, world_size = rank_and_size()
    group, seen = [], 0
    for batch in sequential(shardset, data.budget, *labels, data.on_bad_block):
        group.append(batch)
        seen += int(torch.stack(list(batch.present.values())).any(0).sum())
        if len(group) == world_size:
            yield group[rank].to(device).broadened(data.line_shapes, data.spectra)
            group = []
            if records is not None and seen >= records:
                return
    if group:
        own = group[rank] if rank < len(group) else MoleculeBatch.empty()
        yield own.to(device).broadened(data.line_shapes, data.spectra)
