"""MD17 and rMD17: every frame with its energy and forces in eV and eV/Å."""

import numpy as np
import pytest

from mspt.errors import UserError
from shards.sources import md17
from tests.shards.reading import read
from tests.shards.sources.fixtures import geometries, opened

KCAL_MOL = 27.211386245988 / 627.5094740631
FRAMES = 7
# Force constant of the made-up harmonic trajectory, kcal/mol/Å^2.
STIFF = 300.0


@pytest.fixture(scope="module")
def trajectory():
    """numbers, positions, energies, forces of ammonia in a harmonic well around its geometry."""
    molecule, rng = geometries(2)[1], np.random.default_rng(0)
    displacements = rng.normal(0, 0.05, (FRAMES, len(molecule.numbers), 3))
    energies = -35_000 + STIFF / 2 * (displacements**2).sum((1, 2))
    return molecule.numbers, molecule.positions + displacements, energies, -STIFF * displacements


def write(path, trajectory, save=np.savez_compressed, **others):
    numbers, positions, energies, forces = trajectory
    if path.name.startswith("rmd17"):
        fields = {"nuclear_charges": numbers, "coords": positions, "energies": energies, "forces": forces}
        fields["old_indices"] = np.arange(FRAMES)
    else:
        fields = {"z": numbers, "R": positions, "E": energies[:, None], "F": forces, "name": np.array("ammonia")}
    save(path, **fields | others)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["md17_ammonia", "rmd17_ammonia"])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_frames(tmp_path, trajectory, name, save, size):
    source = opened(md17, "--from", write(tmp_path / f"{name}.npz", trajectory, save))
    records, rejects = read(source, size)
    assert not rejects
    assert source.total == FRAMES
    assert source.provenance["units"] == {"energy": "eV"}
    numbers, positions, energies, forces = trajectory
    for i, record in enumerate(records):
        assert record.key == f"{name.replace('_', '-')}-{i:06d}"
        assert record.numbers.tolist() == numbers.tolist() == [7, 1, 1, 1]
        np.testing.assert_allclose(record.positions, positions[i], atol=1e-6)
        assert record.targets["energy"] == pytest.approx(energies[i] * KCAL_MOL, rel=1e-12)
        np.testing.assert_allclose(record.forces, forces[i] * KCAL_MOL, rtol=1e-6)
    assert len(records) == FRAMES


@pytest.mark.parametrize(("name", "level"), [("md17_a", "MD17 a (PBE+vdW-TS)"), ("rmd17_a", "PBE/def2-SVP")])
def test_the_level_of_theory(tmp_path, trajectory, name, level):
    assert level in opened(md17, "--from", write(tmp_path / f"{name}.npz", trajectory)).provenance["source"]
    given = write(tmp_path / "ammonia_ccsd-train.npz", trajectory, theory=np.array(b"ccsd(t)"))
    source = opened(md17, "--from", given)
    assert source.provenance["source"] == "MD17 ammonia_ccsd-train (ccsd(t))"
    assert read(source)[0][0].key == "md17-ammonia_ccsd-train-000000"


def test_files_that_are_none(tmp_path, trajectory):
    def refused(path, reason):
        with pytest.raises(UserError, match=reason) as error:
            read(opened(md17, "--from", path))
        assert str(path) in str(error.value)

    refused(tmp_path / "none.npz", "cannot be read as an .npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    refused(tmp_path / "other.npz", "holds x; needed are z, R, E, F")
    numbers, positions, energies, forces = trajectory
    refused(write(tmp_path / "md17_a.npz", (numbers, positions, energies, forces[:-1])), r"F has shape \(6, 4, 3\)")
    refused(write(tmp_path / "md17_a.npz", (numbers[:-1], *trajectory[1:])), r"R has shape \(7, 4, 3\)")
    refused(write(tmp_path / "md17_a.npz", (numbers, np.asfortranarray(positions), energies, forces)), "C order")
    refused(write(tmp_path / "md17_a.npz", trajectory, e_unit=np.array("Hartree")), "e_unit is 'Hartree'")
    whole = write(tmp_path / "md17_a.npz", trajectory).read_bytes()
    for damaged in (whole[:-100], whole[:700] + bytes(200) + whole[900:]):
        (tmp_path / "md17_a.npz").write_bytes(damaged)
        refused(tmp_path / "md17_a.npz", "cannot be read as an .npz")
