"""A set of molecules as a Zarr v3 store, to be read by number or by key in any order.

Its arrays are those of a block (mspt/data/block.py) for all N records end to end, under the same names, but for

    provenance [N]              index into the attribute `sources`
    targets/NAME [N]            NAME quoted as in a URL
    spectra/NAME/kind [N]       0 missing, 1 values as float32, 2 lines, 3 values as float16
    spectra/NAME/float32 [v, L], float16 [h, L]    values of the records that have them so
    spectra/NAME/row [N]        which row of these is a record's; -1 where it has no values
    order [N]                   the records by rising `words`: where a key is looked up

An array that no record needs is absent. Attributes: kind ("molecules"), schema_version, records, atoms, largest,
grids, units, provenance, targets (their names), sources and arrays.
"""

import json
from functools import cached_property
from itertools import islice
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
from safetensors.numpy import save

from mspt import files
from mspt.chemistry.spectra import GRIDS
from mspt.data import block as blocks
from mspt.data import keyed, packing
from mspt.data.batch import Keys, MoleculeBatch
from mspt.data.schema import SCHEMA_VERSION
from mspt.data.shardset import grids
from mspt.data.zarr_arrays import StoreWriter, open_arrays
from mspt.errors import UserError

KIND, TARGETS = "molecules", "targets/"
HALF = 3
STORED_AS = {"float32": blocks.VALUES, "float16": HALF}
# Records that are read or written together.
GROUP = 1024
# The arrays of ragged rows, and the ptr of each.
RAGGED = {
    "numbers": "ptr",
    "positions": "ptr",
    "forces": "ptr",
    "keys": "keys_ptr",
    "smiles": "smiles_ptr",
    "bonds": "bonds_ptr",
    "bond_types": "bonds_ptr",
} | {f"spectra/{name}/{part}": f"spectra/{name}/ptr" for name in GRIDS for part in ("positions", "strengths")}
PTRS = frozenset(RAGGED.values())
ONE_EACH = ("words", "charge", "provenance", "bonds_known")


class ZarrSet:
    """manifest: the store's attributes. Records are numbered in the order in which they were written.

    What there is one of for each record, its key included, is read whole when it is first needed and kept: at most
    some 150 bytes a record.
    """

    def __init__(self, folder, manifest, arrays):
        self.folder, self.manifest, self.arrays = folder, manifest, arrays
        self.held = {}

    @classmethod
    def open(cls, folder):
        """Open a store and check that all its files are there.

        Raises UserError that names the file and the remedy.
        """
        folder = Path(folder)
        manifest, arrays = open_arrays(folder, KIND)
        version = manifest["schema_version"]
        if version != SCHEMA_VERSION:
            raise UserError(f"{folder}: schema_version is {version!r}, this mspt reads {SCHEMA_VERSION}; convert again")
        if manifest["grids"] != grids():
            raise UserError(f"{folder}: grids differ from this mspt's; convert again")
        return cls(folder, manifest, arrays)

    def __reduce__(self):
        # A loader worker opens the store itself instead of getting what was read of it.
        return ZarrSet.open, (self.folder,)

    def __len__(self):
        return self.manifest["records"]

    @cached_property
    def atoms(self):
        """Atoms of every record, int64 [N]."""
        return np.diff(self._whole("ptr"))

    @cached_property
    def keys(self):
        """The keys in order: a sequence of N strings."""
        return Keys(self.arrays["keys"][:], self._whole("keys_ptr"))

    def index_of(self, key):
        """The number of the record with this key. Raises UserError where there is none."""
        word, words, order = keyed.word(key), self._whole("words"), self._whole("order")
        at = int(np.searchsorted(words, word, sorter=order))
        while at < len(order) and words[order[at]] == word:
            if self.keys[order[at]] == key:
                return int(order[at])
            at += 1
        raise UserError(f"{self.folder}: holds no record with the key {key!r}; ZarrSet.keys lists those there are")

    def records(self, wanted):
        """Yield the Records of wanted, numbers or keys, in that order.

        Reads every chunk once for each 1024 of them. Raises UserError for an unknown key and IndexError outside 0 to
        N - 1.
        """
        wanted = iter(wanted)
        while group := list(islice(wanted, GROUP)):
            numbers = self._numbers(group)
            for number, record in zip(numbers, blocks.records(self._encoded(numbers)), strict=True):
                for name, spectrum in record.spectra.items():
                    # In a block of both, float16 is kept as float32.
                    if self._whole(f"spectra/{name}/kind")[number] == HALF:
                        record.spectra[name] = spectrum.astype(np.float16)
                yield record

    def batch(self, wanted):
        """Records, numbers or keys, as a MoleculeBatch in that order; it carries all targets, and forces if any."""
        numbers = self._numbers(wanted)
        return MoleculeBatch.from_blocks([(self._block(numbers), np.arange(len(numbers)))] if len(numbers) else [])

    def sequential(self, budget):
        """Yield all records in order, in micro-batches under budget. Raises UserError where one alone is over it."""
        packing.check(self.manifest["largest"], budget, self.folder)
        starts = packing.cut(self.atoms, budget)
        held = {}
        for begin, end in zip(starts[:-1], starts[1:], strict=True):
            group, row = np.divmod(np.arange(begin, end), GROUP)
            needed = range(group[0], group[-1] + 1)
            held = {number: held[number] if number in held else self._group(number) for number in needed}
            yield MoleculeBatch.from_blocks([(held[number], row[group == number]) for number in needed])

    def _group(self, number):
        return self._block(np.arange(number * GROUP, min((number + 1) * GROUP, len(self))))

    def _numbers(self, wanted):
        """Numbers or keys -> numbers, int64 [k]."""
        numbers = np.array([self.index_of(each) if isinstance(each, str) else each for each in wanted], np.int64)
        outside = numbers[(numbers < 0) | (numbers >= len(self))]
        if len(outside):
            raise IndexError(f"record {outside[0]} of {self.folder}, which has {len(self)}")
        return numbers

    def _whole(self, name):
        """An array that has one value a record, or its ptr."""
        if name not in self.held:
            self.held[name] = self.arrays[name][:]
        return self.held[name]

    def _encoded(self, numbers):
        block = self._block(numbers)
        used, block["provenance"] = np.unique(block["provenance"], return_inverse=True)
        block["provenance"] = block["provenance"].astype(np.int16)
        sources = [self.manifest["sources"][i] for i in used]
        return save(block, metadata={"mspt": json.dumps({"provenance": sources})})

    def _block(self, numbers):
        """The arrays of a block of these records, in this order."""
        block = {}
        for name in self.arrays:
            if name in ONE_EACH or name.startswith(TARGETS):
                block[unquote(name)] = self._whole(name)[numbers]
            elif name in RAGGED and not name.startswith("spectra/"):
                self._take(block, name, numbers)
        for name in GRIDS:
            if f"spectra/{name}/kind" in self.arrays:
                self._take_spectra(block, f"spectra/{name}", numbers)
        return block

    def _take(self, block, name, numbers):
        ptr = RAGGED[name]
        block[name], counts = blocks.take(self.arrays[name], self._whole(ptr), numbers)
        block[ptr] = blocks.ptr_of(counts)

    def _take_spectra(self, block, prefix, numbers):
        """Only what these records have, as in a block."""
        kind = self._whole(f"{prefix}/kind")[numbers]
        if not kind.any():
            return
        block[f"{prefix}/kind"] = np.where(kind == HALF, blocks.VALUES, kind).astype(np.uint8)
        if (kind == blocks.LINES).any():
            for part in ("positions", "strengths"):
                self._take(block, f"{prefix}/{part}", numbers)
        stored = {part: code for part, code in STORED_AS.items() if (kind == code).any()}
        if stored:
            valued = np.isin(kind, list(stored.values()))
            row, kind = self._whole(f"{prefix}/row")[numbers][valued], kind[valued]
            arrays = {part: self.arrays[f"{prefix}/{part}"] for part in stored}
            shape = (len(row), *next(iter(arrays.values())).shape[1:])
            values = np.empty(shape, np.result_type(*(array.dtype for array in arrays.values())))
            for part, array in arrays.items():
                own = kind == stored[part]
                values[own] = array[row[own]]
            block[f"{prefix}/values"] = values

    @classmethod
    def write(cls, folder, records, provenance, units):
        """Write an iterable of (valid) Records as a store that is there when it is whole -> the ZarrSet.

        provenance, units: as in a shard set's manifest. Memory: each array's rows wait for a shard of 32 MiB, and 16
        bytes a record for the order of the keys. Raises UserError where folder is there already, where there is no
        record or where two have the same key.
        """
        records = iter(records)
        with files.new_folder(folder) as aside:
            writer = _Writer(aside)
            while group := list(islice(records, GROUP)):
                writer.add(group)
            if not writer.records:
                raise UserError(f"{folder}: no record is there to be written; give a set that has some")
            writer.finish(provenance, units)
            cls.open(aside)._refuse_double_keys(folder)
        return cls.open(folder)

    def _refuse_double_keys(self, folder):
        order = self._whole("order")
        words = self._whole("words")[order]
        for at in np.flatnonzero(words[1:] == words[:-1]):
            one, other = sorted(order[at : at + 2].tolist())
            if (key := self.keys[one]) == self.keys[other]:
                raise UserError(f"{folder}: the key {key!r} is that of records {one} and {other}; make it unique")


class _Writer(StoreWriter):
    """Blocks of records -> the columns of a store."""

    def __init__(self, folder):
        super().__init__(folder)
        self.records = self.atoms = self.largest = 0
        self.sources, self.targets, self.words = {}, set(), []

    def add(self, records):
        block = blocks.decode(blocks.encode(records))
        table = json.loads(block.pop("")["mspt"])["provenance"]
        places = [self.sources.setdefault(json.dumps(each), len(self.sources)) for each in table]
        block["provenance"] = np.array(places, np.int32)[block["provenance"]]
        self.words.append(block["words"].copy())
        for name in GRIDS:
            if f"spectra/{name}/kind" in block:
                spectra = [record.spectra.get(name) for record in records]
                half = np.array([getattr(spectrum, "dtype", None) == np.float16 for spectrum in spectra])
                self._split(block, f"spectra/{name}", half)
        for name in [name for name in block if name.startswith(TARGETS)]:
            self.targets.add(name.removeprefix(TARGETS))
            block[TARGETS + quote(name.removeprefix(TARGETS), safe="")] = block.pop(name)
        for name, values in block.items():
            if name not in self.columns:
                self._pad(name, self.column(name, values))
            if name in PTRS:
                self.columns[name].extend_ptr(values)
            else:
                self.columns[name].extend(values)
        self.records += len(records)
        self.atoms += len(block["numbers"])
        self.largest = max(self.largest, int(np.diff(block["ptr"]).max()))
        for name, column in self.columns.items():
            self._pad(name, column)

    def _split(self, block, prefix, half):
        """A block's values by their type, and where each record's will be. half [m]: which are float16."""
        kind = np.where((block[f"{prefix}/kind"] == blocks.VALUES) & half, HALF, block[f"{prefix}/kind"])
        block[f"{prefix}/kind"] = kind.astype(np.uint8)
        if f"{prefix}/values" not in block:
            return
        values, valued = block.pop(f"{prefix}/values"), np.isin(kind, list(STORED_AS.values()))
        row = np.full(len(kind), -1, np.int64)
        for part, code in STORED_AS.items():
            own = kind == code
            if own.any():
                block[f"{prefix}/{part}"] = values[own[valued]].astype(part)
                row[own] = np.arange(own.sum()) + self.column(f"{prefix}/{part}", block[f"{prefix}/{part}"]).length
        block[f"{prefix}/row"] = row

    def _pad(self, name, column):
        """Bring a column up to all records that were added, with what stands for nothing there."""
        fill, length = 0, self.records
        if name in PTRS:
            fill, length = column.end, self.records + 1
        elif name == "forces":
            fill, length = np.nan, self.atoms
        elif name.startswith(TARGETS):
            fill = np.nan
        elif name.endswith("/row"):
            fill = -1
        elif name not in ONE_EACH and not name.endswith("/kind"):
            return
        while column.length < length:
            column.extend(np.full((min(column.shard, length - column.length), *column.tail), fill, column.dtype))

    def finish(self, provenance, units):
        words = np.concatenate(self.words)
        order = np.argsort(words, kind="stable")
        self.column("order", order).extend(order)
        self.close(
            {
                "kind": KIND,
                "schema_version": SCHEMA_VERSION,
                "records": self.records,
                "atoms": self.atoms,
                "largest": self.largest,
                "grids": grids(),
                "units": units,
                "provenance": provenance,
                "targets": sorted(self.targets),
                "sources": [json.loads(source) for source in self.sources],
            }
        )
