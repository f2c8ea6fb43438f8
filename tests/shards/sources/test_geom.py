"""GEOM: every conformer is a record, in both of its layouts."""

import argparse
import pickle
import sys

import numpy as np
import pytest

pytest.importorskip("rdkit")
pytest.importorskip("msgpack")

import msgpack
from rdkit import Chem
from rdkit.Chem import AllChem

from mspt.chemistry.units import HARTREE_EV, HARTREE_KCAL_MOL
from mspt.data.shardset import ShardSet
from mspt.errors import UserError
from shards import build
from shards.molecules import embed
from shards.sources import geom
from tests.shards.reading import read

# The third is a drug (paracetamol), the fourth is charged.
SMILES = ["CCO", "CC(=O)OC", "CC(=O)Nc1ccc(O)cc1", "C[NH3+]"]
CONFORMERS = 3


@pytest.fixture(scope="module")
def ensembles():
    """SMILES -> RDKit molecules, a conformer each, with their MMFF energies in Hartree; not in the order of energy."""
    found = {}
    for smiles in SMILES:
        made = [embed(smiles, seed) for seed in range(CONFORMERS)]
        energies = [_energy(molecule) for molecule in made]
        if energies[0] == min(energies):
            made, energies = made[::-1], energies[::-1]
        found[smiles] = list(zip(made, energies, strict=True))
    return found


def _energy(molecule):
    force_field = AllChem.MMFFGetMoleculeForceField(molecule, AllChem.MMFFGetMoleculeProperties(molecule))
    return force_field.CalcEnergy() / HARTREE_KCAL_MOL


def ensemble(pairs, geometry):
    """What GEOM holds of a molecule; geometry: RDKit molecule -> the fields of its geometry."""
    lowest = min(energy for _, energy in pairs)
    relative = [(energy - lowest) * HARTREE_KCAL_MOL for _, energy in pairs]
    weights = np.exp(-np.array(relative) / 0.5925)
    conformers = [
        {
            **geometry(molecule),
            "geom_id": i,
            "set": 1,
            "degeneracy": 1,
            "totalenergy": energy,
            "relativeenergy": relative[i],
            "boltzmannweight": weights[i] / weights.sum(),
            "conformerweights": [weights[i] / weights.sum()],
        }
        for i, (molecule, energy) in enumerate(pairs)
    ]
    return {
        "conformers": conformers,
        "totalconfs": len(pairs),
        "uniqueconfs": len(pairs),
        "lowestenergy": lowest,
        "charge": Chem.GetFormalCharge(pairs[0][0]),
    }


def xyz(molecule):
    positions = molecule.GetConformer().GetPositions().tolist()
    return {"xyz": [[float(a.GetAtomicNum()), *p] for a, p in zip(molecule.GetAtoms(), positions, strict=True)]}


def crude(ensembles):
    return {smiles: ensemble(pairs, xyz) for smiles, pairs in ensembles.items()}


def write_crude(path, content):
    """Two molecules a message, where GEOM has 1000."""
    items = list(content.items())
    path.write_bytes(b"".join(msgpack.packb(dict(items[i : i + 2])) for i in range(0, len(items), 2)))


def write_pickles(folder, ensembles):
    folder.mkdir()
    for i, (smiles, pairs) in enumerate(ensembles.items()):
        content = ensemble(pairs, lambda molecule: {"rd_mol": molecule}) | {"smiles": smiles}
        (folder / f"{i}.pickle").write_bytes(pickle.dumps(content))


def open_source(path, *arguments):
    parser = argparse.ArgumentParser()
    geom.add_arguments(parser)
    return geom.open(parser.parse_args(["--from", str(path), *arguments]))


def assert_right(records, ensembles):
    """Records that hold what is known of the conformers, by their keys."""
    by_key = {record.key: record for record in records}
    assert len(by_key) == len(records) == len(SMILES) * CONFORMERS
    for number, (smiles, pairs) in enumerate(ensembles.items()):
        lowest = min(energy for _, energy in pairs)
        for i, (molecule, energy) in enumerate(pairs):
            record = by_key[f"geom-{number:06d}-{i:04d}"]
            assert record.smiles == smiles
            assert record.charge == Chem.GetFormalCharge(molecule)
            assert record.numbers.dtype == np.uint8 and record.positions.dtype == np.float32
            assert record.numbers.tolist() == [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
            np.testing.assert_allclose(record.positions, molecule.GetConformer().GetPositions(), atol=1e-6)
            assert record.targets["energy"] == pytest.approx(energy * HARTREE_EV)
            assert record.targets["relative_energy"] == pytest.approx((energy - lowest) * HARTREE_EV, abs=1e-9)
        own = [by_key[f"geom-{number:06d}-{i:04d}"] for i in range(CONFORMERS)]
        assert sum(record.targets["boltzmann_weight"] for record in own) == pytest.approx(1)


@pytest.mark.parametrize(
    ("size", "molecules"), [(1, [1, 1, 1, 1]), (2 * geom.CONFORMERS, [2, 2]), (10 * geom.CONFORMERS, [4])]
)
def test_crude(tmp_path, ensembles, size, molecules):
    write_crude(tmp_path / "drugs_crude.msgpack", crude(ensembles))
    source = open_source(tmp_path / "drugs_crude.msgpack")
    records, rejects = read(source, size)
    assert not rejects
    assert_right(records, ensembles)
    assert records[0].targets.keys() == source.provenance["units"].keys()
    assert [len(chunk) for chunk in source.chunks(size)] == molecules


def test_pickles_want_trust(tmp_path, ensembles):
    write_pickles(tmp_path / "drugs", ensembles)
    with pytest.raises(UserError, match=r"0\.pickle: .*rdkit\.Chem\.rdchem\.Mol.*--trust-pickle"):
        open_source(tmp_path)
    records, rejects = read(open_source(tmp_path, "--trust-pickle"))
    assert not rejects
    assert_right(records, ensembles)
    ethanol = records[0]
    assert len(ethanol.bonds) == 8 and ethanol.bond_types.tolist() == [1] * 8


def test_the_lowest_conformers_keep_their_keys(tmp_path, ensembles):
    write_crude(tmp_path / "a.msgpack", crude(ensembles))
    every, _ = read(open_source(tmp_path))
    for count in (1, 2, 99):
        records, _ = read(open_source(tmp_path, "--conformers", str(count)))
        expected = []
        for number in range(len(SMILES)):
            own = [record for record in every if record.key.startswith(f"geom-{number:06d}-")]
            lowest = sorted(own, key=lambda record: record.targets["energy"])[:count]
            expected += [record.key for record in lowest]
        assert [record.key for record in records] == expected
    with pytest.raises(UserError, match="--conformers 0"):
        open_source(tmp_path, "--conformers", "0")


def test_files_follow_each_other_by_name(tmp_path, ensembles):
    content = list(crude(ensembles).items())
    write_crude(tmp_path / "qm9_crude.msgpack", dict(content[2:]))
    write_crude(tmp_path / "drugs_crude.msgpack", dict(content[:2]))
    featurized = {smiles: [{"atoms": [], "bonds": []}] for smiles in ensembles}
    (tmp_path / "qm9_featurized.msgpack").write_bytes(msgpack.packb(featurized))
    source = open_source(tmp_path)
    assert [path.name for path in source.inputs] == ["drugs_crude.msgpack", "qm9_crude.msgpack"]
    records, rejects = read(source)
    assert not rejects
    assert_right(records, ensembles)
    with pytest.raises(UserError, match=r"qm9_featurized\.msgpack: CCO has no conformers; give .*crude"):
        open_source(tmp_path / "qm9_featurized.msgpack")


def test_conformers_that_are_none_are_rejected(tmp_path, ensembles):
    content = crude(ensembles)
    first, second, third = content["CCO"]["conformers"]
    first["xyz"][0][0] = 300.0
    second["xyz"][1] = second["xyz"][0]
    del third["xyz"]
    content["CC(=O)OC"] = {"uniqueconfs": 0}
    content["C[NH3+]"]["conformers"][1]["totalenergy"] = float("nan")
    write_crude(tmp_path / "a.msgpack", content)
    records, rejects = read(open_source(tmp_path))
    assert len(records) == 2 * CONFORMERS - 1
    assert {(reject.key, reject.field) for reject in rejects} == {
        ("geom-000000-0000", "conformers"),
        ("geom-000000-0001", "positions"),
        ("geom-000000-0002", "conformers"),
        ("geom-000001", "conformers"),
        ("geom-000003-0001", "targets.energy"),
    }


def test_a_damaged_pickle_is_one_reject(tmp_path, ensembles):
    write_pickles(tmp_path / "drugs", ensembles)
    file = tmp_path / "drugs/2.pickle"
    file.write_bytes(file.read_bytes()[:-50])
    records, (reject,) = read(open_source(tmp_path, "--trust-pickle"))
    assert len(records) == (len(SMILES) - 1) * CONFORMERS
    assert reject.key == "geom-000002" and "2.pickle" in reject.reason


def test_files_of_something_else(tmp_path, ensembles, monkeypatch):
    with pytest.raises(UserError, match="neither"):
        open_source(tmp_path)
    (tmp_path / "a.msgpack.tar.gz").touch()
    with pytest.raises(UserError, match=r"a\.msgpack\.tar\.gz: .*unpack"):
        open_source(tmp_path / "a.msgpack.tar.gz")
    write_crude(tmp_path / "a.msgpack", crude(ensembles))
    whole = (tmp_path / "a.msgpack").read_bytes()
    (tmp_path / "a.msgpack").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"a\.msgpack: byte \d+: .*is it whole"):
        read(open_source(tmp_path))
    for data, message in ((b"C 0 0 0\n", "is it whole"), (msgpack.packb({}), "no molecule"), (b"", "no molecule")):
        (tmp_path / "a.msgpack").write_bytes(data)
        with pytest.raises(UserError, match=rf"a\.msgpack: .*{message}"):
            open_source(tmp_path)
    write_pickles(tmp_path / "drugs", ensembles)
    with pytest.raises(UserError, match="both"):
        open_source(tmp_path)
    monkeypatch.setitem(sys.modules, "rdkit.Chem.rdchem", None)
    with pytest.raises(UserError, match=r"0\.pickle: cannot be opened .*rdkit"):
        open_source(tmp_path / "drugs", "--trust-pickle")


def test_conformers_of_a_molecule_are_in_one_part(tmp_path, ensembles):
    """A split by key would otherwise train on what it holds out."""
    write_crude(tmp_path / "drugs_crude.msgpack", crude(ensembles))
    out = tmp_path / "out"
    settings = build.Settings(split="heldout=0.5", inchikey=False)
    build.build(open_source(tmp_path / "drugs_crude.msgpack"), out, settings, "made")
    parts = [{record.smiles for record in records(out / part)} for part in ("train", "heldout")]
    assert parts[0] | parts[1] == set(SMILES) and not parts[0] & parts[1]


def test_rows_that_cannot_be_counted_have_no_limit(tmp_path, ensembles):
    """Chunks are whole molecules: the first N rows would be others, and fewer, as the chunks happen to end."""
    write_crude(tmp_path / "drugs_crude.msgpack", crude(ensembles))
    with pytest.raises(UserError, match="--limit is 5, but only reading tells .*; give --conformers N .*, or --from"):
        build.build(open_source(tmp_path), tmp_path / "out", build.Settings(limit=5), "made")
    assert not list(tmp_path.glob("*out*"))


def records(folder):
    shardset = ShardSet.open(folder)
    return shardset.records(range(len(shardset)))
