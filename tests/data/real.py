"""A small set of real molecules with everything that a record can have, in some of its records."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from rdkit import Chem
from rdkit.Chem import AllChem, rdDetermineBonds

from mspt.chemistry.spectra import LINE_SHAPES
from mspt.chemistry.units import HARTREE_EV, HARTREE_KCAL_MOL
from mspt.data import look
from mspt.data.batch import MoleculeBatch
from mspt.data.schema import Record
from mspt.data.shardset import ShardSet
from shards.molecules import embed, fields
from tests.data.molecules import write_set

BUNDLED = Path(__file__).parents[2] / "shards" / "bundled" / "qm9-spectra"
# Of the bundled held-out records: a triazole with a triple bond, an aldehyde, two fluorines, an oxadiazole; an ether.
CHOSEN = (31, 94, 35, 219, 200)


def write_everything(folder):
    """Records of CHOSEN and a cation, written as a set in two blocks -> the Records.

    0 to 3 have bonds, lines of Raman and no UV-Vis, 0 and 2 values of IR and an energy (eV) and forces by MMFF94. 4 is
    as it lies in the bundled set, without bonds. 5 is the cation, without spectra and targets.
    """
    records = list(ShardSet.open(BUNDLED / "heldout").records(CHOSEN))
    for number, one in enumerate(records[:4]):
        molecule = Chem.MolFromXYZBlock(look.xyz(one))
        rdDetermineBonds.DetermineBonds(molecule, charge=0)
        changes = fields(molecule) | {"spectra": {"raman": one.spectra["raman"]}, "targets": {}}
        if number % 2 == 0:
            values = MoleculeBatch.from_records([one]).broadened(LINE_SHAPES).spectra["ir"][0]
            changes["spectra"]["ir"] = values.numpy().astype(np.float16)
            changes["targets"]["energy"], changes["forces"] = _by_mmff(molecule)
        records[number] = replace(one, **changes)
    records.append(Record(key="glycinium", **fields(embed("[NH3+]CC(=O)O", 1))))
    write_set(folder, records, block=4)
    return records


def _by_mmff(molecule):
    """Energy (eV) and forces (eV/Å)."""
    field = AllChem.MMFFGetMoleculeForceField(molecule, AllChem.MMFFGetMoleculeProperties(molecule))
    unit = HARTREE_EV / HARTREE_KCAL_MOL
    return field.CalcEnergy() * unit, (-unit * np.array(field.CalcGrad()).reshape(-1, 3)).astype(np.float32)
