"""Records -> a shard set."""

import hashlib
import io
import json
import math
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from mspt import files
from mspt.chemistry.elements import SYMBOLS
from mspt.chemistry.spectra import GRIDS
from mspt.data import block as blocks
from mspt.data.schema import SCHEMA_VERSION, Lines
from mspt.data.shardset import INDEX, MANIFEST, checksum, grids, sha256


class ShardSetWriter:
    """Makes a folder a shard set. Each file is written aside and renamed; the manifest comes last.

    block: records a block. blocks_per_shard: blocks a shard. provenance: what the manifest says of where the records
    come from (command, source, methods). The same records give the same bytes.
    """

    def __init__(self, folder, provenance, block=256, blocks_per_shard=64):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.provenance, self.block, self.blocks_per_shard = provenance, block, blocks_per_shard
        self.pending, self.shards, self.atoms, self.written = [], [], [], 0
        self.index = {name: [] for name in ("shard", "offset", "size", "records", "checksum")}
        self.elements, self.spectra = Counter(), {name: Counter() for name in GRIDS}
        self.targets = set()
        self.tar = self.file = None

    def add(self, record):
        """Append a (valid) Record."""
        self.pending.append(record)
        self.atoms.append(len(record.numbers))
        self.elements.update(SYMBOLS[z] for z in record.numbers)
        self.targets.update(record.targets)
        for name, spectrum in record.spectra.items():
            count = self.spectra[name]
            count["records"] += 1
            count["lines"] += len(spectrum.positions) if isinstance(spectrum, Lines) else 0
            count["total"] += float(
                np.sum(spectrum.strengths if isinstance(spectrum, Lines) else spectrum, dtype=float)
            )
        if len(self.pending) == self.block:
            self._write_block()

    def _write_block(self):
        data = blocks.encode(self.pending)
        if self.tar is None:
            self.name = f"shard-{len(self.shards):05d}.tar"
            self.file = (self.folder / f".{self.name}.partial").open("wb")
            self.tar = tarfile.TarFile(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)
        member = tarfile.TarInfo(f"{len(self.index['size']):06d}.safetensors")
        member.size, member.mode = len(data), 0o644  # times and owners stay 0 and empty: the same bytes every time
        self.tar.addfile(member, io.BytesIO(data))
        padded = math.ceil(len(data) / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        row = (len(self.shards), self.file.tell() - padded, len(data), len(self.pending), checksum(data))
        for name, value in zip(self.index, row, strict=True):
            self.index[name].append(value)
        self.pending = []
        if len(self.index["shard"]) - self.written == self.blocks_per_shard:
            self._close_shard()

    def _close_shard(self):
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        path, own = self.folder / self.name, self.index["records"][self.written :]
        os.replace(self.folder / f".{self.name}.partial", path)
        self.shards.append(
            {
                "file": self.name,
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
                "blocks": len(own),
                "records": sum(own),
            }
        )
        self.written += len(own)
        self.tar = self.file = None

    def close(self):
        """Write the rest, the index and the manifest -> the manifest."""
        if self.pending:
            self._write_block()
        if self.tar is not None:
            self._close_shard()
        types = {"shard": np.int32, "offset": np.int64, "size": np.int64, "records": np.int32, "checksum": np.int64}
        arrays = {name: np.array(values, types[name]) for name, values in self.index.items()}
        index = save(arrays | {"atoms": np.array(self.atoms, np.int32)})
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "records": len(self.atoms),
            "atoms": sum(self.atoms),
            "largest": max(self.atoms, default=0),
            "elements": dict(sorted(self.elements.items())),
            "targets": sorted(self.targets),
            "grids": grids(),
            "spectra": {
                name: {
                    "records": count["records"],
                    "lines_per_record": round(count["lines"] / count["records"], 1),
                    "mean_total": count["total"] / count["records"],
                }
                for name, count in self.spectra.items()
                if count["records"]
            },
            "units": {"positions": "Å", "forces": "eV/Å"},
            "provenance": self.provenance,
            "shards": self.shards,
            "index_sha256": hashlib.sha256(index).hexdigest(),
        }
        files.write(self.folder / INDEX, index)
        files.write(self.folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        return manifest
