"""Spectra sampled anywhere -> the grids: what must stay as it was, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mspt.chemistry.resample import NOISE, resample, to_grid
from mspt.chemistry.spectra import GRIDS

NAMES = tuple(GRIDS)
EV_CM = 8065.543937  # CODATA 2018


def points(name):
    return GRIDS[name].points(dtype=torch.float64).numpy()


def abscissae(name, count, seed, beyond=0.0):
    """count rising abscissae at random, uneven, from the grid's first point to its last and a share beyond."""
    x, rng = points(name), np.random.default_rng(seed)
    span = x[-1] - x[0]
    inner = rng.uniform(x[0] - beyond * span, x[-1] + beyond * span, count)
    return np.unique([x[0] - beyond * span, *inner, x[-1] + beyond * span])


uneven = st.tuples(st.sampled_from(NAMES), st.sampled_from((3, 50, 3_000, 20_000)), st.integers(0, 2**32))


@settings(deadline=None, max_examples=30)
@given(uneven, st.integers(0, 10**6), st.integers(0, 10**6))
def test_straight_lines_stay_and_direction_does_not_matter(drawn, first, last):
    """Of any sampling, coarse, fine or both in one spectrum; a constant is a line too."""
    name, count, seed = drawn
    x, at = abscissae(name, count, seed), points(name)
    line = np.array([first, last])
    y = np.interp(x, at[[0, -1]], line)
    values = to_grid(name, x, y, GRIDS[name].unit)
    assert values.dtype == np.float32 and values.shape == (GRIDS[name].length,)
    np.testing.assert_allclose(values, np.interp(at, at[[0, -1]], line), rtol=1e-6, atol=1e-8 * line.max())
    np.testing.assert_array_equal(to_grid(name, x[::-1], y[::-1], GRIDS[name].unit), values)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(NAMES), st.integers(0, 2**32))
def test_the_area_of_a_fine_spectrum_is_conserved(name, seed):
    """Noise at uneven abscissae, some 10 times finer than the grid: what is between the outer edges is all there."""
    grid, rng = GRIDS[name], np.random.default_rng(seed)
    tenths = np.arange(-20, 10 * grid.length + 20)
    x = grid.start + grid.step / 10 * (tenths + rng.uniform(-0.4, 0.4, len(tenths)))
    y = rng.uniform(0, 1, len(x))
    edges = points(name)[[0, -1]] + [-grid.step / 2, grid.step / 2]
    inside = np.union1d(edges, x[(x > edges[0]) & (x < edges[1])])
    area = np.trapezoid(np.interp(inside, x, y), inside)
    assert resample(x, y, grid).sum() * grid.step == pytest.approx(area, rel=1e-9)


def test_a_narrow_line_between_two_points_keeps_its_area():
    """0.1 cm^-1 wide, as of a gas: the line's height at the points of the grid would miss it."""
    x = np.arange(400, 4100, 0.01)
    y = 0.05 / np.pi / ((x - 1700.5) ** 2 + 0.05**2)
    values = to_grid("ir", x, y, "cm^-1")
    assert values[1190:1212].sum() == pytest.approx(y[(x > 1689.5) & (x < 1711.5)].sum() * 0.01, rel=1e-4)
    assert np.interp(points("ir"), x, y)[1190:1212].sum() < 0.5


@pytest.mark.parametrize(("step", "bound"), [(0.01, 0.004), (0.1, 0.004), (0.5, 0.005), (0.964, 0.015), (2.0, 0.035)])
def test_a_lorentzian_stays(step, bound):
    """10 cm^-1 wide: the bound is a share of its height; 2 cm^-1 apart the samples themselves miss that much."""
    x = np.arange(400, 4000 + step, step)

    def band(x):
        return 1 / (1 + ((x - 1700.3) / 5) ** 2)

    assert np.abs(to_grid("ir", x, band(x), "cm^-1") - band(points("ir"))).max() < bound


@pytest.mark.parametrize("name", NAMES)
def test_values_on_the_grid_itself_stay_as_they_are(name):
    """Also where its abscissae were kept as 32-bit numbers."""
    y = np.random.default_rng(0).uniform(0, 5, GRIDS[name].length).astype(np.float32)
    np.testing.assert_array_equal(to_grid(name, points(name), y, GRIDS[name].unit), y)
    np.testing.assert_allclose(to_grid(name, points(name).astype(np.float32), y, GRIDS[name].unit), y, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "unit", "back"),
    [
        ("ir", "µm", lambda x: 1e4 / x),
        ("ir", "nm", lambda x: 1e7 / x),
        ("ir", "eV", lambda x: x / EV_CM),
        ("uv_vis", "nm", lambda x: 1e7 / (x * EV_CM)),
        ("uv_vis", "cm^-1", lambda x: x * EV_CM),
    ],
)
def test_units_of_the_abscissa(name, unit, back):
    """A band keeps its height at its place: no Jacobian."""
    x, at = np.linspace(points(name)[0], points(name)[-1], 20_000), points(name)
    centre, width = at[len(at) // 3], 20 * GRIDS[name].step
    y = np.exp(-(((x - centre) / width) ** 2))
    values = to_grid(name, back(x), y, unit)
    np.testing.assert_allclose(values, np.exp(-(((at - centre) / width) ** 2)), atol=1e-3)
    assert values.argmax() == len(at) // 3


def test_points_that_were_not_measured_are_zero():
    """200 to 700 nm in steps of 1 nm: finer than the grid in the red, coarser in the ultraviolet."""
    x = np.arange(700, 199, -1.0)
    values = to_grid("uv_vis", x, np.full(len(x), 2.5), "nm")
    at = points("uv_vis")
    measured = (at > 1e7 / 700 / EV_CM - 0.01) & (at < 1e7 / 200 / EV_CM + 0.01)
    np.testing.assert_array_equal(values, np.where(measured, 2.5, 0).astype(np.float32))


X = np.arange(400.0, 4001)


@pytest.mark.parametrize(
    ("name", "x", "y", "unit", "reason"),
    [
        ("ir", X, X[1:], "cm^-1", r"\(3600,\) values for \(3601,\) abscissae"),
        ("ir", [], [], "cm^-1", "two lists of one length"),
        ("ir", [1000.0, 1000.0], [1.0, 1.0], "cm^-1", "cover 0%"),
        ("ir", X, np.where(X == 900, np.nan, 1), "cm^-1", "not finite"),
        ("ir", X[:2000], X[:2000], "cm^-1", "400 to 2399 cm\\^-1 cover 54% of the grid, less than 75%"),
        ("uv_vis", X, X, "parsec", "abscissae in parsec; known: cm\\^-1, µm, nm, eV"),
        ("raman", X, X, "nm", "wavelength of the laser"),
        ("ir", X - 400, X, "nm", "an abscissa of 0 nm"),
        ("ir", X, np.where(X == 900, -0.2, 1), "cm^-1", "negative intensity -0.2 where the maximum is 1"),
        ("ir", X, -X, "cm^-1", "negative intensity -4e\\+03"),
    ],
)
def test_what_is_no_spectrum_is_refused_with_the_reason(name, x, y, unit, reason):
    with pytest.raises(ValueError, match=reason):
        to_grid(name, np.asarray(x), np.asarray(y), unit)


def test_points_in_no_order_and_points_that_are_there_twice():
    """As of a curve that was read off paper: the mean of the values at one abscissa."""
    order = np.random.default_rng(0).permutation(len(X))
    wanted = to_grid("ir", X, X, "cm^-1")
    np.testing.assert_array_equal(to_grid("ir", X[order], X[order], "cm^-1"), wanted)
    twice = to_grid("ir", np.repeat(X, 2), np.repeat(X, 2) + np.tile([-7.0, 7.0], len(X)), "cm^-1")
    np.testing.assert_array_equal(twice, wanted)


def test_noise_below_zero_becomes_zero():
    y = np.where(X % 2 == 0, -0.9 * NOISE, 1.0)
    np.testing.assert_array_equal(to_grid("ir", X, y, "cm^-1"), np.where(points("ir") % 2 == 0, 0, 1))
    np.testing.assert_array_equal(to_grid("ir", X, np.zeros(len(X)), "cm^-1"), np.zeros(3501))
