"""Ranks of planted matches, ties, and pieces of the similarity matrix against the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from mspt.downstream.ranking import DIRECTIONS, nearest, ranks, recalls


def unit(*shape, seed=0):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def dense(molecules, spectra):
    """Ranks from the whole matrix in float64."""
    matrix = molecules.double() @ spectra.double().T
    return [(m >= m.diagonal()[:, None] - 1e-6).sum(1) for m in (matrix, matrix.T)]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 400), st.integers(0, 2**32), st.booleans())
def test_pieces_are_the_whole(p, chunk, seed, doubled):
    """With matches that stand out and, doubled, with every spectrum there twice."""
    molecules = unit(p, 4, seed=seed)
    spectra = normalize(molecules + 0.5 * unit(p, 4, seed=seed + 1), dim=-1)
    if doubled:
        spectra[p // 2 :] = spectra[: p - p // 2].clone()
    found = ranks(molecules, spectra, chunk)
    for direction, expected in zip(DIRECTIONS, dense(molecules, spectra), strict=True):
        assert found[direction].tolist() == expected.tolist()


def test_ties_never_help():
    """Of three equal spectra each is the last of the three, to its own molecule."""
    molecules = torch.eye(4)
    spectra = torch.eye(4)[[0, 0, 0, 3]]
    found = ranks(molecules, spectra)
    assert found["molecule_to_spectrum"].tolist() == [3, 4, 4, 1]  # to others' spectra molecules 1 and 2 have cosine 0
    assert found["spectrum_to_molecule"].tolist() == [1, 4, 4, 1]


def test_vectors_that_are_all_the_same_are_no_match():
    """A collapsed network: rank p for all, recall 0."""
    metrics = recalls(ranks(unit(1, 8).expand(50, 8), unit(1, 8, seed=1).expand(50, 8), chunk=70))
    assert metrics["recall_at_10_molecule_to_spectrum"] == 0
    assert metrics["median_rank_spectrum_to_molecule"] == 50


def test_what_is_no_number_is_no_match():
    """As of a network that has not come out of its training."""
    molecules, spectra = unit(20, 8), unit(20, 8)
    molecules[3], spectra[7] = torch.nan, torch.nan
    for chunk in (None, 30):
        for own in ranks(molecules, spectra, chunk).values():
            assert own[3] == own[7] == 20
            assert own.min() >= 1


def test_recall_of_planted_ranks():
    metrics = recalls({direction: torch.tensor([1, 1, 2, 5, 6, 10, 11, 40]) for direction in DIRECTIONS})
    recall = [metrics[f"recall_at_{k}_molecule_to_spectrum"] for k in (1, 5, 10)]
    assert recall == [2 / 8, 4 / 8, 6 / 8]
    assert metrics["median_rank_molecule_to_spectrum"] == 5
    assert metrics["recall_at_5_chance"] == 5 / 8
    assert metrics["recall_at_10_chance"] == 1


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_the_nearest(chunk):
    queries, library = unit(17, 5), unit(30, 5, seed=1)
    cosines, numbers = nearest(queries, library, 7, chunk)
    expected = (queries @ library.T).sort(dim=1, descending=True)
    torch.testing.assert_close(cosines, expected.values[:, :7])
    assert torch.equal(numbers, expected.indices[:, :7])
    assert nearest(queries, library[:3], 7)[1].shape == (17, 3)
