"""Tables of SMILES and spectra: CSV (also .csv.gz) and Parquet, one molecule a row; the columns are the user's.

    --smiles smiles --ir ir_intensities --ir-grid 400:4000:1800
    --smiles SMILES --key CAS --uv-vis absorbance --uv-vis-grid wavelengths --uv-vis-unit nm --targets gap=gap_ha:Ha
    --preset alberts2024

A list in a Parquet file is a list, in a CSV it is text: numbers with commas or spaces between them, in brackets or not.
Without columns for the geometry, it is RDKit's.
"""

import csv
import gzip
import itertools
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mspt.chemistry.resample import TO_WAVENUMBERS, to_grid
from mspt.chemistry.spectra import GRIDS
from mspt.data.schema import Record, RejectedRecord
from mspt.errors import UserError
from shards import columns
from shards.molecules import embed, fields
from shards.source import Source

HELP = "CSV or Parquet of SMILES and spectra"
SUFFIXES = (".csv", ".csv.gz", ".parquet")
PRESETS = {
    # Alberts et al., NeurIPS 2024: 790 000 molecules from patents.
    "alberts2024": {
        "smiles": "smiles",
        "ir": "ir_spectra",
        "ir_grid": "400:4000:1800",
        "method": "classical molecular dynamics (Alberts et al. 2024)",
    },
}
# Rows of a Parquet file that are held at once.
BATCH = 256


@dataclass(frozen=True)
class Spectrum:
    """values: the column. abscissae: an array [n], or the column that holds each row's own. unit: of the abscissae."""

    values: str
    abscissae: np.ndarray | str
    unit: str


class Table(Source):
    """A chunk is a list of (number of a file, row of it, byte where that begins in a CSV, number of rows from there).

    A .csv.gz has no places: each chunk unpacks it from its beginning, which a large file is better spared.
    """

    def __init__(self, options):
        self.smiles, self.key, self.method = options.smiles, options.key, options.method or "not stated"
        self.numbers, self.positions, self.preset = options.numbers, options.positions, options.preset
        self.spectra = {name: spectrum for name in GRIDS if (spectrum := _spectrum(name, options))}
        self.targets = columns.parse(options.targets)
        if bool(self.numbers) != bool(self.positions):
            raise UserError("--numbers and --positions: one without the other is no geometry; give both or none")
        if not (self.smiles or self.numbers):
            raise UserError("--smiles is missing: it names the molecules, if --numbers and --positions do not")
        self.inputs = _files(options.path)
        self.headers = [_header(path) for path in self.inputs]
        for path, header in zip(self.inputs, self.headers, strict=True):
            self._check(path, header)
        if all(map(_is_parquet, self.inputs)):
            self.total = sum(_parquet(path).metadata.num_rows for path in self.inputs)
        self.provenance = {
            "source": f"{self.preset or options.path.name} "
            f"({'its own geometries' if self.numbers else 'RDKit conformers'})",
            "units": columns.units(self.targets),
            "methods": dict.fromkeys(self.spectra, self.method),
        }

    def _check(self, path, header):
        own = {"--smiles": self.smiles, "--key": self.key, "--numbers": self.numbers, "--positions": self.positions}
        for name, spectrum in self.spectra.items():
            own[_option(name)] = spectrum.values
            own[f"{_option(name)}-grid"] = spectrum.abscissae if isinstance(spectrum.abscissae, str) else None
        for option, column in own.items():
            if column is not None and column not in header:
                raise UserError(f"{path}: {option} {column}: no such column; there are {', '.join(header) or 'none'}")
        columns.check(path, self.targets, header)

    def _wanted(self):
        """The columns that are read."""
        spectra = [column for spectrum in self.spectra.values() for column in (spectrum.values, spectrum.abscissae)]
        one = [self.smiles, self.key, self.numbers, self.positions, *spectra, *(c.name for c in self.targets)]
        return list(dict.fromkeys(column for column in one if isinstance(column, str)))

    def chunks(self, size):
        rows = (
            (number, row, place)
            for number, path in enumerate(self.inputs)
            for row, place in enumerate(_parquet_places(path) if _is_parquet(path) else _csv_places(path))
        )
        while chunk := list(itertools.islice(rows, size)):
            files = [list(own) for _, own in itertools.groupby(chunk, key=lambda row: row[0])]
            yield [(*own[0], len(own)) for own in files]

    def read(self, chunk):
        for number, first, place, count in chunk:
            path = self.inputs[number]
            if _is_parquet(path):
                rows = _parquet_rows(path, first, count, self._wanted())
            else:
                rows = _csv_rows(path, place, count, self.headers[number])
            names = [self.preset] if self.preset else []
            names.append(path.name.removesuffix(".gz").rpartition(".")[0])
            for index, row in enumerate(rows, first):
                key = "-".join([*names, f"{index:07d}"])
                try:
                    if row is None:
                        raise RejectedRecord(key, "row", f"not {len(self.headers[number])} fields, as the header has")
                    yield self._record(row, key)
                except RejectedRecord as error:
                    yield error

    def _record(self, row, key):
        """A row (column -> text, number, array or None) as a Record; RejectedRecord where it is none."""
        if self.key:
            if not _text(row[self.key]):
                raise RejectedRecord(key, "key", f"the column {self.key} is empty")
            key = _text(row[self.key])
        smiles = _text(row[self.smiles]) if self.smiles else ""
        targets = columns.targets(self.targets, row, key)
        found = {name: values for name in self.spectra if (values := self._values(name, row, key)) is not None}
        geometry = self._geometry(row, smiles, key) if self.numbers else _embedded(smiles, key)
        methods = dict.fromkeys(found, self.method)
        source = self.provenance["source"]
        return Record(key, spectra=found, targets=targets, source=source, methods=methods, **geometry)

    def _values(self, name, row, key):
        """A spectrum of a row on its grid, None where the row has none."""
        spectrum = self.spectra[name]
        try:
            values = _floats(row[spectrum.values])
            if values is None or len(values) == 0:
                return None
            x = spectrum.abscissae
            x = _floats(row[x]) if isinstance(x, str) else x
            if x is None:
                raise ValueError(f"the column {spectrum.abscissae} is empty")
            return to_grid(name, x, values, spectrum.unit)
        except ValueError as error:
            raise RejectedRecord(key, f"spectra.{name}", str(error)) from None

    def _geometry(self, row, smiles, key):
        """The row's own atoms; the charge is that of the SMILES, if there is one."""
        from rdkit import Chem

        try:
            numbers, positions = _floats(row[self.numbers]), _floats(row[self.positions])
        except ValueError as error:
            raise RejectedRecord(key, "positions", str(error)) from None
        if numbers is None or positions is None or positions.size != 3 * numbers.size:
            has = [0 if array is None else array.size for array in (numbers, positions)]
            raise RejectedRecord(key, "positions", f"{has[1]} coordinates for {has[0]} atoms")
        if not ((numbers >= 0) & (numbers < 256) & (numbers % 1 == 0)).all():
            raise RejectedRecord(key, "numbers", f"{numbers.tolist()} are no atomic numbers")
        molecule = Chem.MolFromSmiles(smiles)
        if molecule is None:
            raise RejectedRecord(key, "smiles", f"RDKit cannot read the SMILES {smiles!r}")
        return {
            "numbers": numbers.astype(np.uint8),
            "positions": positions.reshape(-1, 3).astype(np.float32),
            "smiles": smiles,
            "charge": Chem.GetFormalCharge(molecule),
        }


def add_arguments(parser):
    parser.add_argument(
        "--from", dest="path", required=True, type=Path, help=f"a file ({', '.join(SUFFIXES)}) or a folder of them"
    )
    parser.add_argument("--preset", choices=PRESETS, help="the columns of a published data set")
    parser.add_argument("--smiles", metavar="COLUMN")
    parser.add_argument("--key", metavar="COLUMN", help="unique names of the molecules (default: file and row)")
    parser.add_argument("--numbers", metavar="COLUMN", help="atomic numbers of the table's own geometries")
    parser.add_argument("--positions", metavar="COLUMN", help="their positions in Å, a list of triples or one of all")
    for name, grid in GRIDS.items():
        option = _option(name)
        parser.add_argument(option, metavar="COLUMN", help="values of the spectrum")
        parser.add_argument(f"{option}-grid", metavar="START:STOP:COUNT|COLUMN", help="their abscissae")
        parser.add_argument(f"{option}-unit", choices=TO_WAVENUMBERS, default=grid.unit, help="of the abscissae")
    parser.add_argument("--method", help="how the spectra were obtained, for the manifest")
    columns.add_argument(parser)


def open(options):
    for name, value in PRESETS.get(options.preset, {}).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return Table(options)


def _option(name):
    return f"--{name.replace('_', '-')}"


def _spectrum(name, options):
    """What the options say of a spectrum, None where they name no column for it."""
    values, grid, unit = (getattr(options, name + end) for end in ("", "_grid", "_unit"))
    option = _option(name)
    if values is None:
        return None
    if grid is None:
        raise UserError(f"{option}-grid is missing; give START:STOP:COUNT, or the column that holds the abscissae")
    number = r"[+-]?\d+(?:\.\d*)?(?:e[+-]?\d+)?"
    match = re.fullmatch(rf"({number}):({number}):(\d+)", grid)
    return Spectrum(values, np.linspace(float(match[1]), float(match[2]), int(match[3])) if match else grid, unit)


def _files(path):
    """The tables of a folder in the order of their names, or the one file. Raises UserError where there are none."""
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in found if file.name.endswith(SUFFIXES) and file.is_file()]
    if not files:
        raise UserError(f"{path}: no table ({', '.join(SUFFIXES)}) is there; give one or a folder of them")
    return files


def _is_parquet(path):
    return path.suffix == ".parquet"


def _parquet(path):
    import pyarrow
    from pyarrow import parquet

    try:
        # The buffer makes it read pages as they are wanted, not whole columns of a row group.
        return parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: is no Parquet file that can be read ({error}); copy it again") from None


def _header(path):
    """Names of the columns."""
    if _is_parquet(path):
        return _parquet(path).schema_arrow.names
    return next((row for row, _ in _csv(path, 0)), [])


def _csv(path, place):
    """Yield (row, byte where the next one begins) of a CSV from a byte on. Raises UserError where it is broken."""
    csv.field_size_limit(sys.maxsize)
    with (gzip.open if path.suffix == ".gz" else Path.open)(path, "rb") as file:
        try:
            file.seek(place)
            end = place

            def lines():
                nonlocal end
                for line in file:
                    end += len(line)
                    yield line.decode("utf-8-sig" if end == len(line) else "utf-8", errors="replace")

            for row in csv.reader(lines()):
                if row:
                    yield row, end
        except (csv.Error, OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: cannot be read beyond byte {end} ({error}); copy it again") from None


def _csv_places(path):
    """Yield the byte where each row begins, the header left out."""
    begin = None
    for _, end in _csv(path, 0):
        if begin is not None:
            yield begin
        begin = end


def _parquet_places(path):
    return itertools.repeat(None, _parquet(path).metadata.num_rows)


def _csv_rows(path, place, count, header):
    """Yield so many rows from a byte on, column -> text; None for a row that has not the header's number of fields."""
    rows = _csv(path, place)
    for _ in range(count):
        row, _ = next(rows)
        yield dict(zip(header, row, strict=True)) if len(row) == len(header) else None


def _parquet_rows(path, first, count, wanted):
    """Yield so many rows from a row on, column -> text, number or array. It reads on from the row group's beginning."""
    import pyarrow

    file, begin, last = _parquet(path), 0, first + count
    for group in range(file.metadata.num_row_groups):
        end = begin + file.metadata.row_group(group).num_rows
        if begin < last and first < end:
            try:
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=wanted):
                    for index in range(max(first - begin, 0), min(last - begin, len(batch))):
                        yield {name: _python(batch.column(name)[index]) for name in wanted}
                    begin += len(batch)
                    if begin >= last:
                        return
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{path}: row group {group} cannot be read ({error}); copy it again") from None
        begin = end


def _python(scalar):
    """A value of pyarrow as text or number, lists (also of lists) as one array end to end."""
    import pyarrow

    if not isinstance(scalar, pyarrow.ListScalar):
        return scalar.as_py()
    values = scalar.values
    while isinstance(values, pyarrow.ListArray | pyarrow.LargeListArray | pyarrow.FixedSizeListArray):
        values = values.flatten()
    return None if values is None else values.to_numpy(zero_copy_only=False)


def _text(value):
    return "" if value is None else str(value).strip()


def _floats(value):
    """A list of numbers of a cell as float64 [n]; None where the cell is empty. Raises ValueError with the reason."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        numbers = re.sub(r"[\[\](),;]", " ", value).split() if isinstance(value, str) else value
        return np.array(numbers, np.float64).ravel()
    except (TypeError, ValueError):
        raise ValueError(f"{str(value)[:40]!r} is no list of numbers") from None


def _embedded(smiles, key):
    if not smiles:
        raise RejectedRecord(key, "smiles", "is empty")
    try:
        return fields(embed(smiles, zlib.crc32(key.encode())))
    except ValueError as error:
        raise RejectedRecord(key, "smiles", str(error)) from None
