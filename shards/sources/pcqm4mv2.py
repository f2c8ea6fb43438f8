"""PCQM4Mv2 (OGB-LSC): the 3 378 606 training molecules in their DFT geometry, from the SDF or the zip of XYZ files.

The gap of molecule i is in row i of data.csv.gz; each molecule is compared with the SMILES of its row.
"""

import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np

from mspt.data.schema import Record, RejectedRecord
from mspt.errors import UserError
from shards import entries, molecules, zips
from shards.source import Source
from shards.sources import xyz

HELP = "PCQM4Mv2 from pcqm4m-v2-train.sdf(.tar.gz) or pcqm4m-v2_xyz.zip, gaps from data.csv.gz"
SOURCE = "PCQM4Mv2 (B3LYP/6-31G* geometries and gaps, OGB-LSC)"
TABLE = "data.csv.gz"


def add_arguments(parser):
    parser.add_argument("--from", dest="path", required=True, type=Path, metavar="FILE")
    parser.add_argument("--table", type=Path, metavar="FILE", help=f"{TABLE} with the gaps (default: beside --from)")


def open(options):
    """Raises UserError where the file, or a table that is asked for, is not there."""
    table = options.table or options.path.with_name(TABLE)
    if options.table and not table.is_file():
        raise UserError(f"{table}: is not a file; give {TABLE} of PCQM4Mv2, or leave --table out to do without gaps")
    if not options.path.is_file():
        raise UserError(f"{options.path}: is not a file; give pcqm4m-v2-train.sdf.tar.gz or pcqm4m-v2_xyz.zip")
    return Pcqm4mv2(options.path, table if table.is_file() else None)


class Pcqm4mv2(Source):
    """A chunk is (place, index -> (SMILES, gap)); the second is None without a table."""

    def __init__(self, path, table):
        self.path, self.table = path, table
        self.inputs = [path, table] if table else [path]
        self.zipped = path.suffix.lower() == ".zip"
        self.provenance = {"source": SOURCE, "units": {"gap": "eV"} if table else {}}

    def chunks(self, size):
        table = _table(self.table) if self.table else None
        for place in self._zipped(size) if self.zipped else entries.chunks(self.path, size):
            indices = [index for index, _ in place] if self.zipped else range(place[0], place[0] + size)
            yield place, None if table is None else _labels(table, indices)

    def read(self, chunk):
        place, labels = chunk
        for index, raw in self._files(place) if self.zipped else entries.texts(self.path, place):
            key = f"pcqm4mv2-{index:07d}"
            try:
                fields = self._frame(raw, key) if self.zipped else molecules.fields(entries.molecule(raw, key))
                if labels is not None:
                    smiles, gap = _label(labels, index, fields["numbers"], key)
                    fields["smiles"] = fields.get("smiles") or smiles
                    fields["targets"] = {} if gap is None else {"gap": gap}
                yield Record(key, **fields, source=SOURCE)
            except RejectedRecord as error:
                yield error

    def _zipped(self, size):
        """Yield lists of size (index, Member)."""
        try:
            with self.path.open("rb") as file:
                members = ((_index(member.name), member) for member in zips.members(file))
                of_molecules = (pair for pair in members if pair[0] is not None)
                while place := list(itertools.islice(of_molecules, size)):
                    yield place
        except ValueError as error:
            raise UserError(f"{self.path}: cannot be read as a zip ({error}); fetch it again") from error

    def _files(self, place):
        with self.path.open("rb") as file:
            for index, member in place:
                yield index, (file, member)

    def _frame(self, raw, key):
        try:
            atoms, _ = xyz.frame(zips.read(*raw), key)
        except ValueError as error:
            raise RejectedRecord(key, "positions", f"cannot be unpacked: {error}") from error
        return {"numbers": atoms.numbers.astype(np.uint8), "positions": atoms.positions.astype(np.float32)}


def _index(name):
    match = re.search(r"(\d+)\.xyz$", name)
    return int(match[1]) if match else None


def _table(path):
    """Columns smiles, homolumogap of data.csv.gz, a row a molecule."""
    import pyarrow
    from pyarrow import csv

    types = {"idx": pyarrow.int64(), "smiles": pyarrow.string(), "homolumogap": pyarrow.float64()}
    convert = csv.ConvertOptions(column_types=types, include_columns=list(types))
    try:
        table = csv.read_csv(path, convert_options=convert).combine_chunks()  # take is slow where there are many
    except (OSError, KeyError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path}: cannot be read as the table of PCQM4Mv2 ({error}); fetch it again") from error
    if not np.array_equal(table["idx"].to_numpy(), np.arange(table.num_rows)):
        raise UserError(f"{path}: idx does not count the rows from 0; give {TABLE} as it is published")
    return table


def _labels(table, indices):
    """index -> (SMILES, gap or None) of the indices that the table has."""
    rows = table.take([index for index in indices if index < table.num_rows])
    return {row["idx"]: (row["smiles"], row["homolumogap"]) for row in rows.to_pylist()}


def _label(labels, index, numbers, key):
    """SMILES and gap of a molecule. Raises RejectedRecord where the row is another molecule's, or missing."""
    from rdkit import Chem, rdBase

    if index not in labels:
        raise RejectedRecord(key, "targets.gap", f"the table has no row {index}")
    smiles, gap = labels[index]
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles, sanitize=False)
    heavy = Counter(int(z) for z in numbers if z > 1)
    if molecule is None or heavy != Counter(z for atom in molecule.GetAtoms() if (z := atom.GetAtomicNum()) > 1):
        raise RejectedRecord(key, "targets.gap", f"row {index} of the table is another molecule: {smiles}")
    return smiles, gap
