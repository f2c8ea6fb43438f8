"""Records -> shards, and shards -> a shard set."""

import hashlib
import io
import json
import math
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from mspt import files
from mspt.data import block as blocks
from mspt.data.schema import SCHEMA_VERSION
from mspt.data.shardset import INDEX, MANIFEST, checksum, grids, sha256
from mspt.errors import UserError
from shards.statistics import Statistics

# What the index holds of every block.
COLUMNS = {
    "offset": np.int64,
    "size": np.int64,
    "head": np.int64,
    "records": np.int32,
    "block_atoms": np.int64,
    "checksum": np.int64,
}


def shard_name(number):
    return f"shard-{number:05d}.tar"


@dataclass(frozen=True)
class Shard:
    """A shard that lies on the disk, wherever it is.

    entry: its bytes, sha256, blocks and records. index: atoms int32 [records]; COLUMNS [blocks]. statistics: of its
    records.
    """

    entry: dict
    index: dict
    statistics: Statistics

    def save(self, folder):
        """Keep it beside the shard's file, which a build only later gives its place in a set."""
        files.write(folder / INDEX, save(self.index))
        files.write(folder / "shard.json", json.dumps({"entry": self.entry, "statistics": self.statistics.dump()}))

    @classmethod
    def load(cls, folder):
        said = json.loads((folder / "shard.json").read_text())
        return cls(
            entry=said["entry"],
            index=blocks.decode((folder / INDEX).read_bytes()),
            statistics=Statistics.load(said["statistics"]),
        )


class ShardWriter:
    """Writes one shard, aside until it is closed.

    path: of the shard. block: records a block. The same records give the same bytes.
    """

    def __init__(self, path, block):
        self.path, self.block = path, block
        self.aside = path.with_name(f".{path.name}.partial")
        self.file = self.aside.open("wb")
        self.tar = tarfile.TarFile(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)
        self.pending, self.atoms = [], []
        self.columns = {name: [] for name in COLUMNS}
        self.statistics = Statistics()

    def add(self, record):
        """Append a (valid) Record."""
        self.pending.append(record)
        self.atoms.append(len(record.numbers))
        if len(self.pending) == self.block:
            self._write_block()

    def _write_block(self):
        data = blocks.encode(self.pending)
        member = tarfile.TarInfo(f"{len(self.columns['size']):06d}.safetensors")
        member.size, member.mode = len(data), 0o644  # times and owners stay 0 and empty: the same bytes every time
        self.tar.addfile(member, io.BytesIO(data))
        padded = math.ceil(len(data) / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        atoms, head = sum(self.atoms[-len(self.pending) :]), blocks.head(data)
        row = (self.file.tell() - padded, len(data), head, len(self.pending), atoms, checksum(data[:head]))
        for name, value in zip(COLUMNS, row, strict=True):
            self.columns[name].append(value)
        self.statistics.add(Statistics.of(blocks.decode(data)))
        self.pending = []

    def close(self):
        """Write the rest and give the file its name -> its Shard."""
        if self.pending:
            self._write_block()
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.aside, self.path)
        entry = {
            "bytes": self.path.stat().st_size,
            "sha256": sha256(self.path),
            "blocks": len(self.columns["size"]),
            "records": len(self.atoms),
        }
        index = {name: np.array(self.columns[name], kind) for name, kind in COLUMNS.items()}
        return Shard(entry, index | {"atoms": np.array(self.atoms, np.int32)}, self.statistics)


def complete(folder, shards, provenance):
    """Write index and manifest of a folder in which shards (one Shard or more) lie by shard_name -> the manifest.

    provenance: what the manifest says of where the records come from (command, source, units, methods).
    """
    statistics = Statistics()
    for shard in shards:
        statistics.add(shard.statistics)
    index = {name: np.concatenate([shard.index[name] for shard in shards]) for name in ("atoms", *COLUMNS)}
    counts = [shard.entry["blocks"] for shard in shards]
    index["shard"] = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
    index = save(index)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        **statistics.manifest(),
        "grids": grids(),
        "units": {"positions": "Å", "forces": "eV/Å"},
        "provenance": provenance,
        "shards": [{"file": shard_name(number), **shard.entry} for number, shard in enumerate(shards)],
        "index_sha256": hashlib.sha256(index).hexdigest(),
    }
    files.write(folder / INDEX, index)
    files.write(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


class ShardSetWriter:
    """Makes a folder a shard set from one process; the manifest comes last.

    block: records a block. blocks_per_shard: blocks a shard. provenance: as complete() takes it.
    """

    def __init__(self, folder, provenance, block=256, blocks_per_shard=64):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.provenance, self.block, self.records_per_shard = provenance, block, block * blocks_per_shard
        self.shards, self.writer = [], None

    def add(self, record):
        """Append a (valid) Record."""
        if self.writer is None:
            self.writer = ShardWriter(self.folder / shard_name(len(self.shards)), self.block)
        self.writer.add(record)
        if len(self.writer.atoms) == self.records_per_shard:
            self._close_shard()

    def _close_shard(self):
        self.shards.append(self.writer.close())
        self.writer = None

    def close(self):
        """Write the rest, the index and the manifest -> the manifest. Raises UserError where there is no record."""
        if self.writer is not None:
            self._close_shard()
        if not self.shards:
            raise UserError(f"{self.folder}: no record to write; a set holds one or more")
        return complete(self.folder, self.shards, self.provenance)
