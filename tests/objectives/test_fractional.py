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
from shards.molecules import from_rdkit
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
    return [Record(key=str(number), **from_rdkit(molecule)) for number, molecule in enumerate(molecules())]
