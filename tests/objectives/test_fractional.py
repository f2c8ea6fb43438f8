"""Rotatable bonds and the turning of torsions, against RDKit."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import rdMolTransforms

from mspt.data.batch import MoleculeBatch
from mspt.data.keyed import Keyed
from mspt.data.schema import Record
from mspt.errors import UserError
from mspt.objectives.fractional import Frad, FradSettings, rotatable, turned
from mspt.training.trainer import check_bonds
from shards.molecules import fields
from tests.objectives.made import batch_of

SMILES = [
    "CCO",
    "CC#CC",
    "CC#CCCO",
    "CC1CCC(C=C)CC1",
    "c1ccccc1-c1ccccc1",
    "CC(=O)NC",
    "C1CC1C1CC1C2CC2",
    "C1CC2CCC1C2CO",
    "[NH4+].[Cl-]",
    "OCC.CCO",
    "CC(C)(C)CC(C)(C)CO",
    "C",
]
# As the public code finds them, in molecules with their hydrogens.
PATTERN = Chem.MolFromSmarts("[!$(*#*)&!D1]-&!@[!$(*#*)&!D1]")


def molecules():
    for number, smiles in enumerate(SMILES):
        molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
        conformer = Chem.Conformer(molecule.GetNumAtoms())
        # Bonds and torsions do not depend on the shape.
        places = 3 * np.random.default_rng(number).normal(size=(molecule.GetNumAtoms(), 3))
        for atom, place in enumerate(places):
            conformer.SetAtomPosition(atom, place.tolist())
        conformer.Set3D(True)
        molecule.AddConformer(conformer)
        yield molecule


def records():
    return [Record(key=str(number), **fields(molecule)) for number, molecule in enumerate(molecules())]


def found(bonds, batch):
    """Per molecule the rotatable bonds as pairs of its atoms, each in the direction that it turns."""
    result = {}
    for fixed, turning, molecule in zip(bonds.fixed, bonds.turning, bonds.molecule, strict=True):
        first = int(batch.ptr[molecule])
        result.setdefault(int(molecule), []).append((int(fixed) - first, int(turning) - first))
    return result


def test_rotatable_bonds_are_those_of_the_public_code():
    batch = batch_of(records())
    bonds = found(rotatable(batch), batch)
    for number, molecule in enumerate(molecules()):
        expected = {frozenset(match) for match in molecule.GetSubstructMatches(PATTERN)}
        assert {frozenset(pair) for pair in bonds.get(number, [])} == expected, SMILES[number]
    assert sum(map(len, bonds.values())) > 20


def test_turning_changes_torsions_and_nothing_else():
    batch = batch_of(records())
    bonds = rotatable(batch)
    angles = torch.linspace(-2, 2, len(bonds.fixed), dtype=torch.float64)
    after = turned(batch.positions, bonds, angles)
    per_molecule, at = found(bonds, batch), 0
    for number, molecule in enumerate(molecules()):
        first, last = batch.ptr[number], batch.ptr[number + 1]
        before = Chem.Conformer(molecule.GetConformer())
        places = after[first:last].numpy()
        moved = Chem.Conformer(before)
        for atom, place in enumerate(places):
            moved.SetAtomPosition(atom, place.tolist())
        topology = Chem.GetDistanceMatrix(molecule)
        near = np.argwhere((topology == 1) | (topology == 2))
        spans = [np.linalg.norm(x[near[:, 0]] - x[near[:, 1]], axis=1) for x in (before.GetPositions(), places)]
        np.testing.assert_allclose(spans[1], spans[0], rtol=0, atol=1e-5)
        for fixed, turning in per_molecule.get(number, []):
            ends = [
                next(n.GetIdx() for n in molecule.GetAtomWithIdx(one).GetNeighbors() if n.GetIdx() != other)
                for one, other in ((fixed, turning), (turning, fixed))
            ]
            torsions = [rdMolTransforms.GetDihedralRad(c, ends[0], fixed, turning, ends[1]) for c in (before, moved)]
            change = torsions[1] - torsions[0] - angles[at].item()
            assert math.cos(change) > 1 - 1e-8, (SMILES[number], fixed, turning)
            at += 1
    assert at == len(angles)
    # The smaller side turns.
    turning = torch.bincount(bonds.bond, minlength=len(angles))
    assert (2 * turning <= batch.ptr.diff()[bonds.molecule]).all()


def test_a_record_turns_the_same_in_any_company():
    objective = Frad(FradSettings(torsion_sigma=40.0), SimpleNamespace(width=8))
    one, many = (batch_of(chosen) for chosen in (records()[4:5], records()))
    alone, together = (objective.start(batch, Keyed(0, 0)) for batch in (one, many))
    torch.testing.assert_close(together[many.ptr[4] : many.ptr[5]], alone, rtol=0, atol=1e-12)
    assert (alone - one.positions).norm() > 0.5
    assert not torch.equal(objective.start(one, Keyed(0, 1)), alone)


def test_unknown_bonds_do_not_turn():
    objective, known = Frad(FradSettings(), SimpleNamespace(width=8)), records()[:3]
    unknown = [replace(record, bonds=None, bond_types=None) for record in known]
    for batch in (batch_of([known[0], unknown[2]]), batch_of(unknown)):
        start = objective.start(batch, Keyed(0, 0))
        assert torch.equal(start[-1], batch.positions[-1])
    assert torch.equal(start, batch.positions)
    assert len(objective.start(MoleculeBatch.empty(), Keyed(0, 0))) == 0


def test_a_set_without_bonds_is_refused():
    class Set(list):
        folder = "data/x"

        def records(self, numbers):
            return (self[number] for number in numbers)

    check_bonds(Set([replace(records()[0], bonds=None), records()[1]]))
    with pytest.raises(UserError, match="data/x: its records have no bonds"):
        check_bonds(Set([replace(records()[0], bonds=None)]))
