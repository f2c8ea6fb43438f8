"""A shard set: a folder of tar shards with a manifest and an index.

    manifest.json       schema version, grids, counts, statistics, provenance, and per shard its size and checksum
    index.safetensors   atoms [N] of every record; per block: shard, offset, size, records, crc32
    shard-00000.tar     a WebDataset shard; each member is one block of records

Records are numbered in the order in which they lie in the set.
"""

import dataclasses
import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import load

from mspt.chemistry.spectra import GRIDS
from mspt.data import block as blocks
from mspt.data.schema import SCHEMA_VERSION
from mspt.errors import UserError

MANIFEST, INDEX = "manifest.json", "index.safetensors"


def grids():
    """The grids as the manifest names them."""
    return {name: dataclasses.asdict(grid) for name, grid in GRIDS.items()}


class ShardSet:
    """manifest: the dict of manifest.json. atoms: int32 [N]. first: int64 [B + 1], the first record of each block."""

    def __init__(self, folder, manifest, index):
        self.folder, self.manifest = folder, manifest
        self.atoms = index["atoms"]
        self.shard, self.offset, self.size = index["shard"], index["offset"], index["size"]
        self.crc32 = index["crc32"]
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
        version = manifest.get("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path}: schema_version is {version!r}, this mspt reads {SCHEMA_VERSION}; build the set again"
            )
        if manifest["grids"] != grids():
            raise UserError(f"{path}: grids differ from this mspt's; build the set again")
        data = (folder / INDEX).read_bytes() if (folder / INDEX).exists() else b""
        if hashlib.sha256(data).hexdigest() != manifest["index_sha256"]:
            raise UserError(f"{folder / INDEX}: missing or not the manifest's; restore it or build the set again")
        if not manifest["shards"] or not manifest["records"]:
            raise UserError(f"{path}: the set holds no records; see rejects.jsonl of its build")
        for shard in manifest["shards"]:
            file = folder / shard["file"]
            if not file.exists():
                raise UserError(f"{file}: the manifest lists this shard, but it is missing; restore it or build again")
            if file.stat().st_size != shard["bytes"]:
                raise UserError(
                    f"{file}: {file.stat().st_size} bytes where the manifest says {shard['bytes']}; "
                    "copy it again or build again"
                )
        return cls(folder, manifest, load(data))

    def __len__(self):
        return len(self.atoms)

    def read(self, number):
        """The bytes of one block, checked. Raises UserError where they are not what was written."""
        path = self.folder / self.manifest["shards"][self.shard[number]]["file"]
        with path.open("rb") as file:
            file.seek(self.offset[number])
            data = file.read(self.size[number])
        if zlib.crc32(data) != self.crc32[number]:
            raise UserError(f"{path}: block {number} is damaged (checksum); copy the shard again or build it again")
        return data

    def records(self, numbers):
        """Yield the Records of the given numbers, in that order."""
        at, held = None, []
        for number in numbers:
            block = int(np.searchsorted(self.first, number, side="right")) - 1
            if block != at:
                at, held = block, blocks.records(self.read(block))
            yield held[number - self.first[block]]

    def verify(self):
        """Read everything and compare it with the manifest and the index. Raises UserError at the first difference."""
        for shard in self.manifest["shards"]:
            path = self.folder / shard["file"]
            if hashlib.sha256(path.read_bytes()).hexdigest() != shard["sha256"]:
                raise UserError(f"{path}: is damaged (sha256); copy the shard again or build it again")
        for number, count in enumerate(self.block_records):
            ptr = blocks.decode(self.read(number))["ptr"]
            if len(ptr) - 1 != count or not np.array_equal(
                np.diff(ptr), self.atoms[slice(*self.first[number : number + 2])]
            ):
                raise UserError(f"{self.folder / INDEX}: disagrees with block {number}; build the set again")
