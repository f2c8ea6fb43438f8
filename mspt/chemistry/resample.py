"""A spectrum sampled anywhere, in a usual unit -> values on the grid of chemistry.spectra."""

import numpy as np
import torch

from mspt.chemistry.spectra import GRIDS
from mspt.chemistry.units import HARTREE_EV, HARTREE_WAVENUMBER

# Unit of an abscissa -> what takes it to cm^-1.
TO_WAVENUMBERS = {
    "cm^-1": lambda x: x,
    "µm": lambda x: 1e4 / x,
    "nm": lambda x: 1e7 / x,
    "eV": lambda x: x * HARTREE_WAVENUMBER / HARTREE_EV,
}
# A spectrum that covers less than this share of its grid's points is refused. IR instruments end at 400 to
# 670 cm^-1, Raman ones often at 3300; a UV-Vis spectrum from 200 to 700 nm is 1.8 to 6.2 of the grid's 1 to 15 eV.
LEAST_SHARE = {"uv_vis": 0.15, "ir": 0.75, "raman": 0.5}
# Values below zero of up to this share of the maximum are noise and become zero; deeper ones are no absorption.
NOISE = 0.05


def to_grid(name, x, y, unit):
    """Values float32 [length] on the grid of the spectrum name, from abscissae x [n] in unit and values y [n].

    x may rise, fall or lie in no order, evenly or not; values at one abscissa are averaged. The values are taken as
    they are at their point, without the Jacobian of a change of unit: absorbance, molar absorptivity and Raman
    intensity belong to a point and are no densities over the abscissa. Points of the grid outside the range of x are 0.

    Raises ValueError, with the reason, where x or y cannot be such a spectrum or covers too little of the grid.
    """
    x, y, grid = np.asarray(x, np.float64), np.asarray(y, np.float64), GRIDS[name]
    if x.ndim != 1 or x.shape != y.shape or len(x) == 0:
        raise ValueError(f"{y.shape} values for {x.shape} abscissae; a spectrum is two lists of one length")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("not finite")
    x = convert(name, x, unit)
    if x[0] > x[-1]:
        x, y = x[::-1], y[::-1]
    if not (np.diff(x) > 0).all():  # read off a printed curve, like NIST's UV-Vis
        x, point = np.unique(x, return_inverse=True)
        y = np.bincount(point, y) / np.bincount(point)
    points = grid.points(dtype=torch.float64).numpy()
    covered = (points + grid.step / 2 > x[0]) & (points - grid.step / 2 < x[-1])
    if covered.mean() < LEAST_SHARE[name]:
        raise ValueError(
            f"{x[0]:.6g} to {x[-1]:.6g} {grid.unit} cover {covered.mean():.0%} of the grid, less than "
            f"{LEAST_SHARE[name]:.0%}"
        )
    values = np.where(covered, resample(x, y, grid), 0.0)
    if values.min() < -NOISE * values.max():
        raise ValueError(f"negative intensity {values.min():.3g} where the maximum is {values.max():.3g}")
    return values.clip(0).astype(np.float32)


def convert(name, x, unit):
    """Abscissae x [n] in unit -> in the unit of the grid of the spectrum name. Raises ValueError where none leads."""
    grid = GRIDS[name]
    if unit == grid.unit:
        return x
    if unit not in TO_WAVENUMBERS:
        raise ValueError(f"abscissae in {unit}; known: {', '.join(TO_WAVENUMBERS)}")
    if name == "raman":
        raise ValueError(f"abscissae in {unit}, from which no Raman shift follows without the wavelength of the laser")
    if x.min() <= 0:
        raise ValueError(f"an abscissa of {x.min():.6g} {unit}")
    wavenumbers = TO_WAVENUMBERS[unit](x)
    return wavenumbers if grid.unit == "cm^-1" else wavenumbers * HARTREE_EV / HARTREE_WAVENUMBER


def resample(x, y, grid):
    """The line through (x, y), x [n] rising in the grid's unit -> values float64 [length] on the grid.

    Where x is finer than the grid, a value is the mean of the line over the grid's cell, by exact integration: area is
    conserved and no narrow band falls between two points. Elsewhere it is the line at the point, so that a spectrum on
    the grid itself stays as it is. Beyond the ends of x the values of the ends go on.
    """
    points = grid.points(dtype=torch.float64).numpy()
    edges = grid.start + grid.step * (np.arange(grid.length + 1) - 0.5)
    area = np.concatenate([[0.0], np.cumsum(np.diff(x) * (y[1:] + y[:-1]) / 2)])  # from x[0] to every x

    def interval(at):
        return np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)

    inside = edges.clip(x[0], x[-1])
    left = interval(inside)
    until = area[left] + (inside - x[left]) * (y[left] + np.interp(inside, x, y)) / 2  # from x[0] to every edge
    # A cell that an end of x cuts has no mean. The margin keeps rounded abscissae of the grid itself out.
    fine = np.diff(x)[interval(points)] < 0.999 * grid.step
    whole = (edges[:-1] >= x[0]) & (edges[1:] <= x[-1])
    return np.where(fine & whole, np.diff(until) / grid.step, np.interp(points, x, y))
