"""Columns of a user's file -> targets of a Record, in the units of the field.

    --targets gap=HOMO_LUMO_gap:Hartree --targets mu=dipole:D,alpha=pol:a0^3

puts the column HOMO_LUMO_gap, converted to eV, into the target gap, and so on. A source uses it like this:

    columns.add_argument(parser)
    chosen = columns.parse(options.targets)
    columns.check(path, chosen, header)
    provenance = {"units": columns.units(chosen), ...}
    Record(key, ..., targets=columns.targets(chosen, row, key))
"""

import re
from dataclasses import dataclass

from mspt.chemistry.units import BOHR_ANGSTROM, DEBYE_PER_E_BOHR, HARTREE_EV, HARTREE_KCAL_MOL
from mspt.data.schema import RejectedRecord
from mspt.errors import UserError

KCAL_MOL_EV = HARTREE_EV / HARTREE_KCAL_MOL
ENERGIES = {
    "eV": 1.0,
    "meV": 1e-3,
    "Hartree": HARTREE_EV,
    "Ha": HARTREE_EV,
    "mHartree": HARTREE_EV / 1000,
    "mHa": HARTREE_EV / 1000,
    "Ry": HARTREE_EV / 2,
    "kcal/mol": KCAL_MOL_EV,
    "kJ/mol": KCAL_MOL_EV / 4.184,
}
LENGTHS = {"Å": 1.0, "A": 1.0, "Angstrom": 1.0, "nm": 10.0, "pm": 0.01, "Bohr": BOHR_ANGSTROM, "a0": BOHR_ANGSTROM}
DIPOLES = {"D": 1.0, "Debye": 1.0} | {f"e*{name}": x * DEBYE_PER_E_BOHR / BOHR_ANGSTROM for name, x in LENGTHS.items()}
FORCES = {f"{one}/{other}": a / b for one, a in ENERGIES.items() for other, b in LENGTHS.items()}
# Name of a unit in small letters -> the unit of a Record, and how many of that it is.
UNITS = {
    name.lower(): (unit, factor)
    for unit, table in (("eV", ENERGIES), ("Å", LENGTHS), ("D", DIPOLES), ("eV/Å", FORCES))
    for name, factor in table.items()
}


@dataclass(frozen=True)
class Column:
    """The numbers of the column name, times factor, are the target in unit ("" where none is given)."""

    target: str
    name: str
    unit: str = ""
    factor: float = 1.0


def add_argument(parser):
    parser.add_argument(
        "--targets",
        action="append",
        default=[],
        metavar="NAME=COLUMN[:UNIT],…",
        help="columns to keep as targets; energies become eV, lengths Å, dipoles D, any other unit stays as it is",
    )


def convert(unit):
    """A unit of a file -> (the unit of a Record, factor to it); an unknown one stays as it is."""
    return UNITS.get(unit.lower(), (unit, 1.0))


def parse(options):
    """The values of --targets -> list of Columns. Raises UserError where one is not NAME=COLUMN[:UNIT].

    A comma that no NAME= follows belongs to the column. What follows the last colon is the unit; a column with a colon
    in its name and no unit is written with one more colon at its end.
    """
    chosen = []
    for part in (part for option in options for part in re.split(r",(?=[^,=]+=)", option)):
        match = re.fullmatch(r"\s*([^=]*[^=\s])\s*=\s*([^\s:]|[^\s:].*?\S)\s*(?::([^:]*))?", part)
        if not match:
            raise UserError(f"--targets: {part!r} is not NAME=COLUMN or NAME=COLUMN:UNIT, like gap=HOMO_LUMO_gap:eV")
        target, name, unit = match.groups(default="")
        if target in {column.target for column in chosen}:
            raise UserError(f"--targets: {target} is there twice; give each target one column")
        chosen.append(Column(target, name, *convert(unit.strip())))
    return chosen


def check(path, chosen, names):
    """Raise UserError where a chosen column is not among the names of a file's columns."""
    for column in chosen:
        if column.name not in names:
            known = ", ".join(names) or "none"
            raise UserError(f"{path}: --targets {column.target}={column.name}: no such column; there are {known}")


def units(chosen):
    """Target -> its unit, for the manifest."""
    return {column.target: column.unit for column in chosen if column.unit}


def targets(chosen, row, key):
    """The targets of a row (column -> text or number); a missing, empty or NaN value gives none.

    Raises RejectedRecord where a value is no number.
    """
    found = {}
    for column in chosen:
        value = row.get(column.name)
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise RejectedRecord(key, f"targets.{column.target}", f"{value!r} is not a number") from None
        if number == number:
            found[column.target] = number * column.factor
    return found
