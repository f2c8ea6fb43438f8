"""InfoNCE in shares: value and gradients against autograd of the loss written out whole, in float64."""

from dataclasses import replace

import pytest
import torch
from made import ROOT
from torch.nn.functional import normalize

from mspt.data.batch import MoleculeBatch
from mspt.data.shardset import ShardSet
from mspt.objectives import contrast
from mspt.objectives.contrast import info_nce


def whole_loss(molecules, spectra, names, temperature, directions):
    """The sum over pairs, written as the papers do, without the logits of pairs of one name."""
    logits = molecules @ spectra.T / temperature
    target = torch.arange(len(logits))
    for i in range(len(names)):
        for j in range(len(names)):
            if i != j and names[i] == names[j]:
                logits = logits.index_put((target[i], target[j]), torch.tensor(-torch.inf, dtype=logits.dtype))
    loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    if directions == "both":
        loss = (loss + torch.nn.functional.cross_entropy(logits.T, target, reduction="sum")) / 2
    return loss


def unit_vectors(count, width=8):
    return [normalize(torch.randn(count, width, dtype=torch.float64), dim=-1).requires_grad_() for _ in range(2)]


NAMES = torch.tensor([5, -7, 5, 1, 2, 3, -7, 5, 4, 6, 8, 9, 10])  # some pairs twice or more


@pytest.mark.parametrize("directions", ["both", "molecule_to_spectrum"])
@pytest.mark.parametrize("count", [1, 2, 13])
def test_share_is_value_and_gradient_of_the_whole_loss(directions, count):
    torch.manual_seed(count)
    molecules, spectra = unit_vectors(count)
    names = NAMES[:count]
    loss = whole_loss(molecules, spectra, names, 0.07, directions)
    loss.backward()
    share = info_nce(molecules.detach(), spectra.detach(), names, 0.07, directions, across_ranks=False)
    torch.testing.assert_close(share.total, loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(share.molecules, molecules.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(share.spectra, spectra.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("directions", ["both", "molecule_to_spectrum"])
def test_shares_of_all_ranks_add_up_to_the_whole_loss(directions, monkeypatch):
    """Ranks with uneven numbers of pairs, one of them with none; the collective is played by a recording of it."""
    torch.manual_seed(0)
    sizes = [3, 0, 5, 1]
    molecules, spectra = unit_vectors(sum(sizes))
    names = NAMES[: sum(sizes)]
    loss = whole_loss(molecules, spectra, names, 0.1, directions)
    loss.backward()
    parts = list(zip(*(of_all.split(sizes) for of_all in (molecules.detach(), spectra.detach(), names)), strict=True))
    # What every rank would hand to each gather, in the order of the calls.
    both = [molecules.detach(), spectra.detach()]
    same = (names[:, None] == names) & ~torch.eye(len(names), dtype=torch.bool)
    logits = (both[0] @ both[1].T / 0.1).masked_fill(same, -torch.inf)
    answers = [*both, names, logits.logsumexp(1), logits.logsumexp(0)]
    total = 0.0
    for rank, pairs in enumerate(parts):
        replies = iter(answers)
        first = sum(sizes[:rank])
        monkeypatch.setattr(contrast, "gather", lambda local, replies=replies, first=first: (next(replies), first))
        share = info_nce(*pairs, 0.1, directions, across_ranks=True)
        own = slice(first, first + sizes[rank])
        torch.testing.assert_close(share.molecules, molecules.grad[own], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(share.spectra, spectra.grad[own], rtol=1e-10, atol=1e-10)
        total += share.total
    torch.testing.assert_close(total, loss.detach(), rtol=1e-12, atol=1e-12)


def test_names_are_those_of_the_keys():
    """One name for a record that is there twice; none for what has no spectrum and so is in no pair."""
    first, second, third = ShardSet.open(ROOT / "shards/bundled/qm9-spectra/heldout").records(range(3))
    batch = MoleculeBatch.from_records([first, replace(second, spectra={}), third, first])
    names = contrast.Contrast(contrast.ContrastSettings(), None).names(batch).tolist()
    assert len(names) == 3 and names[0] == names[2] != names[1]


def test_no_pairs_give_zero():
    empty = torch.zeros(0, 8)
    share = info_nce(empty, empty, NAMES[:0], 0.07, "both", across_ranks=False)
    assert share.total == 0
    assert share.molecules.shape == (0, 8)
