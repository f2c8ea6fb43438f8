"""Which molecule is this? Spectra that a user has measured, against the molecules of a set.

Legend: L points of a spectrum's grid.
"""

import csv
import io
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from mspt.chemistry.resample import to_grid
from mspt.chemistry.spectra import GRIDS, SPECTRA
from mspt.data.look import formula, table
from mspt.downstream import ranking
from mspt.errors import UserError


def read(wanted):
    """Spectra that a user gives -> name -> [L] float32 on the grids.

    wanted: (name or name:unit, path) of files of two columns, abscissa and intensity; the abscissa is in the grid's
    unit unless another is named. Raises UserError that names the file.
    """
    spectra = {}
    for what, path in wanted:
        name, _, unit = what.partition(":")
        if name not in GRIDS:
            raise UserError(f"--query {what}: is no spectrum; known: {', '.join(GRIDS)}")
        if name in spectra:
            raise UserError(f"--query {what}: {name} is given twice; give one file of it")
        x, y = _columns(path)
        try:
            spectra[name] = to_grid(name, x, y, unit or GRIDS[name].unit)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        if not spectra[name].any():
            raise UserError(f"{path}: has no intensity above zero on the grid of {name}; absorbance is needed")
    return spectra


def scaled(spectra, library):
    """Spectra (name -> [L]) in arbitrary units, each with the area of the library's mean over the same range.

    Raises UserError where no molecule of the library has such a spectrum.
    """
    result = {}
    for name, values in spectra.items():
        there = np.flatnonzero(values)
        area = float(library.mean[name][there[0] : there[-1] + 1].sum())
        if not area > 0:
            raise UserError(
                f"--query {name}: cannot be scaled, because no molecule of --data has such a spectrum; give a set that "
                "has, or --calibrated where intensities are in the units that the run was trained on"
            )
        result[name] = values * (area / values.sum())
    return result


@torch.no_grad()
def identify(network, library, spectra, k, device):
    """The k molecules of a Library that fit spectra (name -> [L]) best -> (number, cosine) each, best first."""
    values = {name: torch.zeros(1, grid.length, device=device) for name, grid in GRIDS.items()}
    values |= {name: torch.from_numpy(own)[None].float().to(device) for name, own in spectra.items()}
    present = {name: torch.tensor([name in spectra], device=device) for name in SPECTRA}
    readout = normalize(network.specformer(network.specformer.patches(values), present)[1].float(), dim=-1)
    cosines, numbers = ranking.nearest(readout, library.molecules, k)
    return list(zip(numbers[0].tolist(), cosines[0].tolist(), strict=True))


def report(molecules, found):
    """What identify found, as text for a person. molecules: the set."""
    return "\n".join(table(list(_rows(molecules, found)), indent=""))


def answers(molecules, found):
    """The same as CSV, one row an answer."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(_rows(molecules, found))
    return text.getvalue()


def _rows(molecules, found):
    yield "place", "key", "cosine", "formula", "SMILES"
    for place, (number, cosine) in enumerate(found, 1):
        one = next(molecules.records([number]))
        yield str(place), one.key, f"{cosine:.4f}", formula(one.numbers), one.smiles or "none"


def _columns(path):
    """Two columns of numbers, whatever separates them; lines before the first numbers are a heading."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a text file of two columns") from error
    rows = []
    for number, line in enumerate(lines, 1):
        cells = line.replace(";", " ").replace(",", " ").split()
        try:
            rows.append([float(cell) for cell in cells[:2]])
        except ValueError:
            if any(len(row) == 2 for row in rows):
                raise UserError(f"{path}: line {number} is {line!r} where two numbers are needed") from None
            continue
        if len(cells) != 2 and cells:
            raise UserError(f"{path}: line {number} has {len(cells)} columns where two are needed")
    rows = np.array([row for row in rows if row])
    if len(rows) < 2:
        raise UserError(f"{path}: holds no two columns of numbers, abscissa and intensity")
    return rows.T
