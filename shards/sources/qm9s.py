"""QM9S as published: geometries and properties in qm9s.pt, spectra in a table each (figshare 24235333).

Molecules of QM9, optimised again and with IR, Raman and UV-Vis spectra, by B3LYP/def-TZVP (Zou et al., Nat. Comput.
Sci. 3, 957, 2023).
"""

import contextlib
import mmap
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from mspt.chemistry.spectra import GRIDS
from mspt.data.schema import Record, RejectedRecord
from mspt.errors import UserError
from shards import pickles
from shards.source import Source

HELP = "QM9S as published: a folder with qm9s.pt and {ir,raman,uv}_boraden.csv"
SOURCE = "QM9S (B3LYP/def-TZVP geometries, doi:10.6084/m9.figshare.24235333)"
METHODS = {
    "uv_vis": "TD-B3LYP/def-TZVP, broadened as published",
    "ir": "B3LYP/def-TZVP, harmonic, broadened as published",
    "raman": "B3LYP/def-TZVP, harmonic, broadened as published",
}
# Our name of a spectrum -> QM9S's.
NAMES = {"uv_vis": "uv", "ir": "ir", "raman": "raman"}
# Target -> (QM9S's field, what is taken of its array).
TARGETS = {
    "energy": ("energy", lambda energy: energy.item()),
    "mu": ("dipole", np.linalg.norm),
    "alpha": ("polar", lambda polar: polar.reshape(3, 3).trace() / 3),
}
TARGET_UNITS = {"energy": "eV", "mu": "D", "alpha": "a0^3"}


def add_arguments(parser):
    parser.add_argument("--from", dest="path", type=Path, required=True, help="the folder")
    pickles.add_argument(parser)


def open(options):
    return QM9S(options.path, options.trust_pickle)


class QM9S(Source):
    """tables: spectrum -> its CSV, of those that are there."""

    def __init__(self, folder, trusted):
        self.file, self.trusted = folder / "qm9s.pt", trusted
        if not self.file.exists():
            raise UserError(f"{self.file}: not there; --from wants the folder with the files of QM9S")
        self.tables = {}
        for name, own in NAMES.items():
            spellings = [folder / f"{own}_{spelling}.csv" for spelling in ("boraden", "broaden")]
            table = next((path for path in spellings if path.exists()), None)
            if table is None:
                print(f"{spellings[0]}: not there, so no molecule gets a {name} spectrum", flush=True)
            else:
                _check_header(table, name)
                self.tables[name] = table
        self.inputs = [self.file, *self.tables.values()]
        self.provenance = {
            "source": SOURCE,
            "units": TARGET_UNITS,
            "methods": {name: METHODS[name] for name in self.tables},
        }
        self.total = len(self.molecules)

    @cached_property
    def molecules(self):
        """(key, field -> array or text) of every molecule, in the order of the file."""
        rows = pickles.load(self.file, self.trusted)
        if not isinstance(rows, list) or not all(isinstance(row, dict) and {"z", "pos"} <= row.keys() for row in rows):
            raise UserError(f"{self.file}: no list of molecules with z and pos, so not the file of QM9S")
        names = ["z", "pos", "smile", *(field for field, _ in TARGETS.values())]
        fields = [{name: array(row[name]) for name in names if name in row} for row in rows]
        return list(zip(keys([row.get("number") for row in rows], self.file), fields, strict=True))

    def __getstate__(self):
        # A worker finds what it needs of the molecules in its chunks.
        return {name: value for name, value in vars(self).items() if name != "molecules"}

    def chunks(self, size):
        places = {name: self._places(table) for name, table in self.tables.items()}
        for first in range(0, len(self.molecules), size):
            yield [
                (key, fields, {name: place[i] for name, place in places.items() if place[i, 1]})
                for i, (key, fields) in enumerate(self.molecules[first : first + size], first)
            ]

    def _places(self, table):
        """Where each molecule's row begins in a table and how long it is: int64 [molecules, 2], 0 where it has none."""
        places, strangers = np.zeros((len(self.molecules), 2), np.int64), 0
        for index, start, length in _rows(table):
            if not 0 <= index < len(places):
                strangers += 1
            elif places[index, 1]:
                raise UserError(f"{table}: two rows have the index {index}; remove the one that is wrong")
            else:
                places[index] = start, length
        without = np.count_nonzero(places[:, 1] == 0)
        print(f"{table}: {without} of {len(places)} molecules have no row, {strangers} rows no molecule", flush=True)
        return places

    def read(self, chunk):
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(table.open("rb")) for name, table in self.tables.items()}
            for key, fields, places in chunk:
                spectra = {}
                try:
                    for name, (start, length) in places.items():
                        files[name].seek(start)
                        _, *values = files[name].read(length).split(b",")
                        spectra[name] = np.array(values, np.float64)
                except ValueError as error:
                    yield RejectedRecord(key, f"spectra.{name}", f"the row at byte {start}: {error}")
                    continue
                yield record(key, fields, fields.get("smile", ""), spectra, TARGETS)


def record(key, fields, smiles, spectra, targets):
    """The Record of a molecule's z, pos and further fields, or the RejectedRecord that says which of them is wrong.

    spectra: name -> array of its values. targets: name -> (field, function of the field's array), as TARGETS.
    """
    field = "numbers"
    try:
        numbers = np.array(fields["z"].tolist(), np.uint8)
        field = "positions"
        positions = fields["pos"].astype(np.float32)
        values = {}
        for target, (name, function) in targets.items():
            field = f"targets.{target}"
            if name in fields:
                values[target] = float(function(fields[name]))
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        return RejectedRecord(key, field, str(error))
    return Record(
        key=key,
        numbers=numbers,
        positions=positions,
        spectra={name: half(spectrum) for name, spectrum in spectra.items()},
        targets=values,
        smiles=smiles,
        source=SOURCE,
        methods={name: METHODS[name] for name in spectra},
    )


def half(values):
    """A spectrum as float16, which keeps three digits of it; as float32 where a value is beyond float16 (65504)."""
    fits = np.abs(values).max(initial=0) <= np.finfo(np.float16).max
    with np.errstate(over="ignore"):  # what float32 cannot hold either is refused as not finite
        return values.astype(np.float16 if fits else np.float32)


def keys(numbers, file):
    """A key for each molecule from its number in QM9, the key that it has there: a split holds it out of both sets.

    Where numbers are missing or not unique, from its place in the file, and a line says so.
    """
    try:
        numbers = [int(number) for number in numbers]
        if len(set(numbers)) == len(numbers):
            return [f"qm9-{number:06d}" for number in numbers]
    except (TypeError, ValueError):
        pass
    print(f"{file}: not every molecule has a QM9 number of its own, so the keys are places in the file", flush=True)
    return [f"qm9s-index-{i:06d}" for i in range(len(numbers))]


def array(value):
    """A tensor as an array of its own; anything else as it is."""
    return value.numpy().copy() if torch.is_tensor(value) else value


def _check_header(table, name):
    """Raise UserError where the columns of a table are not the grid of a spectrum."""
    grid = GRIDS[name]
    with table.open("rb") as file:
        columns = file.readline(1 << 20).split(b",")[1:]
    try:
        points = np.array(columns, np.float64)
        right = np.allclose(points, grid.points(dtype=torch.float64), rtol=0, atol=grid.step / 100)
    except ValueError:  # text, or another length
        right = False
    if not right:
        last = grid.start + grid.step * (grid.length - 1)
        raise UserError(
            f"{table}: its header has {len(columns)} columns that are not the {grid.length} points of {name} from "
            f"{grid.start:g} to {last:g} {grid.unit}; give the file as published"
        )


def _rows(table):
    """Yield (index, byte where it begins, bytes) of every row of a table. Raises UserError where there is no index."""
    with table.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        start = text.find(b"\n") + 1
        while 0 < start < len(text):
            end = text.find(b"\n", start)
            end = len(text) if end < 0 else end
            first = text[start : min(end, start + 32)].partition(b",")[0]
            try:
                index = int(first)
            except ValueError:
                raise UserError(
                    f"{table}: the row at byte {start} begins with {first!r}, not an index; give the file as published"
                ) from None
            yield index, start, end - start
            start = end + 1
