"""QM9S as published: spectra reach their molecules by the index, and what does not fit is named."""

import argparse
import re

import numpy as np
import pytest
import torch

from mspt.chemistry.spectra import GRIDS
from mspt.errors import UserError
from shards.sources import qm9s
from tests.shards.reading import read
from tests.shards.sources import qm9s_files

COUNT = 6


@pytest.fixture(scope="module")
def molecules():
    return qm9s_files.molecules(COUNT)


def write(folder, molecules, leave_out=(), **changes):
    """The four files; changes: field -> a value for each molecule."""
    data = pytest.importorskip("torch_geometric.data")
    rows = [qm9s_files.fields(record) for record, _ in molecules]
    for name, values in changes.items():
        rows = [row | {name: value} for row, value in zip(rows, values, strict=True)]
    torch.save([data.Data(**row) for row in rows], folder / "qm9s.pt")
    order = np.random.default_rng(0).permutation(len(molecules)).tolist()
    for name, own in qm9s_files.NAMES.items():
        if name not in leave_out:
            rows = [(i, molecules[i][1][name]) for i in order]
            qm9s_files.table(folder / f"{own}_boraden.csv", name, rows)


def open_source(folder, *arguments):
    parser = argparse.ArgumentParser()
    qm9s.add_arguments(parser)
    return qm9s.open(parser.parse_args(["--from", str(folder), *arguments]))


def rewrite(folder, name, molecules, row, text):
    """Write a table again, one of its rows with this text."""
    rows = [(i, text if i == row else values[name]) for i, (_, values) in enumerate(molecules)]
    qm9s_files.table(folder / f"{qm9s_files.NAMES[name]}_boraden.csv", name, rows)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_molecules_with_their_spectra(tmp_path, molecules, size):
    write(tmp_path, molecules)
    source = open_source(tmp_path)
    records, rejects = read(source, size)
    assert not rejects and source.total == len(records) == COUNT
    assert {path.name for path in source.inputs} == {
        "qm9s.pt",
        "uv_boraden.csv",
        "ir_boraden.csv",
        "raman_boraden.csv",
    }
    for record, (molecule, values) in zip(records, molecules, strict=True):
        assert record.key == molecule.key
        assert record.smiles == molecule.smiles
        assert (record.numbers.dtype, record.positions.dtype) == (np.uint8, np.float32)
        np.testing.assert_array_equal(record.numbers, molecule.numbers)
        np.testing.assert_array_equal(record.positions, molecule.positions)
        expected = {"mu": molecule.targets["mu"], "alpha": molecule.targets["alpha"], "energy": molecule.targets["u0"]}
        assert record.targets == pytest.approx(expected, rel=1e-6)
        assert record.targets.keys() == source.provenance["units"].keys()
        assert record.spectra.keys() == record.methods.keys() == GRIDS.keys()
        for name, spectrum in record.spectra.items():
            assert spectrum.dtype == np.float16
            np.testing.assert_allclose(spectrum, values[name], rtol=2**-11, atol=2**-25)


def test_rows_are_joined_by_the_index(tmp_path, molecules, capsys):
    write(tmp_path, molecules)
    rows = [(i, molecules[i][1]["ir"]) for i in (4, 0, 3)] + [(99, molecules[0][1]["ir"])]
    qm9s_files.table(tmp_path / "ir_boraden.csv", "ir", rows)
    records, rejects = read(open_source(tmp_path))
    assert not rejects
    assert [i for i, record in enumerate(records) if "ir" in record.spectra] == [0, 3, 4]
    for i in (0, 3, 4):
        np.testing.assert_array_equal(records[i].spectra["ir"], molecules[i][1]["ir"].astype(np.float16))
    assert records[1].spectra.keys() == records[1].methods.keys() == {"uv_vis", "raman"}
    printed = capsys.readouterr().out
    assert f"ir_boraden.csv: 3 of {COUNT} molecules have no row, 1 rows no molecule" in printed
    assert f"raman_boraden.csv: 0 of {COUNT} molecules have no row, 0 rows no molecule" in printed


def test_a_table_may_be_missing(tmp_path, molecules, capsys):
    write(tmp_path, molecules, leave_out=["raman"])
    (tmp_path / "uv_boraden.csv").rename(tmp_path / "uv_broaden.csv")
    source = open_source(tmp_path)
    records, rejects = read(source)
    assert not rejects
    assert {frozenset(record.spectra) for record in records} == {frozenset(["uv_vis", "ir"])}
    assert source.provenance["methods"].keys() == {"uv_vis", "ir"}
    assert "raman_boraden.csv: not there" in capsys.readouterr().out


def test_without_numbers_of_its_own_a_molecule_is_known_by_its_place(tmp_path, molecules, capsys):
    write(tmp_path, molecules, number=[7] * COUNT)
    records, _ = read(open_source(tmp_path))
    assert [record.key for record in records] == [f"qm9s-index-{i:06d}" for i in range(COUNT)]
    assert "keys are places" in capsys.readouterr().out


def values_with(name, change):
    values = np.zeros(GRIDS[name].length).astype(str).tolist()
    return ",".join(change(values))


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("ir", values_with("ir", lambda v: ["x", *v[1:]]), "row at byte .* could not convert string to float: b'x'"),
        ("ir", values_with("ir", lambda v: ["", *v[1:]]), "could not convert"),
        ("ir", values_with("ir", lambda v: v[1:]), r"\(3500,\) values where the grid has 3501"),
        ("uv_vis", values_with("uv_vis", lambda v: ["nan", *v[1:]]), "not finite"),
        ("uv_vis", values_with("uv_vis", lambda v: ["1e60", *v[1:]]), "not finite"),
        ("raman", values_with("raman", lambda v: ["-0.5", *v[1:]]), "negative intensity -0.5"),
        ("raman", "", "could not convert"),
    ],
)
def test_a_spectrum_that_is_none_is_rejected(tmp_path, molecules, name, text, reason):
    write(tmp_path, molecules)
    rewrite(tmp_path, name, molecules, 2, text)
    records, (reject,) = read(open_source(tmp_path))
    assert len(records) == COUNT - 1
    assert reject.key == molecules[2][0].key and reject.field == f"spectra.{name}"
    assert re.search(reason, reject.reason)


def test_molecules_that_are_none_are_rejected(tmp_path, molecules):
    numbers = [torch.tensor(record.numbers).long() for record, _ in molecules]
    numbers[1], numbers[3] = numbers[1] + 255, torch.zeros(0, dtype=torch.long)
    dipoles = [torch.zeros(1, 3)] * COUNT
    dipoles[4] = torch.full((1, 3), torch.nan)
    polar = [torch.eye(3)[None]] * COUNT
    polar[5] = torch.zeros(1, 6)
    write(tmp_path, molecules, z=numbers, dipole=dipoles, polar=polar)
    records, rejects = read(open_source(tmp_path))
    assert len(records) == 2
    assert [reject.field for reject in rejects] == ["numbers", "numbers", "targets.mu", "targets.alpha"]


def test_large_values_stay_finite(tmp_path, molecules):
    write(tmp_path, molecules)
    rewrite(tmp_path, "uv_vis", molecules, 2, values_with("uv_vis", lambda v: ["123456.0", *v[1:]]))
    records, rejects = read(open_source(tmp_path))
    assert not rejects
    assert records[2].spectra["uv_vis"].dtype == np.float32 and records[2].spectra["uv_vis"][0] == 123456
    assert records[1].spectra["uv_vis"].dtype == np.float16


def test_lines_end_as_they_may(tmp_path, molecules):
    write(tmp_path, molecules)
    before, _ = read(open_source(tmp_path))
    table = tmp_path / "ir_boraden.csv"
    table.write_bytes(table.read_bytes().replace(b"\n", b"\r\n").removesuffix(b"\r\n"))
    after, rejects = read(open_source(tmp_path))
    assert not rejects
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one.spectra["ir"], other.spectra["ir"])


def test_a_table_of_something_else(tmp_path, molecules):
    write(tmp_path, molecules)
    (tmp_path / "ir_boraden.csv").write_bytes((tmp_path / "uv_boraden.csv").read_bytes())
    with pytest.raises(UserError, match=r"ir_boraden\.csv: its header has 701 columns .* 3501 points of ir from 500"):
        open_source(tmp_path)
    qm9s_files.table(tmp_path / "ir_boraden.csv", "ir", [])
    shifted = (tmp_path / "ir_boraden.csv").read_text().replace("500.0,", "500.5,", 1)
    (tmp_path / "ir_boraden.csv").write_text(shifted)
    with pytest.raises(UserError, match="not the 3501 points"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"), [([("a", "1")], "begins with b'a', not an index"), ([(1, "1"), (1, "1")], "the index 1;")]
)
def test_rows_that_belong_to_no_one(tmp_path, molecules, rows, message):
    write(tmp_path, molecules)
    qm9s_files.table(tmp_path / "raman_boraden.csv", "raman", rows)
    with pytest.raises(UserError, match=rf"raman_boraden\.csv: .*{message}"):
        read(open_source(tmp_path))


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(UserError, match=r"qm9s\.pt: not there"):
        open_source(tmp_path)
    torch.save({"model": torch.zeros(3)}, tmp_path / "qm9s.pt")
    with pytest.raises(UserError, match=r"qm9s\.pt: no list of molecules"):
        open_source(tmp_path)
