"""QM9 from its raw files: the molecules, keys and targets of qm9pack, with bonds; the list of excluded ones is kept."""

import csv

import numpy as np
import pytest

pytest.importorskip("rdkit")

from rdkit import Chem

from mspt.errors import UserError
from shards.sources import qm9, qm9_raw
from tests.shards.reading import read
from tests.shards.sources.fixtures import geometries, opened, with_bonds

# Energies of the free atoms in Hartree, as published with QM9 (atomref.txt): u0, u298, h298, g298.
ATOMS = {
    1: (-0.500273, -0.498857, -0.497912, -0.510927),
    6: (-37.846772, -37.845355, -37.844410, -37.861317),
    7: (-54.583861, -54.582445, -54.581501, -54.598897),
    8: (-75.064579, -75.063163, -75.062219, -75.079532),
}
# And the row of methane in gdb9.sdf.csv.
METHANE = {"u0_atom": -395.999594594, "u298_atom": -398.643290011, "h298_atom": -401.014646522}
HARTREE, KCAL_MOL = 27.211386245988, 27.211386245988 / 627.5094740631


def row(molecule):
    """A row of gdb9.sdf.csv: Hartree, and kcal/mol in the columns *_atom."""
    values = {name: molecule.targets[name] / factor for name, (_, factor) in qm9.TARGETS.items()}
    for i, name in enumerate(qm9_raw.ATOMISED):
        free = sum(ATOMS[int(z)][i] for z in molecule.numbers)
        values[f"{name}_atom"] = (values[name] - free) * 627.5094740631
    return {"mol_id": f"gdb_{int(molecule.key.removeprefix('qm9-'))}", **values}


def entry(molecule):
    """An entry of gdb9.sdf, with 4 decimals and no charges."""
    made = with_bonds(molecule)
    made.SetProp("_Name", row(molecule)["mol_id"])
    lines = Chem.MolToMolBlock(made).split("\n")
    return "\n".join(line for line in lines if not line.startswith("M  CHG")) + "$$$$\n"


@pytest.fixture(scope="module")
def published():
    """Methane to acetone, and β-alanine: a zwitterion, which RDKit cannot sanitise without its charges."""
    return [*geometries(20), next(m for m in geometries(300) if m.key == "qm9-000271")]


@pytest.fixture
def folder(tmp_path, published):
    (tmp_path / "gdb9.sdf").write_text("".join(map(entry, published)))
    with (tmp_path / "gdb9.sdf.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, row(published[0]))
        writer.writeheader()
        writer.writerows(map(row, published))
    (tmp_path / "uncharacterized.txt").write_text(
        "Index of compounds that failed\nthe consistency check\n=====\n\n   4  C#C   C#C   C#C  0.1\n"
        "  12  C(=O)N  C(=O)N  C(=O)N  0.1\n\n-----\n"
    )
    return tmp_path


def test_molecules_are_those_of_qm9pack(folder, published):
    source = opened(qm9_raw, "--from", folder)
    records, rejects = read(source)
    assert [(e.key, e.reason) for e in rejects] == [
        ("qm9-000004", "uncharacterised"),
        ("qm9-000012", "uncharacterised"),
    ]
    expected = [m for m in published if m.key not in ("qm9-000004", "qm9-000012")]
    assert source.total == len(published)
    assert source.provenance["uncharacterised"] == 2
    assert source.provenance["units"] == qm9.TARGET_UNITS
    for record, molecule in zip(records, expected, strict=True):
        assert record.key == molecule.key
        assert record.numbers.tolist() == molecule.numbers.tolist()
        np.testing.assert_allclose(record.positions, molecule.positions, atol=1e-4)
        assert record.targets.keys() == molecule.targets.keys()
        for name, value in molecule.targets.items():
            assert record.targets[name] == pytest.approx(value, rel=1e-9), name
        if record.key != "qm9-000271":
            assert record.smiles == Chem.CanonSmiles(molecule.smiles)


def test_an_entry_that_rdkit_cannot_sanitise_keeps_its_bonds(folder):
    alanine = read(opened(qm9_raw, "--from", folder))[0][-1]
    assert (alanine.key, alanine.smiles, alanine.charge) == ("qm9-000271", "", 0)
    assert len(alanine.bonds) == len(alanine.numbers) - 1  # it has no ring
    nitrogen = int(np.flatnonzero(alanine.numbers == 7)[0])
    assert (alanine.bonds == nitrogen).sum() == 4


def test_energies_of_free_atoms(folder, published):
    methane = row(published[0])
    for name, value in METHANE.items():
        assert methane[name] == pytest.approx(value, abs=2e-3), name
    references = opened(qm9_raw, "--from", folder).provenance["atom_references"]
    for i, name in enumerate(qm9_raw.ATOMISED):
        expected = {Chem.GetPeriodicTable().GetElementSymbol(z): atom[i] * HARTREE for z, atom in ATOMS.items()}
        assert references[name] == pytest.approx(expected, abs=1e-4), name
    record = read(opened(qm9_raw, "--from", folder))[0][0]
    bound = record.targets["u0"] - references["u0"]["C"] - 4 * references["u0"]["H"]
    assert bound == pytest.approx(METHANE["u0_atom"] * KCAL_MOL, abs=1e-3)


def test_a_file_too_small_to_tell_the_atoms_apart_gives_no_references(folder, published):
    (folder / "gdb9.sdf").write_text(entry(published[0]))
    assert "atom_references" not in opened(qm9_raw, "--from", folder).provenance


def test_entries_are_joined_by_their_title(folder, published):
    sdf = "".join(map(entry, published[:3])).replace("gdb_2\n", "gdb_999\n").replace("gdb_3\n", "water\n")
    (folder / "gdb9.sdf").write_text(sdf)
    records, rejects = read(opened(qm9_raw, "--from", folder))
    assert [record.key for record in records] == ["qm9-000001"]
    assert [(e.key, e.field) for e in rejects] == [("qm9-000999", "targets"), ("gdb9-entry-2", "key")]


def test_files_that_are_missing_or_damaged(folder):
    table = folder / "gdb9.sdf.csv"
    whole = table.read_text()
    table.write_text(whole[:-80])
    with pytest.raises(UserError, match=r"gdb9\.sdf\.csv:22: is not a row"):
        opened(qm9_raw, "--from", folder)
    table.write_text(whole)
    (folder / "uncharacterized.txt").write_text("<html>")
    with pytest.raises(UserError, match="lists no molecule"):
        opened(qm9_raw, "--from", folder)
    (folder / "uncharacterized.txt").unlink()
    with pytest.raises(UserError, match=r"uncharacterized\.txt: is not there"):
        opened(qm9_raw, "--from", folder)
