"""Scores of spectra whose likeness can be worked out: Gaussians of standard deviation s, d apart."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mspt.downstream.similarity import FLOOR, blurred, cosine, pearson, scores, sis

X = torch.arange(2001, dtype=torch.float64)


def gaussian(centre, deviation, height=1.0):
    return height * torch.exp(-(((X - centre) / deviation) ** 2) / 2)[None]


@pytest.mark.parametrize("apart", [0, 10, 60])
def test_of_two_gaussians(apart):
    """∫ of their product is exp(−d² / 4s²) of ∫ of the square; their symmetric divergence is d² / s²."""
    one, other = gaussian(900, 80), gaussian(900 + apart, 80, height=7)
    assert cosine(one, other).item() == pytest.approx(math.exp(-(apart**2) / (4 * 80**2)), rel=1e-9)
    assert sis(one, other).item() == pytest.approx(1 / (1 + apart**2 / 80**2), rel=1e-4)
    # Folded with a Gaussian of 60 they are Gaussians of 100; what the floor cuts off is more of these.
    assert sis(one, other, blur=60).item() == pytest.approx(1 / (1 + apart**2 / 100**2), rel=1e-3)


def test_blurring_widens_and_keeps_area():
    wide = blurred(gaussian(1000, 30), 40)
    torch.testing.assert_close(wide, gaussian(1000, 50, height=30 / 50), rtol=0, atol=1e-4)
    assert wide.sum().item() == pytest.approx(gaussian(1000, 30).sum().item(), rel=1e-9)
    flat = torch.ones(2, 100)
    torch.testing.assert_close(blurred(flat, 10), flat)  # the ends go on


def test_pearson_is_numpys():
    one, other = (torch.rand(5, 300, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    expected = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(one, other, strict=True)])
    torch.testing.assert_close(pearson(one, other), expected, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(("uv_vis", "ir", "raman")), st.integers(0, 2**32), st.floats(1e-3, 1e3))
def test_equal_spectra_score_1_whatever_their_heights_and_others_less(name, seed, factor):
    one, other = (torch.rand(3, 701, generator=torch.Generator().manual_seed(s)) for s in (seed, seed + 1))
    for values in scores(name, one, factor * one).values():
        torch.testing.assert_close(values, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-5)
    for values in scores(name, one, other).values():
        assert (values < 1).all() and values.isfinite().all()


def test_what_is_zero_is_like_nothing():
    nothing, band = torch.zeros(1, 2001), gaussian(900, 80)
    assert cosine(nothing, band).item() == pearson(nothing, band).item() == 0
    # All of the band's weight lies where the other has the floor.
    assert 0 < sis(nothing, band).item() < 1 / (1 - math.log(FLOOR) / 2)
