"""QM9S as MolSpectra prepares it, in every form in which torch-geometric may have put it together."""

import argparse

import numpy as np
import pytest
import torch

from mspt.chemistry.spectra import GRIDS
from mspt.errors import UserError
from shards.sources import qm9, qm9s_processed
from tests.shards.reading import read
from tests.shards.sources import qm9s_files

data = pytest.importorskip("torch_geometric.data")
COUNT = 5
FORMS = {
    "[N * L]": lambda values: torch.tensor(values).float(),
    "[N, L]": lambda values: torch.tensor(values).float()[None],
    "arrays": lambda values: values,
}


@pytest.fixture(scope="module")
def molecules():
    return qm9s_files.molecules(COUNT)


def write(path, molecules, form="[N, L]", shape="dict", leave_out=()):
    """The file; form: how a spectrum lies in a molecule's Data. shape: what is saved of the collated molecules."""
    rows = []
    for record, values in molecules:
        row = {name: value for name, value in qm9s_files.fields(record).items() if name in ("edge_index", "pos", "z")}
        targets = [record.targets[name] for name in qm9.TARGETS]
        row |= {
            "y": torch.tensor([targets + [0.0] * 7]),  # the last 7 are not read
            "name": f"gdb_{qm9s_files.number(record)}",
            "smiles": record.smiles,
        }
        row |= {own: FORMS[form](values[name]) for name, own in qm9s_files.NAMES.items()}
        rows.append(data.Data(**{name: value for name, value in row.items() if name not in leave_out}))
    together, slices = data.InMemoryDataset.collate(rows)
    torch.save((together.to_dict(), slices, data.Data) if shape == "dict" else (together, slices), path)


def open_source(path):
    parser = argparse.ArgumentParser()
    qm9s_processed.add_arguments(parser)
    return qm9s_processed.open(parser.parse_args(["--from", str(path)]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", ["dict", "Data"])
def test_molecules_with_their_spectra(tmp_path, molecules, form, shape):
    write(tmp_path / "a.pt", molecules, form, shape)
    source = open_source(tmp_path / "a.pt")
    records, rejects = read(source, 2)
    assert not rejects and len(records) == source.total == COUNT
    for record, (molecule, values) in zip(records, molecules, strict=True):
        assert record.key == molecule.key
        assert record.smiles == molecule.smiles
        np.testing.assert_array_equal(record.numbers, molecule.numbers)
        np.testing.assert_array_equal(record.positions, molecule.positions)
        assert record.targets == pytest.approx(molecule.targets, rel=1e-6)
        assert record.targets.keys() == source.provenance["units"].keys()
        assert record.spectra.keys() == record.methods.keys() == GRIDS.keys()
        for name, spectrum in record.spectra.items():
            assert spectrum.dtype == np.float16
            np.testing.assert_allclose(spectrum, values[name], rtol=2**-10, atol=2**-24)


def test_what_may_be_missing(tmp_path, molecules, capsys):
    write(tmp_path / "a.pt", molecules, leave_out=["y", "name", "smiles", "uv"])
    source = open_source(tmp_path / "a.pt")
    records, rejects = read(source)
    assert not rejects
    assert [record.key for record in records] == [f"qm9s-index-{i:06d}" for i in range(COUNT)]
    assert {(record.smiles, len(record.targets), *record.spectra) for record in records} == {("", 0, "ir", "raman")}
    assert source.provenance["methods"].keys() == {"ir", "raman"} and not source.provenance["units"]
    assert "keys are places" in capsys.readouterr().out


def test_what_is_no_spectrum_is_rejected(tmp_path, molecules):
    broken = [(record, dict(values)) for record, values in molecules]
    broken[1][1]["ir"] = np.full(GRIDS["ir"].length, -1.0)
    broken[3][1]["uv_vis"] = np.full(GRIDS["uv_vis"].length, np.nan)
    broken[4][1]["raman"] = np.zeros(3500)
    write(tmp_path / "a.pt", broken, "arrays")
    records, rejects = read(open_source(tmp_path / "a.pt"))
    assert len(records) == 2
    assert [reject.field for reject in rejects] == ["spectra.ir", "spectra.uv_vis", "spectra.raman"]


def test_a_file_of_something_else(tmp_path, molecules):
    with pytest.raises(UserError, match=r"a\.pt: not there"):
        open_source(tmp_path / "a.pt")
    torch.save([{"z": 1}], tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: no data and slices"):
        open_source(tmp_path / "a.pt")
    write(tmp_path / "a.pt", molecules, leave_out=["z"])
    with pytest.raises(UserError, match=r"a\.pt: its molecules have no z and pos"):
        open_source(tmp_path / "a.pt")
    write(tmp_path / "a.pt", molecules, leave_out=["uv", "ir", "raman"])
    with pytest.raises(UserError, match=r"a\.pt: has neither uv nor ir nor raman"):
        open_source(tmp_path / "a.pt")
