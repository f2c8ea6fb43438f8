"""QM9 from its raw files (gdb9.sdf, gdb9.sdf.csv, uncharacterized.txt), with bonds; keys and targets as in qm9.py.

The molecules on the list uncharacterized.txt relaxed into others, and are rejected.
"""

import csv
import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np

from mspt.data.schema import Record, RejectedRecord
from mspt.errors import UserError
from shards import entries, molecules
from shards.columns import KCAL_MOL_EV
from shards.source import Source
from shards.sources import qm9

HELP = "QM9 from gdb9.sdf, gdb9.sdf.csv and uncharacterized.txt, with bonds and 12 targets"

# Targets that have a column NAME_atom (kcal/mol): what is left when the energies of the free atoms are taken away.
ATOMISED = ("u0", "u298", "h298", "g298")
# So many thousand entries at the beginning have every element in many molecules.
SAMPLE = 10
# A line of an atom: three coordinates, then its symbol.
ATOM = re.compile(r"^(?: *-?\d+\.\d{4}){3} ([A-Z][a-z]?)", re.MULTILINE)
SOURCE = "QM9 (B3LYP/6-31G(2df,p) geometries and targets, gdb9.sdf)"


def add_arguments(parser):
    parser.add_argument("--from", dest="path", required=True, type=Path, metavar="FOLDER", help="with the three files")


def open(options):
    """Raises UserError where one of the files is not there or not as published."""
    return Qm9Raw(options.path)


class Qm9Raw(Source):
    def __init__(self, folder):
        self.sdf, table, excluded = (folder / name for name in ("gdb9.sdf", "gdb9.sdf.csv", "uncharacterized.txt"))
        self.inputs = [self.sdf, table, excluded]
        for path in self.inputs:
            if not path.is_file():
                raise UserError(f"{path}: is not there; --from is the folder of gdb9.sdf and the two files beside it")
        self.targets, atomic = _targets(table)
        self.excluded = _excluded(excluded)
        self.total = len(self.targets)
        self.provenance = {"source": SOURCE, "units": qm9.TARGET_UNITS, "uncharacterised": len(self.excluded)}
        if references := self._references(atomic):
            self.provenance["atom_references"] = references

    def chunks(self, size):
        return entries.chunks(self.sdf, size)

    def read(self, chunk):
        for number, text in entries.texts(self.sdf, chunk):
            try:
                yield self._record(number, text)
            except RejectedRecord as error:
                yield error

    def _record(self, number, text):
        index = _index(text)
        if index is None:
            raise RejectedRecord(f"gdb9-entry-{number}", "key", "the title is not gdb_NUMBER")
        key = f"qm9-{index:06d}"
        if index in self.excluded:
            raise RejectedRecord(key, "key", "uncharacterised")
        if index not in self.targets:
            raise RejectedRecord(key, "targets", "no row in gdb9.sdf.csv")
        targets = dict(zip(qm9.TARGETS, self.targets[index].tolist(), strict=True))
        return Record(key, **molecules.fields(entries.molecule(text, key)), targets=targets, source=SOURCE)

    def _references(self, atomic):
        """Energies of the free atoms, target -> symbol -> eV, by least squares; {} if the file is too small for it.

        atomic: index -> what all atoms of a molecule have in each of ATOMISED.
        """
        counts, energies = [], []
        for chunk in itertools.islice(entries.chunks(self.sdf, 1000), SAMPLE):
            for _, text in entries.texts(self.sdf, chunk):
                if (index := _index(text)) in atomic:
                    counts.append(Counter(ATOM.findall(text)))
                    energies.append(atomic[index])
        symbols = sorted({symbol for count in counts for symbol in count})
        table = np.array([[count[symbol] for symbol in symbols] for count in counts], float).reshape(-1, len(symbols))
        if not symbols or np.linalg.matrix_rank(table) < len(symbols):
            return {}
        solved = np.linalg.lstsq(table, np.array(energies), rcond=None)[0]
        return {
            name: {symbol: round(float(value), 6) for symbol, value in zip(symbols, solved[:, i], strict=True)}
            for i, name in enumerate(ATOMISED)
        }


def _index(text):
    match = re.match(r"gdb_(\d+)\s", text)
    return int(match[1]) if match else None


def _targets(path):
    """index -> targets [12] in the units of TARGET_UNITS; index -> energies of the free atoms [4] eV."""
    targets, atomic = {}, {}
    with path.open(newline="") as file:
        for line, row in enumerate(csv.DictReader(file), 2):
            try:
                index = int(row["mol_id"].removeprefix("gdb_"))
                values = {name: float(row[name]) * factor for name, (_, factor) in qm9.TARGETS.items()}
                atomic[index] = [values[name] - float(row[f"{name}_atom"]) * KCAL_MOL_EV for name in ATOMISED]
                targets[index] = np.array(list(values.values()))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path}:{line}: is not a row of gdb9.sdf.csv ({error}); fetch it again") from error
    return targets, atomic


def _excluded(path):
    """The indices of uncharacterized.txt: the first words of its rows, between a header and a footer of prose."""
    words = [line.split(maxsplit=1)[0] for line in path.read_text().splitlines() if line.strip()]
    excluded = {int(word) for word in words if word.isdecimal()}
    if not excluded:
        raise UserError(f"{path}: lists no molecule; fetch it again")
    return excluded
