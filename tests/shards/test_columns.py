"""Columns of a user's file as targets: how they are named, and in which unit they end."""

import argparse

import pytest

from mspt.data.schema import RejectedRecord
from mspt.errors import UserError
from shards import columns


def targets(options, row):
    return columns.targets(columns.parse(options), row, "a")


def test_the_command_line_names_columns_and_their_units():
    parser = argparse.ArgumentParser()
    columns.add_argument(parser)
    options = parser.parse_args(["--targets", "gap=HOMO-LUMO gap, au:Hartree,mu=dipole:D", "--targets", "n = a:b:"])
    chosen = columns.parse(options.targets)
    assert [(c.target, c.name) for c in chosen] == [("gap", "HOMO-LUMO gap, au"), ("mu", "dipole"), ("n", "a:b")]
    assert columns.units(chosen) == {"gap": "eV", "mu": "D"}
    assert columns.parse(parser.parse_args([]).targets) == []


@pytest.mark.parametrize(
    ("unit", "becomes", "factor"),
    [
        ("eV", "eV", 1),
        ("meV", "eV", 1e-3),
        ("hartree", "eV", 27.211386245988),
        ("kcal/mol", "eV", 0.0433641),  # 1 eV is 23.0605 kcal/mol
        ("kJ/mol", "eV", 0.01036427),  # and 96.4853 kJ/mol
        ("Angstrom", "Å", 1),
        ("Bohr", "Å", 0.529177210903),
        ("Debye", "D", 1),
        ("e*Å", "D", 4.8032047),
        ("e*Bohr", "D", 2.541746473),
        ("Hartree/Bohr", "eV/Å", 51.4220675),
        ("kcal/mol/A", "eV/Å", 0.0433641),
        ("a0^3", "a0^3", 1),
        ("cal/mol/K", "cal/mol/K", 1),
    ],
)
def test_units_become_those_of_a_record(unit, becomes, factor):
    (column,) = columns.parse([f"x=y:{unit}"])
    assert column.unit == becomes
    assert targets([f"x=y:{unit}"], {"y": " 2.0 "})["x"] == pytest.approx(2 * factor, rel=1e-6)


def test_a_missing_value_is_no_target():
    assert targets(["a=a,b=b,c=c,d=d,e=e"], {"a": "", "b": None, "c": "NaN", "d": 0}) == {"d": 0}


def test_a_value_that_is_no_number_is_refused():
    with pytest.raises(RejectedRecord) as refused:
        targets(["gap=g:eV"], {"g": "5.2 eV"})
    assert (refused.value.field, refused.value.reason) == ("targets.gap", "'5.2 eV' is not a number")


@pytest.mark.parametrize("option", ["gap", "=x", "gap=", "gap=:eV", ""])
def test_what_is_no_column_is_refused(option):
    with pytest.raises(UserError, match="is not NAME=COLUMN"):
        columns.parse([option])


def test_one_target_has_one_column():
    with pytest.raises(UserError, match="gap is there twice"):
        columns.parse(["gap=a,gap=b"])


def test_a_column_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"x\.csv: --targets gap=gapp: no such column; there are smiles, gap"):
        columns.check("x.csv", columns.parse(["gap=gapp"]), ["smiles", "gap"])
