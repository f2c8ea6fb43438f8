"""Which of many vectors is most like another, by cosine, a piece of the similarity matrix at a time.

Legend: p pairs, q queries, l vectors of a library, F channels. All vectors have unit length.
"""

import torch

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("molecule_to_spectrum", "spectrum_to_molecule")
# Cosines closer than this are the same but for rounding in float32.
TIE = 1e-6
# Similarities that are worked on at once: a CPU keeps them in its cache.
CHUNK = {"cpu": 1 << 19, "cuda": 1 << 26}


def ranks(molecules, spectra, chunk=None):
    """Rank of every match among all, from 1: molecules [p, F], spectra [p, F] -> direction -> int64 [p].

    Row i of one matches row i of the other. The rank counts all but those less similar, so that neither ties nor what
    is no number ever help. chunk: similarities that are worked on at once.
    """
    p = len(molecules)
    least = (molecules * spectra).sum(1) - TIE
    above = {name: torch.zeros(p, dtype=torch.int64, device=molecules.device) for name in DIRECTIONS}
    for own, similarities in _pieces(molecules, spectra, chunk):
        # A match counts once, however the product was rounded.
        similarities.diagonal(own.start).fill_(2.0)
        above["molecule_to_spectrum"][own] = (~(similarities < least[own, None])).sum(1)
        above["spectrum_to_molecule"] += (~(similarities < least)).sum(0)
    return above


def recalls(ranks):
    """Recall at k and median rank of each direction, and what chance gives, from ranks -> flat names -> numbers."""
    metrics = {}
    for name, own in ranks.items():
        for k in RECALL_AT:
            metrics[f"recall_at_{k}_{name}"] = (own <= k).double().mean().item()
        metrics[f"median_rank_{name}"] = own.double().median().item()
    p = len(next(iter(ranks.values())))
    for k in RECALL_AT:
        metrics[f"recall_at_{k}_chance"] = min(1.0, k / p)
    return metrics


def nearest(queries, library, k, chunk=None):
    """The k most similar of library [l, F] to each of queries [q, F], best first.

    -> similarities [q, k], int64 numbers in the library [q, k]; k at most l.
    """
    k = min(k, len(library))
    found = [similarities.topk(k, dim=1) for _, similarities in _pieces(queries, library, chunk)]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _pieces(queries, library, chunk):
    """Yield slices of the queries and their similarities [rows, l] to all of the library."""
    chunk = chunk or CHUNK[library.device.type]
    rows = max(1, chunk // max(1, len(library)))
    for start in range(0, len(queries), rows):
        own = slice(start, min(start + rows, len(queries)))
        yield own, queries[own] @ library.T
