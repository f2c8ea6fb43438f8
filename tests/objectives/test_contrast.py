"""InfoNCE in shares: value and gradients against autograd of the loss written out whole, in float64."""

import pytest
import torch
from torch.nn.functional import normalize

from mspt.objectives import contrast
from mspt.objectives.contrast import info_nce


def whole_loss(molecules, spectra, temperature, directions):
    """The sum over pairs, written as the papers do."""
    logits = molecules @ spectra.T / temperature
    target = torch.arange(len(logits))
    loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    if directions == "both":
        loss = (loss + torch.nn.functional.cross_entropy(logits.T, target, reduction="sum")) / 2
    return loss


def unit_vectors(count, width=8):
    return [normalize(torch.randn(count, width, dtype=torch.float64), dim=-1).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("directions", ["both", "molecule_to_spectrum"])
@pytest.mark.parametrize("count", [1, 2, 13])
def test_share_is_value_and_gradient_of_the_whole_loss(directions, count):
    torch.manual_seed(count)
    molecules, spectra = unit_vectors(count)
    loss = whole_loss(molecules, spectra, 0.07, directions)
    loss.backward()
    share = info_nce(molecules.detach(), spectra.detach(), 0.07, directions, across_ranks=False)
    torch.testing.assert_close(share.total, loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(share.molecules, molecules.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(share.spectra, spectra.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("directions", ["both", "molecule_to_spectrum"])
def test_shares_of_all_ranks_add_up_to_the_whole_loss(directions, monkeypatch):
    """Ranks with uneven numbers of pairs, one of them with none; the collective is played by a recording of it."""
    torch.manual_seed(0)
    sizes = [3, 0, 5, 1]
    molecules, spectra = unit_vectors(sum(sizes))
    loss = whole_loss(molecules, spectra, 0.1, directions)
    loss.backward()
    parts = list(zip(molecules.detach().split(sizes), spectra.detach().split(sizes), strict=True))
    # What every rank would hand to each gather, in the order of the calls.
    both = [molecules.detach(), spectra.detach()]
    logits = both[0] @ both[1].T / 0.1
    answers = [*both, logits.logsumexp(1), logits.logsumexp(0)]
    total = 0.0
    for rank, (own_molecules, own_spectra) in enumerate(parts):
        replies = iter(answers)
        first = sum(sizes[:rank])
        monkeypatch.setattr(contrast, "gather", lambda local, replies=replies, first=first: (next(replies), first))
        share = info_nce(own_molecules, own_spectra, 0.1, directions, across_ranks=True)
        own = slice(first, first + sizes[rank])
        torch.testing.assert_close(share.molecules, molecules.grad[own], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(share.spectra, spectra.grad[own], rtol=1e-10, atol=1e-10)
        total += share.total
    torch.testing.assert_close(total, loss.detach(), rtol=1e-12, atol=1e-12)


def test_no_pairs_give_zero():
    empty = torch.zeros(0, 8)
    share = info_nce(empty, empty, 0.07, "both", across_ranks=False)
    assert share.total == 0
    assert share.molecules.shape == (0, 8)
