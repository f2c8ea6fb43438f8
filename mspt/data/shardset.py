"""A shard set: a folder of tar shards with a manifest and an index.

    manifest.json       schema version, grids, counts, statistics, provenance, and per shard its size and checksum
    index.safetensors   atoms [N] of every record; per block: shard, offset, size, records, checksum (XXH3)
    shard-00000.tar     a WebDataset shard; each member is one block of records

Records are numbered in the order in which they lie in the set.
"""

import dataclasses
import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xxhash

from mspt.chemistry.spectra import GRIDS
from mspt.data import block as blocks
from mspt.data.schema import SCHEMA_VERSION
from mspt.errors import UserError

MANIFEST, INDEX = "manifest.json", "index.safetensors"
REQUIRED = ("grids", "records", "largest", "shards", "index_sha256")


def grids():
    """The grids as the manifest names them."""
    return {name: dataclasses.asdict(grid) for name, grid in GRIDS.items()}


def sha256(path):
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_there(file):
    if not file.exists():
        raise UserError(f"{file}: the manifest asks for it, but it is missing; restore it or build the set again")


def checksum(data):
    """XXH3 of a block's bytes as int64: it costs less than reading them does, which CRC32 does not."""
    return int.from_bytes(xxhash.xxh3_64_digest(data), "big", signed=True)


class BadBlock(UserError):
    """A block that cannot be read as it was written."""


class ShardSet:
    """manifest: the dict of manifest.json. atoms: int32 [N]. first: int64 [B + 1], the first record of each block."""

    def __init__(self, folder, manifest, index):
        self.folder, self.manifest = folder, manifest
        self.atoms = index["atoms"]
        self.shard, self.offset, self.size = index["shard"], index["offset"], index["size"]
        self.checksum = index["checksum"]
        self.block_records = index["records"]
        self.first = blocks.ptr_of(self.block_records)

    @classmethod
    def open(cls, folder):
        """Open and check a folder: every shard there, each of the size that the manifest says.

        Raises UserError that names the file and the remedy.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        try:
            manifest = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise UserError(f"{path}: not there, so {folder} is no shard set; build one with shards.build") from error
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as JSON ({error}); build the set again") from error
        version = manifest.get("schema_version") if isinstance(manifest, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path}: schema_version is {version!r}, this mspt reads {SCHEMA_VERSION}; build the set again"
            )
        missing = [name for name in REQUIRED if name not in manifest]
        if missing:
            raise UserError(f"{path}: {missing[0]} is missing; restore the file or build the set again")
        if manifest["grids"] != grids():
            raise UserError(f"{path}: grids differ from this mspt's; build the set again")
        if not manifest["shards"] or not manifest["records"]:
            raise UserError(f"{path}: records is 0; see rejects.jsonl of its build, then build it again")
        for shard in manifest["shards"]:
            file = folder / shard["file"]
            _check_there(file)
            if file.stat().st_size != shard["bytes"]:
                raise UserError(
                    f"{file}: {file.stat().st_size} bytes where the manifest says {shard['bytes']}; "
                    "copy it again or build the set again"
                )
        index = folder / INDEX
        _check_there(index)
        if sha256(index) != manifest["index_sha256"]:
            raise UserError(f"{index}: is damaged (sha256); copy it again or build the set again")
        # Mapped: all processes of a machine share one copy, however long it is.
        return cls(folder, manifest, blocks.decode(np.memmap(index, np.uint8, "r")))

    def __reduce__(self):
        # A loader worker that is not forked maps the index itself instead of getting a copy of it.
        return ShardSet.open, (self.folder,)

    def __len__(self):
        return len(self.atoms)

    def read(self, number, buffer=None):
        """The bytes of one block, checked; read into a buffer (uint8) where one is given.

        Raises BadBlock where they are not what was written.
        """
        path, size = self.path(number), int(self.size[number])
        data = np.empty(size, np.uint8) if buffer is None else buffer[:size]
        try:
            with path.open("rb", buffering=0) as file:
                if os.preadv(file.fileno(), [data], int(self.offset[number])) != size:
                    raise BadBlock(f"{path}: ends within block {number}; copy the shard again or build it again")
        except OSError as error:
            raise BadBlock(f"{path}: cannot be read ({error.strerror}); restore it or build the set again") from error
        if checksum(data) != self.checksum[number]:
            raise BadBlock(f"{path}: block {number} is damaged (checksum); copy the shard again or build it again")
        return data.tobytes() if buffer is None else data

    def path(self, number):
        """The shard of a block."""
        return self.folder / self.manifest["shards"][self.shard[number]]["file"]

    @contextmanager
    def checking(self, number):
        """Within the context, a DamagedBlock is a BadBlock that says which block it is."""
        try:
            yield
        except blocks.DamagedBlock as error:
            raise BadBlock(f"{self.path(number)}: block {number} is damaged: {error}; build the set again") from error

    def records(self, numbers):
        """Yield the Records of the given numbers, in that order. Raises IndexError outside 0 to N - 1."""
        at, held = None, []
        for number in numbers:
            if not 0 <= number < len(self):
                raise IndexError(f"record {number} of {self.folder}, which has {len(self)}")
            block = int(np.searchsorted(self.first, number, side="right")) - 1
            if block != at:
                at, held = block, blocks.records(self.read(block))
            yield held[number - self.first[block]]

    def verify(self, progress=lambda size: None):
        """Read everything and compare it with the manifest and the index. Raises UserError at the first difference.

        progress(bytes) is called after every shard and after every block.
        """
        for shard in self.manifest["shards"]:
            path = self.folder / shard["file"]
            if sha256(path) != shard["sha256"]:
                raise UserError(f"{path}: is damaged (sha256); copy the shard again or build it again")
            progress(shard["bytes"])
        for number, count in enumerate(self.block_records):
            ptr = blocks.decode(self.read(number))["ptr"]
            if len(ptr) - 1 != count or not np.array_equal(
                np.diff(ptr), self.atoms[slice(*self.first[number : number + 2])]
            ):
                raise UserError(f"{self.folder / INDEX}: disagrees with block {number}; build the set again")
            progress(self.size[number])
