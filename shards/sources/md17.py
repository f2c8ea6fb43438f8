"""MD17 and rMD17: frames of one molecule's trajectory with energy and forces, one .npz a molecule."""

import contextlib
import math
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np

from mspt.data.schema import Record
from mspt.errors import UserError
from shards.columns import KCAL_MOL_EV
from shards.source import Source

HELP = "an .npz of MD17 or rMD17: one molecule's trajectory with energies and forces"

# Data set -> its arrays: numbers [n], positions [f, n, 3] Å, energies [f] or [f, 1] kcal/mol, forces [f, n, 3]
# kcal/mol/Å.
ARRAYS = {"MD17": ("z", "R", "E", "F"), "rMD17": ("nuclear_charges", "coords", "energies", "forces")}
# Where the file itself does not say.
THEORY = {"MD17": "PBE+vdW-TS", "rMD17": "PBE/def2-SVP"}
UNITS = {"e_unit": "kcal/mol", "r_unit": "Ang"}


def add_arguments(parser):
    parser.add_argument("--from", dest="path", required=True, type=Path, metavar="FILE", help="like rmd17_aspirin.npz")


def open(options):
    """Raises UserError where the file is not there or not of one of the two layouts."""
    return Md17(options.path)


class Md17(Source):
    def __init__(self, path):
        self.path, self.inputs = path, [path]
        with _archive(path) as archive:
            held = sorted(name.removesuffix(".npy") for name in archive.namelist())
            of = [data_set for data_set, arrays in ARRAYS.items() if set(arrays) <= set(held)]
            if not of:
                known = " or ".join(f"{', '.join(arrays)} ({data_set})" for data_set, arrays in ARRAYS.items())
                raise UserError(f"{path}: holds {', '.join(held)}; needed are {known}")
            for name, unit in UNITS.items():
                if name in held and _text(archive, name) != unit:
                    raise UserError(f"{path}: {name} is {_text(archive, name)!r}; only {unit} is read")
            numbers, *self.arrays = ARRAYS[of[0]]
            (self.numbers,) = _rows(archive, numbers, 1 << 20)
            self.total, n = _shape(archive, self.arrays[0])[0], len(self.numbers)
            for name, right in zip(self.arrays, ([(n, 3)], [(), (1,)], [(n, 3)]), strict=True):
                shape = _shape(archive, name)
                if shape not in [(self.total, *rest) for rest in right]:
                    raise UserError(f"{path}: {name} has shape {shape} where {(self.total, *right[0])} is needed")
            theory = _text(archive, "theory") if "theory" in held else THEORY[of[0]]
        molecule = re.sub(r"^r?md17[_-]", "", path.stem)
        self.prefix = f"{of[0].lower()}-{molecule}"
        self.provenance = {"source": f"{of[0]} {molecule} ({theory})", "units": {"energy": "eV"}}

    def chunks(self, size):
        """(number of the first frame, positions, energies, forces): an .npz is packed and read from its beginning."""
        with _archive(self.path) as archive:
            arrays = (_rows(archive, name, size) for name in self.arrays)
            for i, rows in enumerate(zip(*arrays, strict=True)):
                yield i * size, *rows

    def read(self, chunk):
        first, *rows = chunk
        for number, (positions, energy, forces) in enumerate(zip(*rows, strict=True), first):
            yield Record(
                f"{self.prefix}-{number:06d}",
                self.numbers.astype(np.uint8),
                positions.astype(np.float32),
                targets={"energy": float(energy.item() * KCAL_MOL_EV)},
                forces=(forces * KCAL_MOL_EV).astype(np.float32),
                source=self.provenance["source"],
            )


@contextlib.contextmanager
def _archive(path):
    """The .npz as a zip; what goes wrong in reading it is a UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read as an .npz ({error}); fetch it again") from error


def _header(file):
    """shape, dtype of an .npy file, which is read up to its data."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, columns_first, dtype = read(file)
    if columns_first:
        raise ValueError("an array is in Fortran order; save it in C order")
    return shape, dtype


def _shape(archive, name):
    with archive.open(f"{name}.npy") as file:
        return _header(file)[0]


def _rows(archive, name, size):
    """Yield the array, size rows at a time."""
    with archive.open(f"{name}.npy") as file:
        shape, dtype = _header(file)
        for start in range(0, shape[0], size):
            count = min(size, shape[0] - start)
            data = file.read(count * math.prod(shape[1:]) * dtype.itemsize)
            yield np.frombuffer(data, dtype).reshape(count, *shape[1:])


def _text(archive, name):
    with archive.open(f"{name}.npy") as file:
        text = np.lib.format.read_array(file).item()
    return text.decode() if isinstance(text, bytes) else text
