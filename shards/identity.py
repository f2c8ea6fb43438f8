"""Which molecule a SMILES is, and which group of molecules it belongs to, by RDKit."""

import functools

from mspt.errors import UserError


# Conformers of a molecule follow one another.
@functools.lru_cache(maxsize=64)
def _parsed(smiles):
    """RDKit's molecule, or None where there is no SMILES or RDKit cannot read it."""
    try:
        from rdkit import Chem, rdBase
    except ModuleNotFoundError as error:
        raise UserError(
            "RDKit is not installed: pip install 'mspt[chem]', or give --no-inchikey and --split-by key"
        ) from error
    with rdBase.BlockLogs():
        return Chem.MolFromSmiles(smiles) if smiles else None


@functools.lru_cache(maxsize=64)
def inchikey(smiles):
    """The InChIKey of a SMILES, "" where it has none."""
    molecule = _parsed(smiles)
    if molecule is None:
        return ""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        return Chem.MolToInchiKey(molecule)


@functools.lru_cache(maxsize=64)
def scaffold(smiles):
    """The SMILES of the Murcko scaffold, of the molecule itself where it has no ring; None without a molecule.

    Neither tells stereoisomers apart.
    """
    molecule = _parsed(smiles)
    if molecule is None:
        return None
    from rdkit import Chem, rdBase
    from rdkit.Chem.Scaffolds import MurckoScaffold

    with rdBase.BlockLogs():
        return MurckoScaffold.MurckoScaffoldSmiles(mol=molecule) or Chem.MolToSmiles(molecule, isomericSmiles=False)
