"""Contrast that aligns molecules and their spectra (InfoNCE, van den Oord et al., 2018; MolSpectra, ICLR 2025)."""

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from mspt.chemistry.spectra import SPECTRA
from mspt.data import keyed
from mspt.settings import Settings


class ContrastSettings(Settings):
    """weight: in the joint loss. temperature: of the cosine similarities.

    directions: `both`, or `molecule_to_spectrum` as in the published code.
    negatives: `micro`, those of the micro-batch (the published code's); `ranks`, those of the micro-batches that all
    ranks process together; `global`, those of the whole global batch, by a first pass for the embeddings alone (Gao
    et al., 2021), so that the loss does not depend on how the batch is cut.
    """

    weight: float = Field(1.0, ge=0)
    temperature: float = Field(0.07, gt=0)
    directions: Literal["both", "molecule_to_spectrum"] = "both"
    negatives: Literal["micro", "ranks", "global"] = "ranks"


class Share(NamedTuple):
    """A share of the InfoNCE loss: the sum over local pairs, and its gradients to the local embeddings [p, F]."""

    total: Tensor
    molecules: Tensor
    spectra: Tensor


def gather(local):
    """Rows [p, …] of every rank, end to end in rank order; p may differ. -> rows, index of the first local row."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local, 0
    count = torch.tensor([len(local)], device=local.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    counts = [int(c) for c in counts]
    padded = local.new_zeros(max(counts), *local.shape[1:])
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    rows = torch.cat([part[:c] for part, c in zip(parts, counts, strict=True)])
    return rows, sum(counts[: dist.get_rank()])


@torch.no_grad()
def info_nce(molecules, spectra, names, temperature, directions, across_ranks):
    """This rank's Share of −log softmax of the matching pairs among all pairs.

    molecules, spectra [p, F]: unit vectors, row i of one matching row i of the other; pairs of one name [p] are no
    negatives of each other. Every rank works on its own rows and columns of the similarity matrix, [p, all] twice;
    what it needs of the others' softmax is one number a row. So the exact gradient over all ranks costs no second
    exchange and no [all, all] matrix.
    """
    # U [a, F], V [a, F]: embeddings of all pairs; own rows are U[own], V[own].
    all_molecules, first = gather(molecules) if across_ranks else (molecules, 0)
    all_spectra = gather(spectra)[0] if across_ranks else spectra
    all_names = gather(names)[0] if across_ranks else names
    own = torch.arange(first, first + len(molecules), device=molecules.device)
    local = torch.arange(len(own), device=own.device)
    same = names[:, None] == all_names
    same[local, own] = False
    left_out = torch.zeros_like(same, dtype=molecules.dtype).masked_fill(same, -torch.inf)
    rows = molecules @ all_spectra.T / temperature + left_out  # [p, a], molecule -> spectrum
    columns = spectra @ all_molecules.T / temperature + left_out  # [p, a], spectrum -> molecule
    row_norm = rows.logsumexp(1)
    all_row_norms = gather(row_norm)[0] if across_ranks else row_norm
    total = (row_norm - rows[local, own]).sum()
    # Softmax over spectra of every molecule, seen from the own molecules and from the own spectra.
    grad_molecules = (rows - row_norm[:, None]).exp() @ all_spectra - spectra
    grad_spectra = (columns - all_row_norms[None]).exp() @ all_molecules - molecules
    if directions == "both":
        column_norm = columns.logsumexp(1)
        all_column_norms = gather(column_norm)[0] if across_ranks else column_norm
        total = (total + (column_norm - columns[local, own]).sum()) / 2
        grad_molecules = (grad_molecules + (rows - all_column_norms[None]).exp() @ all_spectra - spectra) / 2
        grad_spectra = (grad_spectra + (columns - column_norm[:, None]).exp() @ all_molecules - molecules) / 2
    return Share(total, grad_molecules / temperature, grad_spectra / temperature)


class Contrast(nn.Module):
    """InfoNCE between molecule vectors and spectrum readouts of the molecules that have a spectrum.

    A record that a batch holds twice, or under one key from several sets, is no negative of itself.

    Sum: over pairs. Weight: the number of pairs.
    """

    def __init__(self, settings, network):
        super().__init__()
        self.settings = settings
        self.terms = {"contrast": 1.0}

    def embeddings(self, model, batch):
        """Unit vectors of the pairs: molecules [p, F], spectra [p, F]."""
        pairs = self.pairs(batch)
        readout = model.spectrum[1].to(model.molecules.dtype)
        return normalize(model.molecules[pairs], dim=-1), normalize(readout[pairs], dim=-1)

    @staticmethod
    def pairs(batch):
        """bool [m]: molecules with at least one spectrum."""
        return torch.stack([batch.present[name] for name in SPECTRA]).any(0)

    def names(self, batch):
        """int64 [p]: a word for the key of each pair."""
        words = [keyed.word(key) for key in batch.keys]
        return torch.tensor(words, dtype=torch.int64, device=batch.ptr.device)[self.pairs(batch)]

    def corrupt(self, model, batch, generator):
        """Contrast sees what the others leave: the noisy structure and the masked spectra."""

    def weights(self, batch, generator):
        return self.pairs(batch).sum()[None].to(batch.positions.dtype)

    def shares(self, embeddings):
        """The Share of each micro-batch of this step, from the embeddings of all of them (negatives: global).

        embeddings: one (molecules [p, F], spectra [p, F], names [p]) a micro-batch.
        """
        pairs = [torch.cat(parts) for parts in zip(*embeddings, strict=True)]
        share = info_nce(*pairs, self.settings.temperature, self.settings.directions, across_ranks=True)
        sizes = [len(part[0]) for part in embeddings]
        # The value is reported once, with the first micro-batch; the gradients belong to each.
        totals = [share.total, *[torch.zeros_like(share.total)] * (len(sizes) - 1)]
        parts = zip(totals, share.molecules.split(sizes), share.spectra.split(sizes), strict=True)
        return [Share(*part) for part in parts]

    def forward(self, model, batch, generator, share=None):
        """share: this micro-batch's, where the negatives are global."""
        molecules, spectra = self.embeddings(model, batch)
        if share is None:
            pairs = molecules.detach(), spectra.detach(), self.names(batch)
            across_ranks = self.settings.negatives == "ranks"
            share = info_nce(*pairs, self.settings.temperature, self.settings.directions, across_ranks)
        # A term whose gradient is the share's and whose value is the share's total.
        linear = (molecules * share.molecules).sum() + (spectra * share.spectra).sum()
        total = linear - linear.detach() + share.total
        return total[None]
