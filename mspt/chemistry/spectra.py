"""The three spectra: their grids, and line shapes that turn computed lines into values on a grid."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from mspt.settings import Settings


@dataclass(frozen=True)
class Grid:
    """Evenly spaced abscissa: start, start + step, …, length values, in unit."""

    unit: str
    start: float
    step: float
    length: int

    def points(self, **options):
        """The grid's values [length]; options as of torch.arange."""
        return self.start + self.step * torch.arange(self.length, **options)


GRIDS = {
    "uv_vis": Grid(unit="eV", start=1.0, step=0.02, length=701),
    "ir": Grid(unit="cm^-1", start=500.0, step=1.0, length=3501),
    "raman": Grid(unit="cm^-1", start=500.0, step=1.0, length=3501),
}
SPECTRA = tuple(GRIDS)


class LineShape(Settings):
    """How lines become a spectrum. width is the full width at half maximum, in the grid's unit.

    lorentzian: unit area, so that intensity is per cm^-1. gaussian: unit height, so that an isolated band's height
    is its oscillator strength.
    """

    shape: Literal["lorentzian", "gaussian"]
    width: float


# IR and Raman: the 10 cm^-1 usual for computed gas-phase spectra. UV-Vis: σ 0.2 eV.
LINE_SHAPES = {
    "uv_vis": LineShape(shape="gaussian", width=0.2 * math.sqrt(8 * math.log(2))),
    "ir": LineShape(shape="lorentzian", width=10.0),
    "raman": LineShape(shape="lorentzian", width=10.0),
}


def broaden(positions, strengths, ptr, grid, line_shape, shift=None, width_scale=None):
    """Lines of m molecules end to end -> their spectra [m, grid.length].

    positions [l] in the grid's unit, strengths [l], ptr [m + 1]: molecule i owns lines ptr[i] to ptr[i + 1].
    shift [m] (grid's unit) and width_scale [m], where given, augment each molecule's spectrum as a whole. A molecule
    without lines gets zeros.
    """
    m = len(ptr) - 1
    counts = ptr[1:] - ptr[:-1]
    longest = int(counts.max()) if m else 0
    x_G = grid.points(dtype=positions.dtype, device=positions.device)
    if longest == 0:
        return positions.new_zeros(m, grid.length)
    # Lines padded to [m, longest]: padding has no strength.
    slot = torch.arange(longest, device=ptr.device)
    real = slot < counts[:, None]
    index = torch.where(real, ptr[:-1, None] + slot, 0)
    centre = positions[index]
    height = torch.where(real, strengths[index], 0.0)
    if shift is not None:
        centre = centre + shift[:, None]
    width = torch.full((m, 1), line_shape.width, dtype=positions.dtype, device=positions.device)
    if width_scale is not None:
        width = width * width_scale[:, None]
    result = positions.new_zeros(m, grid.length)
    # A few lines of every molecule at a time keeps the intermediate [m, few, grid] in cache.
    for first in range(0, longest, 8):
        part = slice(first, first + 8)
        distance = x_G - centre[:, part, None]
        if line_shape.shape == "gaussian":
            profile = torch.exp(distance.square() * (-4 * math.log(2) / width[..., None].square()))
        else:
            half = width[..., None] / 2
            profile = (half / math.pi) / (distance.square() + half.square())
        result += torch.einsum("ml,mlg->mg", height[:, part], profile)
    return result
