"""Targets: the units in which the field reports their errors, and what the atoms alone give of an energy.

Legend: m molecules, n atoms.
"""

from typing import NamedTuple

import numpy as np

from mspt.chemistry.elements import MAX_NUMBER, SYMBOLS
from mspt.errors import UserError
from mspt.objectives.properties import TOTAL_ENERGIES


class Reporting(NamedTuple):
    """unit: of errors as they are reported. factor: from the set's unit to it. additive: a total energy, of which the
    atoms alone give nearly all."""

    unit: str
    factor: float
    additive: bool


# Targets that are total energies, of QM9 and of trajectories.
TOTAL = (*TOTAL_ENERGIES, "energy")


def units_of(molecules):
    """Target -> unit, as a shard set or its Zarr twin says."""
    return molecules.manifest["provenance"].get("units", {})


def reporting(name, units):
    """The Reporting of a target. units: name -> unit in the set, as of units_of."""
    unit = units.get(name, "unit not stated")
    # Published tables have energies in meV, and all else in the units that sets have it in.
    unit, factor = ("meV", 1000.0) if unit == "eV" else (unit, 1.0)
    return Reporting(unit, factor, name in TOTAL)


def fit_references(numbers, ptr, values):
    """Energy of an atom of each element, which together give values [m] best (least squares).

    numbers [n], ptr [m + 1] -> [elements known + 1] by atomic number, NaN for elements that no molecule has.
    """
    elements, place = np.unique(numbers, return_inverse=True)
    m = len(ptr) - 1
    molecule = np.repeat(np.arange(m), np.diff(ptr))
    counts = np.bincount(molecule * len(elements) + place, minlength=m * len(elements)).reshape(m, len(elements))
    energies = np.full(MAX_NUMBER + 1, np.nan)
    energies[elements] = np.linalg.lstsq(counts.astype(np.float64), values, rcond=None)[0]
    return energies


def of_atoms(references, numbers, ptr):
    """What the atoms alone give of each molecule's energy: numbers [n], ptr [m + 1] -> [m].

    Raises UserError where an element has no reference.
    """
    energies = references[numbers]
    unknown = np.isnan(energies)
    if unknown.any():
        raise UserError(
            f"{SYMBOLS[int(numbers[unknown][0])]} is in none of the labelled molecules, so that nothing is known of "
            "its energy; give more labels, or a training set that holds it"
        )
    return np.add.reduceat(energies, ptr[:-1])
