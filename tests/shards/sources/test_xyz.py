"""XYZ and ASE's databases: frames, columns, units and forces as ASE writes them; what is no molecule says why."""

import sqlite3

import numpy as np
import pytest

pytest.importorskip("ase")

import ase.db
import ase.io
from ase.calculators.singlepoint import SinglePointCalculator
from ase.collections import g2

from mspt.errors import UserError
from shards.sources import xyz
from tests.shards.reading import read
from tests.shards.sources.fixtures import opened

HARTREE = 27.211386245988


@pytest.fixture
def structures():
    """Eight molecules of the G2 set with made-up energies and forces."""
    molecules, rng = [g2[name] for name in g2.names[:8]], np.random.default_rng(0)
    for i, atoms in enumerate(molecules):
        atoms.info = {"gap": 0.25 + i, "name": f"mol-{i}", "charge": i % 3 - 1}
        atoms.calc = SinglePointCalculator(atoms, energy=-10.5 - i, forces=rng.normal(size=(len(atoms), 3)))
    return molecules


def written(path, structures):
    """The file of its kind, with everything that a structure has."""
    if path.suffix == ".xyz":
        ase.io.write(path, structures, format="extxyz")
        return path
    with ase.db.connect(path) as database:
        for atoms in structures:
            pairs, charge = dict(atoms.info), atoms.info["charge"]
            del pairs["charge"]  # ASE keeps this name for itself
            database.write(atoms, key_value_pairs=pairs, data={"charge": charge, "moved": atoms.get_forces() * 2})
    return path


@pytest.mark.parametrize("suffix", [".xyz", ".db", ".json"])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_structures_of_every_kind_of_file(tmp_path, structures, suffix, size):
    path = written(tmp_path / f"some{suffix}", structures)
    targets = ("--targets", "energy=energy:eV,gap=gap:Hartree")
    source = opened(xyz, "--from", path, *targets, "--key", "name")
    assert source.provenance == {"source": path.name, "units": {"energy": "eV", "gap": "eV"}}
    records, rejects = read(source, size)
    assert not rejects
    for i, (record, atoms) in enumerate(zip(records, structures, strict=True)):
        assert record.key == f"mol-{i}"
        assert record.charge == i % 3 - 1
        assert record.numbers.tolist() == atoms.numbers.tolist()
        np.testing.assert_allclose(record.positions, atoms.positions, atol=1e-6)
        np.testing.assert_allclose(record.forces, atoms.get_forces(), atol=1e-6)
        assert record.targets == pytest.approx({"energy": -10.5 - i, "gap": (0.25 + i) * HARTREE})


def test_forces_of_another_column_and_unit(tmp_path, structures):
    path = written(tmp_path / "some.db", structures)
    records, _ = read(opened(xyz, "--from", path, "--forces", "moved:Hartree/Bohr"))
    for record, atoms in zip(records, structures, strict=True):
        np.testing.assert_allclose(record.forces, 2 * atoms.get_forces() * HARTREE / 0.529177210903, rtol=1e-5)
    assert [record.key for record in records] == [f"some-{i:07d}" for i in range(1, 9)]  # as the rows count
    with pytest.raises(UserError, match="--forces: eV is no unit of forces"):
        opened(xyz, "--from", path, "--forces", "moved:eV")


def test_a_plain_file_whatever_its_comments(tmp_path, structures):
    comments = [
        "",
        "a comment",
        " i =        1, time =    0.5, E =  -76.3",
        "gdb 3\t157.7",
        "0.0 1.0",
        "it's",
        "x=",
        "{",
    ]
    frames = [f"{len(s)}\n{comment}\n{body(s)}" for s, comment in zip(structures, comments, strict=True)]
    path = tmp_path / "plain.xyz"
    path.write_text("\n\n".join(frames) + "\n \n")
    records, rejects = read(opened(xyz, "--from", path))
    assert not rejects
    for i, (record, atoms) in enumerate(zip(records, structures, strict=True)):
        assert record.key == f"plain-{i:07d}"
        np.testing.assert_allclose(record.positions, atoms.positions, atol=1e-6)
        assert record.forces is None


def body(atoms):
    return "".join(f"{a.symbol} {a.x:.8f} {a.y:.8f} {a.z:.8f}\n" for a in atoms)


def test_a_periodic_structure_is_rejected_and_a_molecule_in_a_box_is_not(tmp_path, structures):
    for i in (1, 2):
        structures[i].set_cell([20, 20, 20])
    structures[1].pbc = True
    records, rejects = read(opened(xyz, "--from", written(tmp_path / "some.xyz", structures)))
    assert [(e.key, e.field) for e in rejects] == [("some-0000001", "positions")]
    assert "periodic" in rejects[0].reason
    assert len(records) == len(structures) - 1


def test_frames_that_are_no_molecule_are_rejected_alone(tmp_path, structures):
    frames = [f"{len(s)}\nid={i}\n{body(s)}" for i, s in enumerate(structures)]
    frames[1] = "1\ncharge=0.5\nH 0 0 0\n"
    frames[2] = "2\n\nH 0 0 0\nQq 0 0 1\n"
    frames[3] = "2\n\nH 0 0 0\nH 0 zero 1\n"
    frames[4] = "1\n\nX 0 0 0\n"
    frames[5] = "0\n\n"
    frames[7] = frames[7].rsplit("\n", 2)[0] + "\n"  # torn
    path = tmp_path / "some.xyz"
    path.write_text("".join(frames))
    records, rejects = read(opened(xyz, "--from", path))
    assert [record.key for record in records] == ["some-0000000", "some-0000006"]
    assert [(e.key[-1], e.field) for e in rejects] == [
        ("1", "charge"), ("2", "frame"), ("3", "frame"), ("4", "numbers"), ("5", "numbers"), ("7", "frame"),
    ]  # fmt: skip


def test_files_that_are_none(tmp_path, structures):
    def refused(path, reason, *arguments):
        with pytest.raises(UserError, match=reason) as error:
            read(opened(xyz, "--from", path, *arguments))
        assert str(path) in str(error.value)

    refused(tmp_path / "none.xyz", "is not a file")
    path = written(tmp_path / "some.xyz", structures)
    refused(path, "gap=gapp: no such column; there are .*energy, forces, gap", "--targets", "gap=gapp")
    refused(path, "--key ID: no such column", "--key", "ID")
    refused(path, "--forces F: no such column", "--forces", "F")
    (tmp_path / "table.xyz").write_text("C,0,0,0\n")
    refused(tmp_path / "table.xyz", "'C,0,0,0' stands where a frame begins")
    for name in ("text.db", "text.json"):
        (tmp_path / name).write_text("[1, 2]")
        refused(tmp_path / name, "is no database of ASE")
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as database:
        database.execute("CREATE TABLE molecules (id INTEGER)")
    before = foreign.read_bytes()
    refused(foreign, "is no database of ASE")
    assert foreign.read_bytes() == before
