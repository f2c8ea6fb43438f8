"""What the tests of sources share: a source from its command line, and molecules of QM9 as RDKit's."""

import argparse
import functools
import itertools

from shards.sources import qm9


def opened(module, *arguments):
    """The Source of a module for these arguments of its command line."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.open(parser.parse_args([str(argument) for argument in arguments]))


@functools.cache
def geometries(count):
    """The first Molecules of qm9pack."""
    return list(itertools.islice(qm9.molecules(), count))


def with_bonds(molecule):
    """A Molecule of qm9pack as RDKit's, with its bonds and all hydrogens."""
    from rdkit import Chem
    from rdkit.Chem import rdDetermineBonds

    symbols = [Chem.GetPeriodicTable().GetElementSymbol(int(z)) for z in molecule.numbers]
    lines = [f"{symbol} {x:.6f} {y:.6f} {z:.6f}" for symbol, (x, y, z) in zip(symbols, molecule.positions, strict=True)]
    made = Chem.MolFromXYZBlock("\n".join([str(len(lines)), "", *lines, ""]))
    rdDetermineBonds.DetermineBonds(made)
    return made
