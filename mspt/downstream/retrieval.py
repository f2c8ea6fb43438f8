"""Which spectrum belongs to a molecule, and which molecule to a spectrum, by a network trained with contrast.

Legend: N molecules of a set, p of them with a spectrum, F channels, L points of a spectrum's grid.
"""

import csv
import io
from typing import NamedTuple

import torch
from torch.nn.functional import normalize

from mspt.chemistry.spectra import GRIDS, SPECTRA
from mspt.data.look import table
from mspt.data.opening import broadened
from mspt.downstream import ranking
from mspt.errors import UserError
from mspt.models.pretraining import Pass


class Library(NamedTuple):
    """A set's molecules and spectra as unit vectors.

    molecules [N, F]. spectra: subset, such as "ir,raman" -> [N, F] of the molecules seen with these spectra alone;
    there: subset -> bool [N], whether a molecule has any of them. mean: spectrum -> [L], over the molecules that have
    it; NaN where none has.
    """

    keys: list
    molecules: torch.Tensor
    spectra: dict
    there: dict
    mean: dict


@torch.no_grad()
def read(network, molecules, subsets, settings, device):
    """Embed a set, as opening.open_set gives it -> Library. subsets: such as ["ir", "ir,raman"]; may be empty.

    network: with a SpecFormer, on device. settings: DataSettings, of the spectra that the network learnt from.
    """
    keys, vectors, counts = [], [], dict.fromkeys(SPECTRA, 0)
    spectra, there = ({subset: [] for subset in subsets} for _ in range(2))
    sums = {name: torch.zeros(grid.length, dtype=torch.float64, device=device) for name, grid in GRIDS.items()}
    for batch in broadened(molecules, settings, device):
        one = Pass(network, batch)
        keys += batch.keys
        vectors.append(normalize(one.molecules, dim=-1))
        for name in SPECTRA:
            sums[name] += batch.spectra[name][batch.present[name]].sum(0, dtype=torch.float64)
            counts[name] += int(batch.present[name].sum())
        for subset in subsets:
            present = {name: own & (name in subset.split(",")) for name, own in batch.present.items()}
            spectra[subset].append(normalize(network.specformer(one.patches, present)[1].float(), dim=-1))
            there[subset].append(torch.stack(list(present.values())).any(0))
    return Library(
        keys,
        torch.cat(vectors),
        {subset: torch.cat(parts) for subset, parts in spectra.items()},
        {subset: torch.cat(parts) for subset, parts in there.items()},
        {name: sums[name] / counts[name] if counts[name] else sums[name] * torch.nan for name in SPECTRA},
    )


def rank(library, source):
    """The ranks of all matches: subset -> direction -> [p]. source names the set where a subset is in none of it."""
    found = {}
    for subset, there in library.there.items():
        if not there.any():
            raise UserError(f"--spectra {subset}: no molecule of {source} has such a spectrum; leave it out")
        found[subset] = ranking.ranks(library.molecules[there], library.spectra[subset][there])
    return found


def report(found, queries):
    """What rank found, as text for a person. queries: molecule, spectrum, or both."""
    head = ("spectra", "queries", "pairs", *(f"recall@{k}" for k in ranking.RECALL_AT), "median rank")
    rows = []
    for subset, ranks in found.items():
        metrics, pairs = ranking.recalls(ranks), len(ranks[ranking.DIRECTIONS[0]])
        for direction in ranking.DIRECTIONS:
            if direction.split("_")[0] in queries:
                recall = [f"{metrics[f'recall_at_{k}_{direction}']:.1%}" for k in ranking.RECALL_AT]
                median = f"{metrics[f'median_rank_{direction}']:.0f}"
                rows.append((subset, direction.replace("_to_", " → "), str(pairs), *recall, median))
        chance = [f"{metrics[f'recall_at_{k}_chance']:.1%}" for k in ranking.RECALL_AT]
        rows.append((subset, "chance", str(pairs), *chance, f"{(pairs + 1) / 2:.0f}"))
    return "\n".join(table([head, *rows], indent=""))


def answers(library, found, queries, k):
    """The k best answers to every query as CSV, one row an answer; match_rank: of the right one."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("spectra", "queries", "query", "match_rank", "place", "answer", "cosine"))
    for subset, ranks in found.items():
        there = library.there[subset]
        keys = [library.keys[i] for i in there.nonzero()[:, 0].tolist()]
        sides = {"molecule": library.molecules[there], "spectrum": library.spectra[subset][there]}
        for direction in ranking.DIRECTIONS:
            asked, answered = direction.split("_to_")
            if asked not in queries:
                continue
            cosines, numbers = ranking.nearest(sides[asked], sides[answered], k)
            rows = zip(keys, ranks[direction].tolist(), cosines.tolist(), numbers.tolist(), strict=True)
            for key, match, own, best in rows:
                for place, (cosine, number) in enumerate(zip(own, best, strict=True), 1):
                    writer.writerow((subset, asked, key, match, place, keys[number], f"{cosine:.5f}"))
    return text.getvalue()
