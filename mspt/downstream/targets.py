"""Targets: the units in which the field reports their errors, and what the atoms alone give of an energy.

Legend: m molecules, n atoms, E elements.
"""

from typing import NamedTuple

import numpy as np

from mspt.chemistry.elements import SYMBOLS
from mspt.errors import UserError


class Reporting(NamedTuple):
    """unit: of errors as they are reported. factor: from the set's unit to it. additive: a total energy, of which the
    atoms alone give nearly all."""

    unit: str
    factor: float
    additive: bool


MILLI, TOTAL = Reporting("meV", 1000.0, False), Reporting("meV", 1000.0, True)
# QM9's targets as shards/sources/qm9.py holds them, in the units of published tables.
REPORTED = {
    "mu": Reporting("D", 1.0, False),
    "alpha": Reporting("a0^3", 1.0, False),
    "homo": MILLI,
    "lumo": MILLI,
    "gap": MILLI,
    "r2": Reporting("a0^2", 1.0, False),
    "zpve": MILLI,
    "u0": TOTAL,
    "u298": TOTAL,
    "h298": TOTAL,
    "g298": TOTAL,
    "cv": Reporting("cal/mol/K", 1.0, False),
    "energy": TOTAL,
}


def reporting(name, units):
    """The Reporting of a target. units: name -> unit in the set, of its manifest's provenance."""
    if name in REPORTED:
        return REPORTED[name]
    unit = units.get(name, "unit not stated")
    return MILLI if unit == "eV" else Reporting(unit, 1.0, False)


def composition(numbers, ptr, elements):
    """How many atoms of each element: numbers [n], ptr [m + 1], elements [E] atomic numbers, sorted -> [m, E] float64.

    Raises UserError where an atom is of another element.
    """
    place = np.searchsorted(elements, numbers).clip(max=len(elements) - 1)
    other = elements[place] != numbers
    if other.any():
        raise UserError(
            f"{SYMBOLS[int(numbers[other][0])]} is in none of the molecules that the references were fitted to; "
            "give --train a set that holds it"
        )
    molecule = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))
    cells = np.bincount(molecule * len(elements) + place, minlength=(len(ptr) - 1) * len(elements))
    return cells.reshape(len(ptr) - 1, len(elements)).astype(np.float64)


def references(counts, values):
    """Energy of an atom of each element that fits values [m] best by counts [m, E] alone -> [E] (least squares)."""
    return np.linalg.lstsq(counts, values, rcond=None)[0]
