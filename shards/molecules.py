"""RDKit's molecules -> fields of a Record."""

import numpy as np

# Codes of Record.bond_types.
BOND_TYPES = {"SINGLE": 1, "DOUBLE": 2, "TRIPLE": 3, "AROMATIC": 4}


def fields(molecule, conformer=-1):
    """numbers, positions (Å), bonds, bond_types, charge and canonical SMILES (without explicit H) of a molecule in 3D.

    Bonds of other orders than BOND_TYPES get the code 0; a molecule that RDKit cannot sanitise gets no SMILES, and one
    of more atoms than a record's bonds can number no bonds. Raises ValueError where there is no conformer.
    """
    from rdkit import Chem, rdBase

    bonds = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds()]
    types = [BOND_TYPES.get(str(bond.GetBondType()), 0) for bond in molecule.GetBonds()]
    numbered = molecule.GetNumAtoms() <= np.iinfo(np.int16).max
    with rdBase.BlockLogs():
        try:
            smiles = Chem.MolToSmiles(Chem.RemoveHs(molecule))
        except Chem.MolSanitizeException:
            smiles = ""
    return {
        "numbers": np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()], np.uint8),
        "positions": molecule.GetConformer(conformer).GetPositions().astype(np.float32),
        "bonds": np.array(bonds, np.int16).reshape(-1, 2) if numbered else None,
        "bond_types": np.array(types, np.uint8) if numbered else None,
        "charge": Chem.GetFormalCharge(molecule),
        "smiles": smiles,
    }


def refuse_ions_and_radicals(molecule):
    """ValueError where an RDKit molecule is charged or has unpaired electrons: what is computed here is for neither."""
    from rdkit import Chem

    charge = Chem.GetFormalCharge(molecule)
    radicals = sum(atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms())
    if charge or radicals:
        raise ValueError(
            f"charge {charge:+d}, {radicals} unpaired electrons; only neutral molecules with closed shells are computed"
        )


def embed(smiles, seed):
    """A SMILES -> a molecule with hydrogens in 3D, by ETKDG and MMFF94, the same for the same seed.

    seed: any integer. Raises ValueError where RDKit cannot read or embed it.
    """
    from rdkit import Chem
    from rdkit.Chem import AllChem

    parsed = Chem.MolFromSmiles(smiles)
    if parsed is None:
        raise ValueError(f"RDKit cannot read the SMILES {smiles!r}")
    molecule = Chem.AddHs(parsed)
    if AllChem.EmbedMolecule(molecule, randomSeed=seed & 0x7FFFFFFF) != 0:
        raise ValueError(f"RDKit cannot embed {smiles!r}")
    if AllChem.MMFFHasAllMoleculeParams(molecule):
        AllChem.MMFFOptimizeMolecule(molecule, maxIters=2000)
    return molecule
