"""The three spectra: their grids, and line shapes that turn computed lines into values on a grid."""

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from mspt import native
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
    width: float = Field(gt=0)


# IR and Raman: the 10 cm^-1 usual for computed gas-phase spectra. UV-Vis: σ 0.2 eV.
LINE_SHAPES = {
    "uv_vis": LineShape(shape="gaussian", width=0.2 * math.sqrt(8 * math.log(2))),
    "ir": LineShape(shape="lorentzian", width=10.0),
    "raman": LineShape(shape="lorentzian", width=10.0),
}
# Units of a line's strength, and of the intensity that lines of these shapes add up to.
STRENGTHS = {"uv_vis": "oscillator strength", "ir": "km/mol", "raman": "Å⁴/amu"}
BROADENED = {"uv_vis": "oscillator strength", "ir": "km/mol per cm⁻¹", "raman": "Å⁴/amu per cm⁻¹"}


# Elements of the [molecules, lines, grid] profiles that are worked on at once: a CPU keeps them in its cache.
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}


@torch.no_grad()
def broaden(positions, strengths, ptr, grid, line_shape, shift=None, width_scale=None):
    """Lines of m molecules end to end -> their spectra [m, grid.length].

    positions [l] in the grid's unit, strengths [l], ptr [m + 1]: molecule i owns lines ptr[i] to ptr[i + 1].
    shift [m] (grid's unit) and width_scale [m], where given, augment each molecule's spectrum as a whole. A molecule
    without lines gets zeros. float32 on a CPU goes through C++, all else through PyTorch.
    """
    width = torch.full((len(ptr) - 1,), line_shape.width, dtype=positions.dtype, device=positions.device)
    if width_scale is not None:
        width = width * width_scale
    compiled = positions.dtype == torch.float32 and positions.device.type == "cpu" and _library()
    function = _broaden_compiled if compiled else _broaden
    return function(positions, strengths, ptr, grid, line_shape.shape == "gaussian", shift, width)


@cache
def _library():
    return native.wanted("chemistry", Path(__file__).with_name("broaden.cpp"), "lines become bands by PyTorch, slower")


def _broaden_compiled(positions, strengths, ptr, grid, gaussian, shift, width):
    """broaden.cpp."""
    x, result = grid.points(dtype=torch.float32), torch.empty(len(ptr) - 1, grid.length)
    floats = [None if each is None else each.float().contiguous() for each in (positions, strengths, shift, width)]
    given = (*floats[:2], ptr.contiguous(), *floats[2:])
    numbers = (len(ptr) - 1, grid.length, gaussian, torch.get_num_threads())
    _library().broaden(
        *map(native.pointer, (*given, x, result)),
        *map(ctypes.c_int64, numbers),
        ctypes.c_double(grid.start),
        ctypes.c_double(grid.step),
    )
    return result


def _broaden(positions, strengths, ptr, grid, gaussian, shift, width):
    """The same in PyTorch: any type, any device."""
    m, counts = len(ptr) - 1, ptr.diff()
    result = positions.new_zeros(m, grid.length)
    x_G = grid.points(dtype=positions.dtype, device=positions.device)
    longest = int(counts.max()) if m else 0
    group = max(1, CHUNK[positions.device.type] // max(1, longest * grid.length))
    for first in range(0, m if longest else 0, group):
        own = slice(first, first + group)
        # Lines padded to [group, most]: padding has no strength.
        slot = torch.arange(int(counts[own].max()), device=ptr.device)
        real = slot < counts[own, None]
        index = torch.where(real, ptr[:-1][own, None] + slot, 0)
        centre, height = positions[index], torch.where(real, strengths[index], 0.0)
        if shift is not None:
            centre = centre + shift[own, None]
        profile = (x_G - centre[..., None]).square_()
        if gaussian:
            profile.mul_(-4 * math.log(2) / width[own, None, None].square()).exp_()
        else:
            half = width[own, None] / 2
            profile.add_(half[..., None].square()).reciprocal_()
            height = height * half / math.pi
        result[own] = torch.bmm(height[:, None], profile)[:, 0]
    return result
