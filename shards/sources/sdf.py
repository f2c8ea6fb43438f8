"""Any SDF: one record an entry, in the geometry that it has; targets from its properties."""

import contextlib
import itertools
from pathlib import Path

from mspt.data.schema import Record, RejectedRecord
from mspt.errors import UserError
from shards import columns, entries, molecules
from shards.source import Source

HELP = "an SDF with 3D coordinates (.sdf, .sdf.gz, or in a .tar.gz)"
# So many entries tell which properties a file has.
FIRST = 100


def add_arguments(parser):
    parser.add_argument("--from", dest="path", required=True, type=Path, metavar="FILE")
    columns.add_argument(parser)
    parser.add_argument(
        "--key", metavar="COLUMN", help="property with a unique key, or _Name, the title line (default: FILE-NUMBER)"
    )
    parser.add_argument("--add-hydrogens", action="store_true", help="to entries that lack them, where RDKit puts them")


def open(options):
    """Raises UserError where the file is not there, is no SDF, or lacks a column."""
    path, chosen = options.path, columns.parse(options.targets)
    if not path.is_file():
        raise UserError(f"{path}: is not a file; give an SDF")
    names = {}
    for chunk in itertools.islice(entries.chunks(path, FIRST), 1):
        for number, text in entries.texts(path, chunk):
            with contextlib.suppress(RejectedRecord):
                names |= properties(entries.molecule(text, number))
    if not names:
        raise UserError(f"{path}: RDKit can read none of its first {FIRST} entries; is it an SDF?")
    columns.check(path, chosen, names)
    if options.key and options.key not in names:
        raise UserError(f"{path}: --key {options.key}: no such property; there are {', '.join(names)}")
    return Sdf(path, chosen, options.key, options.add_hydrogens)


def properties(molecule):
    """Name -> text of the SD properties of RDKit's molecule, and of its title as _Name."""
    return {name: molecule.GetProp(name) for name in ("_Name", *molecule.GetPropNames())}


class Sdf(Source):
    def __init__(self, path, chosen, key, add_hydrogens):
        self.path, self.chosen, self.key, self.add_hydrogens = path, chosen, key, add_hydrogens
        self.inputs = [path]
        self.provenance = {"source": path.name, "units": columns.units(chosen)}

    def chunks(self, size):
        return entries.chunks(self.path, size)

    def read(self, chunk):
        for number, text in entries.texts(self.path, chunk):
            try:
                yield self._record(f"{entries.stem(self.path)}-{number:07d}", text)
            except RejectedRecord as error:
                yield error

    def _record(self, key, text):
        molecule = entries.molecule(text, key)
        row = properties(molecule)
        if self.key:
            if not row.get(self.key, "").strip():
                raise RejectedRecord(key, "key", f"the entry has no {self.key}")
            key = row[self.key].strip()
        _refuse_flat(key, molecule, text)
        molecule = self._whole(key, molecule)
        targets = columns.targets(self.chosen, row, key)
        return Record(key, **molecules.fields(molecule), targets=targets, source=self.path.name)

    def _whole(self, key, molecule):
        """The molecule with all hydrogens, or RejectedRecord."""
        from rdkit import Chem

        missing = sum(atom.GetTotalNumHs() for atom in molecule.GetAtoms())
        if not missing:
            return molecule
        if not self.add_hydrogens:
            raise RejectedRecord(key, "numbers", f"{missing} hydrogens are missing; --add-hydrogens adds them")
        try:
            Chem.SanitizeMol(molecule)
        except Chem.MolSanitizeException as error:
            raise RejectedRecord(key, "numbers", f"{missing} hydrogens cannot be added: {error}") from error
        return Chem.AddHs(molecule, addCoords=True)


def _refuse_flat(key, molecule, text):
    """RejectedRecord where all z are 0 and the header says 2D, or says nothing of a molecule that is hardly planar."""
    flag = text.split("\n", 2)[1][20:22]
    drawn = flag == "2D" or (flag != "3D" and molecule.GetNumHeavyAtoms() > 3)
    if drawn and not molecule.GetConformer().GetPositions()[:, 2].any():
        raise RejectedRecord(key, "positions", "all z are 0: the entry is a drawing, without 3D coordinates")
