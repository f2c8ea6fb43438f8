"""PCQM4Mv2: SDF and XYZ give the same molecules, and each gap goes to its own one."""

import gzip
import io
import re
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("rdkit")
pytest.importorskip("ase")
pytest.importorskip("pyarrow")

from rdkit import Chem

from mspt.errors import UserError
from shards import zips
from shards.sources import pcqm4mv2
from tests.shards.reading import read
from tests.shards.sources.fixtures import geometries, opened, with_bonds

COUNT = 20


@pytest.fixture(scope="module")
def molecules():
    return [with_bonds(molecule) for molecule in geometries(COUNT)]


@pytest.fixture
def folder(tmp_path, molecules):
    """The published files, of molecules of QM9; the table has rows without a gap after the training ones."""
    sdf = "".join(Chem.MolToMolBlock(molecule) + "$$$$\n" for molecule in molecules).encode()
    (tmp_path / "pcqm4m-v2-train.sdf").write_bytes(sdf)
    with tarfile.open(tmp_path / "pcqm4m-v2-train.sdf.tar.gz", "w:gz") as file:
        member = tarfile.TarInfo("pcqm4m-v2-train.sdf")
        member.size = len(sdf)
        file.addfile(member, io.BytesIO(sdf))
    with zipfile.ZipFile(tmp_path / "pcqm4m-v2_xyz.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.mkdir("pcqm4m-v2_xyz")
        for i in reversed(range(COUNT)):
            text = Chem.MolToXYZBlock(molecules[i])
            file.writestr(f"pcqm4m-v2_xyz/{i // 10:08d}/{i}.xyz", text)
    rows = [f"{i},{Chem.MolToSmiles(Chem.RemoveHs(m))},{gap(i)}" for i, m in enumerate(molecules)]
    table(tmp_path, [*rows, f"{COUNT},CCO,"])
    return tmp_path


def gap(i):
    return 4 + i / 8


def table(folder, rows):
    (folder / "data.csv.gz").write_bytes(gzip.compress("\n".join(["idx,smiles,homolumogap", *rows, ""]).encode()))


@pytest.mark.parametrize("name", ["pcqm4m-v2-train.sdf", "pcqm4m-v2-train.sdf.tar.gz", "pcqm4m-v2_xyz.zip"])
def test_molecules_and_gaps_of_every_form(folder, molecules, name):
    records, rejects = read(opened(pcqm4mv2, "--from", folder / name))
    assert not rejects
    records.sort(key=lambda record: record.key)
    for i, (record, molecule) in enumerate(zip(records, molecules, strict=True)):
        assert record.key == f"pcqm4mv2-{i:07d}"
        assert record.targets == {"gap": gap(i)}
        assert record.numbers.tolist() == [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
        np.testing.assert_allclose(record.positions, molecule.GetConformer().GetPositions(), atol=1e-4)
        assert record.smiles == Chem.MolToSmiles(Chem.RemoveHs(molecule))
        assert (record.bonds is None) == name.endswith(".zip")
        if record.bonds is not None:
            assert len(record.bonds) == molecule.GetNumBonds()


@pytest.mark.parametrize("name", ["pcqm4m-v2-train.sdf", "pcqm4m-v2_xyz.zip"])
def test_without_the_table_there_are_no_gaps(folder, name):
    (folder / "data.csv.gz").unlink()
    source = opened(pcqm4mv2, "--from", folder / name)
    records, rejects = read(source)
    assert (len(records), rejects, source.provenance["units"]) == (COUNT, [], {})
    assert not any(record.targets for record in records)
    with pytest.raises(UserError, match="is not a file"):
        opened(pcqm4mv2, "--from", folder / name, "--table", folder / "data.csv.gz")


@pytest.mark.parametrize("name", ["pcqm4m-v2-train.sdf", "pcqm4m-v2_xyz.zip"])
def test_a_gap_that_is_another_molecules_is_refused(folder, molecules, name):
    smiles = [Chem.MolToSmiles(Chem.RemoveHs(molecule)) for molecule in molecules]
    smiles[4], smiles[5] = smiles[5], smiles[4]
    table(folder, [f"{i},{s},{'' if i == 7 else gap(i)}" for i, s in enumerate(smiles[:-1])])
    records, rejects = read(opened(pcqm4mv2, "--from", folder / name))
    assert sorted((e.key, e.field) for e in rejects) == [
        (f"pcqm4mv2-{i:07d}", "targets.gap") for i in (4, 5, COUNT - 1)
    ]
    assert {record.key for record in records if not record.targets} == {"pcqm4mv2-0000007"}


def test_damaged_files(folder):
    path = folder / "pcqm4m-v2_xyz.zip"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as a zip"):
        read(opened(pcqm4mv2, "--from", path))
    # A member that is damaged is rejected alone.
    path.write_bytes(whole)
    with path.open("rb") as file:
        member = next(m for m in zips.members(file) if m.name.endswith("/3.xyz"))
    data = re.search(rb"/3\.xyz", whole[member.offset :]).end() + member.offset
    path.write_bytes(whole[:data] + bytes(member.size) + whole[data + member.size :])
    records, rejects = read(opened(pcqm4mv2, "--from", path))
    assert [e.key for e in rejects] == ["pcqm4mv2-0000003"]
    assert len(records) == COUNT - 1
    for rows, reason in (["1,CCO,4"], "idx does not count"), (["0,CCO,wide"], "cannot be read as the table"):
        table(folder, rows)
        with pytest.raises(UserError, match=reason):
            read(opened(pcqm4mv2, "--from", path))


def test_a_damaged_digit_is_no_coordinate(folder, molecules):
    """Of members that are stored as they are it would be read as another number."""
    path = folder / "pcqm4m-v2_xyz.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for i, molecule in enumerate(molecules):
            file.writestr(f"{i}.xyz", Chem.MolToXYZBlock(molecule))
    whole = path.read_bytes()
    digit = whole.index(b".", whole.index(b"3.xyz") + len("3.xyz")) + 1
    path.write_bytes(whole[:digit] + bytes([whole[digit] ^ 1]) + whole[digit + 1 :])
    records, (reject,) = read(opened(pcqm4mv2, "--from", path))
    assert (reject.key, reject.field) == ("pcqm4mv2-0000003", "positions") and "CRC-32" in reject.reason
    assert len(records) == COUNT - 1


@settings(deadline=None, max_examples=40)
@given(st.lists(st.binary(max_size=200), max_size=8), st.booleans(), st.booleans(), st.binary(max_size=30))
@example([b"1"], False, False, b"PK\x05\x06")
@example([b"1"], True, True, b"a PK\x05\x06, and 22 more bytes that say no length")
def test_a_zip_gives_what_zipfile_wrote(contents, packed, wide, comment):
    file = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        if wide:  # every number stands in the 64-bit records
            patch.setattr(zipfile, "ZIP64_LIMIT", 0)
            patch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 0)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
            archive.comment = comment
            for i, content in enumerate(contents):
                with archive.open(f"{i}.xyz", "w", force_zip64=wide) as member:
                    member.write(content)
    members = list(zips.members(file))
    assert [(member.name, zips.read(file, member)) for member in members] == [
        (f"{i}.xyz", content) for i, content in enumerate(contents)
    ]
