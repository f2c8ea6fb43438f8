"""SDF: every entry becomes a record or says why not, however the file is packed and cut; big files need no memory."""

import dataclasses
import fcntl
import gzip
import io
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rdkit")

from rdkit import Chem, RDConfig
from rdkit.Chem import AllChem

from mspt.errors import UserError
from shards import entries
from shards.molecules import BOND_TYPES
from shards.sources import sdf
from tests.data.molecules import assert_same
from tests.shards.reading import read
from tests.shards.sources.fixtures import geometries, opened, with_bonds

# 365 drug-like molecules in 3D with hydrogens, from RDKit.
EGFR = Path(RDConfig.RDContribDir) / "PBF" / "testData" / "egfr.sdf"
ENERGY = "r_mmffld_Potential_Energy-OPLS_2005"


@pytest.fixture(scope="module")
def some():
    """The text of the first seven entries of EGFR."""
    return "".join(EGFR.read_text().split("$$$$\n")[i] + "$$$$\n" for i in range(7))


@pytest.fixture
def write(tmp_path):
    def write(text, name="some.sdf"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def drawn(smiles):
    """A 2D entry."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.Compute2DCoords(molecule)
    return Chem.MolToMolBlock(molecule) + "$$$$\n"


def test_records_hold_what_the_file_says(some, write):
    records, rejects = read(opened(sdf, "--from", write(some), "--targets", f"energy={ENERGY}:kJ/mol"))
    assert not rejects
    assert [record.key for record in records] == [f"some-{i:07d}" for i in range(7)]
    for record, molecule in zip(records, Chem.SDMolSupplier(str(EGFR), removeHs=False), strict=False):
        assert record.numbers.tolist() == [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
        assert record.smiles == Chem.MolToSmiles(Chem.RemoveHs(molecule))
        assert record.charge == Chem.GetFormalCharge(molecule)
        np.testing.assert_allclose(record.positions, molecule.GetConformer().GetPositions(), atol=1e-6)
        bonds = {(b.GetBeginAtomIdx(), b.GetEndAtomIdx()): str(b.GetBondType()) for b in molecule.GetBonds()}
        assert dict(zip(map(tuple, record.bonds.tolist()), record.bond_types.tolist(), strict=True)) == {
            pair: BOND_TYPES[kind] for pair, kind in bonds.items()
        }
        assert record.targets["energy"] == pytest.approx(float(molecule.GetProp(ENERGY)) / 96.485332, rel=1e-6)


def test_the_same_records_however_the_file_is_packed(some, write, tmp_path):
    plain = write(some)
    windows, unended = tmp_path / "windows" / "some.sdf", tmp_path / "unended" / "some.sdf"
    for path, text in ((windows, some.replace("\n", "\r\n")), (unended, some.removesuffix("$$$$\n"))):
        path.parent.mkdir()
        path.write_text(text, newline="")
    packed = tmp_path / "some.sdf.gz"
    packed.write_bytes(gzip.compress(some.encode()))
    archive = tmp_path / "some.tar.gz"
    first = some.index("$$$$\n") + 5
    with tarfile.open(archive, "w:gz") as file:
        for name, text in (("README", "none"), ("a/1.sdf", some[: first - 5]), ("a/2.sdf", some[first:])):
            data = text.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    expected, _ = read(opened(sdf, "--from", plain))
    for path in (windows, unended, packed, archive):
        for size in (1, 3, 100):
            records, rejects = read(opened(sdf, "--from", path), size)
            assert not rejects
            for one, other in zip(records, expected, strict=True):
                assert_same(one, dataclasses.replace(other, source=path.name))


@pytest.mark.parametrize("block", [3, 100, entries.BLOCK])
@pytest.mark.parametrize("after", ["", "\n", " \n", "\r\n\r\n", "\n" * 20])
def test_blank_lines_between_the_members_of_an_archive(some, write, tmp_path, monkeypatch, block, after):
    """They belong to no entry; an entry without a title begins with one, which does."""
    texts = [text + "$$$$\n" for text in some.split("$$$$\n")[:4]]
    texts[2] = "\n" + texts[2].partition("\n")[2]
    expected, _ = read(opened(sdf, "--from", write("".join(texts))))
    archive = tmp_path / "some.tar"
    with tarfile.open(archive, "w") as file:
        for i, text in enumerate([texts[0] + texts[1] + after, after, texts[2] + after, texts[3]]):
            member = tarfile.TarInfo(f"{i}.sdf")
            member.size = len(text)
            file.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setattr(entries, "BLOCK", block)
    records, rejects = read(opened(sdf, "--from", archive))
    assert not rejects
    for one, other in zip(records, expected, strict=True):
        assert_same(one, dataclasses.replace(other, source=archive.name))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.text("a$\n", max_size=8).filter(lambda text: "\n$$$$" not in f"\n{text}\n"), max_size=12),
    st.integers(1, 5),
    st.integers(1, 12),
    st.booleans(),
)
def test_chunks_are_whole_entries_wherever_a_block_ends(bodies, size, block, ended):
    texts = [f"t{i}\n{body}\n$$$$\n" for i, body in enumerate(bodies)]
    data = "".join(texts).encode()
    data = data if ended else data.removesuffix(b"\n$$$$\n")
    blocks = [data[i : i + block] for i in range(0, len(data), block)]
    chunks = [bytes(view) for view in entries._scan(blocks, size)]
    assert b"".join(chunks) == data
    read = [[text for _, text in entries.texts(None, (0, chunk))] for chunk in chunks]
    assert [text.removesuffix("\n$$$$\n") for chunk in read for text in chunk] == [t[:-6] for t in texts]
    assert all(len(chunk) == size for chunk in read[:-1])


def test_an_entry_that_lacks_hydrogens(write):
    molecules = [with_bonds(geometries(30)[i]) for i in (20, 25)]
    bare = "".join(Chem.MolToMolBlock(Chem.RemoveHs(molecule)) + "$$$$\n" for molecule in molecules)
    records, rejects = read(opened(sdf, "--from", write(bare)))
    assert not records
    assert [(e.key, e.field) for e in rejects] == [("some-0000000", "numbers"), ("some-0000001", "numbers")]
    hydrogens = [sum(atom.GetAtomicNum() == 1 for atom in molecule.GetAtoms()) for molecule in molecules]
    assert [e.reason.split()[0] for e in rejects] == [str(n) for n in hydrogens]
    assert "--add-hydrogens" in rejects[0].reason
    records, rejects = read(opened(sdf, "--from", write(bare), "--add-hydrogens"))
    assert not rejects
    for record, molecule, count in zip(records, molecules, hydrogens, strict=True):
        assert (record.numbers == 1).sum() == count
        assert record.smiles == Chem.MolToSmiles(Chem.RemoveHs(molecule))


def test_a_drawing_is_rejected_and_a_planar_molecule_is_not(some, write):
    small = drawn("O").replace("2D", "  ", 1)  # planar whatever it says
    planar = drawn("c1ccccc1").replace("2D", "3D", 1)
    unsaid = drawn("c1ccccc1").replace("2D", "  ", 1)
    records, rejects = read(opened(sdf, "--from", write(some + drawn("O") + unsaid + small + planar)))
    assert [(e.key, e.field) for e in rejects] == [("some-0000007", "positions"), ("some-0000008", "positions")]
    assert [record.key for record in records[-2:]] == ["some-0000009", "some-0000010"]


def test_an_entry_that_cannot_be_read_is_rejected_alone(some, write):
    parts = some.split("$$$$\n")
    parts[2] = parts[2][: len(parts[2]) // 2] + "\n"  # torn in its bonds
    parts[4] = "prose\n"
    records, rejects = read(opened(sdf, "--from", write("$$$$\n".join(parts))))
    assert [(e.key, e.field) for e in rejects] == [("some-0000002", "entry"), ("some-0000004", "entry")]
    assert len(records) == 5


def test_a_molecule_that_breaks_the_rules_of_valence_keeps_its_geometry(write):
    # CN5+ written without its charge: RDKit cannot make a SMILES of it.
    ammonium = Chem.AddHs(Chem.MolFromSmiles("C[N+](C)(C)C"))
    AllChem.EmbedMolecule(ammonium, randomSeed=1)
    text = "\n".join(line for line in Chem.MolToMolBlock(ammonium).split("\n") if "CHG" not in line) + "$$$$\n"
    (record,), rejects = read(opened(sdf, "--from", write(text)))
    assert not rejects
    assert (record.smiles, record.charge) == ("", 0)
    assert len(record.bonds) == 16
    np.testing.assert_allclose(record.positions, ammonium.GetConformer().GetPositions(), atol=1e-4)


def test_keys_from_a_property(some, write):
    parts = some.split("$$$$\n")
    parts[1] = parts[1].replace(parts[1].split("\n")[0], "  ", 1)  # no title
    records, rejects = read(opened(sdf, "--from", write("$$$$\n".join(parts)), "--key", "_Name"))
    titles = [part.split("\n")[0] for part in parts[:7]]
    assert [record.key for record in records] == [title for title in titles if title.strip()]
    assert [(e.key, e.field, e.reason) for e in rejects] == [("some-0000001", "key", "the entry has no _Name")]


def test_a_target_that_is_no_number_is_rejected(some, write):
    (line,) = [line for line in some.split("$$$$\n")[3].split("\n") if line.startswith("ZINC")][:1]
    records, rejects = read(opened(sdf, "--from", write(some), "--targets", "x=_Name"))
    assert not records
    assert rejects[3].field == "targets.x"
    assert line in rejects[3].reason


def test_files_that_are_none(some, write, tmp_path, monkeypatch):
    def refused(path, reason, *arguments):
        with pytest.raises(UserError, match=reason) as error:
            read(opened(sdf, "--from", path, *arguments))
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)

    refused(tmp_path / "none.sdf", "is not a file")
    refused(write("smiles,gap\nCCO,1\n", "table.sdf"), "can read none")
    refused(write("", "empty.sdf"), "can read none")
    refused(write(some), f"no such column; there are _Name, .*{ENERGY}", "--targets", "gap=gapp")
    refused(write(some), "--key ID: no such property", "--key", "ID")
    torn = tmp_path / "torn.sdf.gz"
    torn.write_bytes(gzip.compress(some.encode())[:-2000])
    refused(torn, "cannot be read to its end")
    with tarfile.open(tmp_path / "torn.tar.gz", "w:gz") as file:
        file.add(EGFR, "egfr.sdf")
    torn = tmp_path / "torn.tar.gz"
    torn.write_bytes(torn.read_bytes()[:-2000])
    refused(torn, "cannot be read to its end")
    with tarfile.open(tmp_path / "none.tar.gz", "w:gz") as file:
        file.addfile(tarfile.TarInfo("README"))
    refused(tmp_path / "none.tar.gz", "has no .sdf in it")
    monkeypatch.setattr(entries, "BLOCK", 100)
    monkeypatch.setattr(entries, "LONGEST", 1000)
    refused(write(some), "is it an SDF")


def test_two_gigabytes_are_scanned_in_bounded_memory(tmp_path):
    pipe, data = tmp_path / "big.sdf", EGFR.read_bytes()
    os.mkfifo(pipe)
    times = 2_000_000_000 // len(data) + 1
    # VmHWM and not ru_maxrss, which begins with what the process had that started this one.
    scan = (
        "import re, sys; from pathlib import Path; from shards import entries\n"
        "def peak(): return re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1]\n"
        "before = peak()\n"
        "*_, (first, (offset, length)) = entries.chunks(Path(sys.argv[1]), 1000)\n"
        "print(first, offset + length, before, peak())"
    )

    def fill():
        with pipe.open("wb") as file:
            fcntl.fcntl(file, fcntl.F_SETPIPE_SZ, 1 << 20)
            for _ in range(times):
                file.write(data)

    writer = threading.Thread(target=fill, daemon=True)
    writer.start()
    run = subprocess.run([sys.executable, "-c", scan, pipe], capture_output=True, text=True, check=True, timeout=120)
    writer.join()
    first, end, before, after = map(int, run.stdout.split())
    assert (first, end) == ((365 * times - 1) // 1000 * 1000, len(data) * times)
    assert after - before < 100_000  # kB
    assert after < 1_000_000
