"""XYZ files of many frames, plain or extended, and databases of ASE; targets and forces from their columns.

The columns of a frame are the key=value pairs of its comment and its properties by atom; those of a database's row its
key-value pairs, its data, and its calculator's results. A Lattice is of no use here and left out; a structure that is
periodic is rejected (ASE takes a Lattice without pbc="F F F" for periodic).
"""

import contextlib
import io
import itertools
import sqlite3
from abc import abstractmethod
from pathlib import Path

import numpy as np

from mspt.data.schema import Record, RejectedRecord
from mspt.errors import UserError
from shards import columns
from shards.source import Source

HELP = "an XYZ or extended XYZ file, or a database of ASE (.db, .json)"
# So many rows tell which columns a file has.
FIRST = 100


def add_arguments(parser):
    parser.add_argument("--from", dest="path", required=True, type=Path, metavar="FILE")
    columns.add_argument(parser)
    parser.add_argument(
        "--forces", metavar="COLUMN[:UNIT]", help="column of the forces (default: forces, in eV/Å, where it is there)"
    )
    parser.add_argument("--key", metavar="COLUMN", help="column with a unique key (default: FILE-NUMBER)")


def open(options):
    """Raises UserError where the file is not there, is of another kind, or lacks a column."""
    path, chosen = options.path, columns.parse(options.targets)
    (forces,) = columns.parse([f"forces={options.forces or 'forces:eV/Å'}"])
    if forces.unit not in ("", "eV/Å"):
        raise UserError(f"--forces: {forces.unit} is no unit of forces; give one like Hartree/Bohr or kcal/mol/Å")
    if not path.is_file():
        raise UserError(f"{path}: is not a file; give an XYZ or a database of ASE")
    source = (Database if path.suffix in (".db", ".json") else Xyz)(path, chosen, forces, options.key)
    names = {name for chunk in itertools.islice(source.chunks(FIRST), 1) for name in source.names(chunk)}
    columns.check(path, chosen, sorted(names))
    for option, name in (("--forces", forces.name if options.forces else None), ("--key", options.key)):
        if name and name not in names:
            raise UserError(f"{path}: {option} {name}: no such column; there are {', '.join(sorted(names)) or 'none'}")
    return source


class _Structures(Source):
    """What is the same for both kinds of file: a raw row becomes ASE's Atoms and its columns, and these a Record."""

    def __init__(self, path, chosen, forces, key):
        self.path, self.chosen, self.forces, self.key = path, chosen, forces, key
        self.inputs = [path]
        self.provenance = {"source": path.name, "units": columns.units(chosen)}

    @abstractmethod
    def _rows(self, chunk):
        """Yield (number, raw row) of a chunk."""

    @abstractmethod
    def _parse(self, raw, key):
        """A raw row -> Atoms, name -> value. Raises RejectedRecord."""

    def names(self, chunk):
        """The columns that the rows of a chunk have."""
        names = set()
        for number, raw in self._rows(chunk):
            with contextlib.suppress(RejectedRecord):
                names |= self._parse(raw, number)[1].keys()
        return names

    def read(self, chunk):
        for number, raw in self._rows(chunk):
            try:
                yield self._record(f"{self.path.stem}-{number:07d}", raw)
            except RejectedRecord as error:
                yield error

    def _record(self, key, raw):
        atoms, row = self._parse(raw, key)
        if self.key:
            if not str(row.get(self.key, "")).strip():
                raise RejectedRecord(key, "key", f"there is no {self.key}")
            key = str(row[self.key]).strip()
        if atoms.pbc.any():
            raise RejectedRecord(key, "positions", 'periodic; a molecule that lies in a box has pbc="F F F"')
        forces = row.get(self.forces.name)
        return Record(
            key,
            atoms.numbers.astype(np.uint8),
            atoms.positions.astype(np.float32),
            targets=columns.targets(self.chosen, row, key),
            charge=_charge(row, key),
            forces=None if forces is None else _forces(forces, self.forces.factor, key),
            source=self.path.name,
        )


class Xyz(_Structures):
    def chunks(self, size):
        first = offset = 0
        with self.path.open("rb") as file:
            frames = self._frames(file)
            while lengths := [len(frame) for frame in itertools.islice(frames, size)]:
                yield first, offset, sum(lengths)
                first, offset = first + len(lengths), offset + sum(lengths)

    def _rows(self, chunk):
        first, offset, length = chunk
        with self.path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        yield from enumerate(self._frames(io.BytesIO(data)), first)

    def _parse(self, raw, key):
        return frame(raw, key)

    def _frames(self, file):
        """Yield the bytes of each frame of an open file, blank lines before it included."""
        blank = b""
        for line in file:
            if not line.strip():
                blank += line
                continue
            if not line.strip().isdigit():
                raise UserError(
                    f"{self.path}: {line.strip()[:40].decode(errors='replace')!r} stands where a frame begins with its "
                    "number of atoms; give an XYZ file"
                )
            yield blank + line + b"".join(itertools.islice(file, int(line) + 1))
            blank = b""


class Database(_Structures):
    def chunks(self, size):
        """(first id, last id), or of a .json its rows, which ASE can only read all at once."""
        if self.path.suffix == ".json":
            rows = self._json()
            yield from (rows[start : start + size] for start in range(0, len(rows), size))
            return
        # Not through ASE: it makes its tables in a database that is none of its own.
        try:
            with contextlib.closing(sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro", uri=True)) as database:
                ids = (number for (number,) in database.execute("SELECT id FROM systems ORDER BY id"))
                while chunk := list(itertools.islice(ids, size)):
                    yield chunk[0], chunk[-1]
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: is no database of ASE ({error})") from error

    def _json(self):
        import ase.db
        from ase.io.formats import UnknownFileTypeError

        try:
            return list(ase.db.connect(self.path).select())
        except (OSError, ValueError, LookupError, TypeError, UnknownFileTypeError) as error:
            raise UserError(f"{self.path}: is no database of ASE ({error})") from error

    def _rows(self, chunk):
        import ase.db

        if isinstance(chunk, tuple):
            first, last = chunk
            with ase.db.connect(self.path) as database:
                chunk = list(database.select([("id", ">=", first), ("id", "<=", last)], sort="id"))
        yield from ((row.id, row) for row in chunk)

    def _parse(self, raw, key):
        from ase.calculators.calculator import all_properties

        results = {name: raw[name] for name in all_properties if name in raw}
        return raw.toatoms(), _scalars(results | raw.key_value_pairs | raw.data)


def frame(raw, key):
    """The bytes of one frame -> ASE's Atoms, its columns. Raises RejectedRecord where ASE cannot read it."""
    from ase.io.extxyz import read_xyz

    try:
        (atoms,) = read_xyz(io.StringIO(raw.decode(errors="replace").lstrip()), 0)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise RejectedRecord(key, "frame", f"ASE cannot read it: {type(error).__name__} {error}") from error
    return atoms, _scalars(atoms.info | atoms.arrays | (atoms.calc.results if atoms.calc else {}))


def _scalars(row):
    """Columns with arrays of one number as that number."""
    return {name: x.item() if isinstance(x, np.ndarray) and x.size == 1 else x for name, x in row.items()}


def _charge(row, key):
    charge = row.get("charge", 0)
    try:
        if int(charge) == charge:
            return int(charge)
    except (TypeError, ValueError):
        pass
    raise RejectedRecord(key, "charge", f"{charge!r} is not a whole number")


def _forces(values, factor, key):
    try:
        return (np.asarray(values, float) * factor).astype(np.float32)
    except (TypeError, ValueError):
        raise RejectedRecord(key, "forces", f"{values!r} are not numbers") from None
