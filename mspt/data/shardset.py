"""A shard set: a folder of tar shards with a manifest and an index, on this machine or behind a URL.

    manifest.json       schema version, grids, counts, statistics, provenance, and per shard its size and checksum
    index.safetensors   atoms [N] of every record; per block: shard, offset, size, head (its bytes before the values of
                        spectra), records, block_atoms (of all its records), checksum (XXH3 of the head)
    shard-00000.tar     a WebDataset shard; each member is one block of records

Records are numbered in the order in which they lie in the set.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
from functools import partial

import numpy as np
import xxhash

from mspt.chemistry.spectra import GRIDS
from mspt.data import block as blocks
from mspt.data.cache import Cache
from mspt.data.consistency import check_index, check_manifest
from mspt.data.schema import SCHEMA_VERSION
from mspt.data.store import Folder, Pipe, Remote, StoreSettings, open_store, sha256
from mspt.errors import UserError

MANIFEST, INDEX = "manifest.json", "index.safetensors"
MISSING = "the manifest asks for it, but it is missing; restore it or build the set again"


class BadBlock(UserError):
    """A block that is not what was written: path of its shard, its number in the set, and the reason."""

    def __init__(self, path, number, reason):
        super().__init__(f"{path}: block {number} is damaged ({reason}); copy the shard again or build it again")
        self.path, self.number, self.reason = path, number, reason

    def __reduce__(self):
        return BadBlock, (self.path, self.number, self.reason)


def grids():
    """The grids as the manifest names them."""
    return {name: dataclasses.asdict(grid) for name, grid in GRIDS.items()}


def checksum(data):
    """XXH3 of the bytes of a block's head as int64: it costs less than reading them does, which CRC32 does not."""
    value = xxhash.xxh3_64_intdigest(data)
    return value - (1 << 64) if value >> 63 else value


class ShardSet:
    """manifest: the dict of manifest.json. atoms: int32 [N]. first: int64 [B + 1], the first record of each block.
    chosen: int64 [N], where the set is a selection, the records of the whole set that it has; else None.

    Threads may read at once, and so may forked processes; what is pickled opens the set again.
    """

    def __init__(self, store, cache, manifest, index):
        self.store, self.cache, self.manifest, self.folder = store, cache, manifest, store.root
        self.files = [shard["file"] for shard in manifest["shards"]]
        self.atoms = index["atoms"]
        self.shard, self.offset, self.size = index["shard"], index["offset"], index["size"]
        self.head, self.checksum = index["head"], index["checksum"]
        self.block_records, self.block_atoms = index["records"], index["block_atoms"]
        self.first = blocks.ptr_of(self.block_records)
        self.chosen = self.chosen_rows = None

    @classmethod
    def open(cls, url, settings=None):
        """Open and check a set: manifest, index, and that every shard is there and of the size that it should have.

        url: a folder, a URL or pipe:COMMAND (store.open_store). settings: StoreSettings. Behind HTTP and pipes a shard
        is looked at when it is first read. Raises UserError that names the file and the remedy.
        """
        settings = settings or StoreSettings()
        store = open_store(url, settings)
        far = not isinstance(store, Folder)
        cache = Cache(settings.cache, settings.cache_bytes) if far and settings.cache else None
        manifest = _read_manifest(store)
        if isinstance(store, Remote):
            store.read(MANIFEST, 0, np.empty(1, np.uint8))  # a server that ignores byte ranges is found out now
        _check_files(store, manifest)
        return cls(store, cache, manifest, _read_index(store, cache, manifest))

    def __reduce__(self):
        # A loader worker that is not forked maps the index itself instead of getting a copy of it.
        return ShardSet._again, (self.store, self.cache, self.manifest["index_sha256"], self.chosen)

    @classmethod
    def _again(cls, store, cache, digest, chosen):
        manifest = _read_manifest(store)
        if manifest["index_sha256"] != digest:
            raise UserError(f"{store.path(MANIFEST)}: has changed since the set was opened; start again")
        whole = cls(store, cache, manifest, _read_index(store, cache, manifest))
        return whole if chosen is None else whole.select(chosen)

    def select(self, numbers):
        """The records of the given numbers [k], each there once, as a set of its own, in the order of this one.

        This one must be whole. Blocks keep their numbers.
        """
        numbers = np.sort(np.asarray(numbers, np.int64))
        block = np.searchsorted(self.first, numbers, side="right") - 1
        part = copy.copy(self)
        part.chosen, part.chosen_rows = numbers, (numbers - self.first[block]).astype(np.int32)
        part.atoms = self.atoms[numbers]
        part.block_records = np.bincount(block, minlength=len(self.block_records))
        part.block_atoms = np.bincount(block, part.atoms, minlength=len(self.block_records)).astype(np.int64)
        part.first = blocks.ptr_of(part.block_records)
        counts = {"records": len(numbers), "atoms": int(part.atoms.sum(dtype=np.int64))}
        part.manifest = self.manifest | counts | {"largest": int(part.atoms.max(initial=0))}
        return part

    def rows(self, numbers, blocks):
        """The rows, int32, at which records lie in the blocks that hold them; both [k]."""
        if self.chosen is not None:
            return self.chosen_rows[numbers]
        return (numbers - self.first[blocks]).astype(np.int32)

    def __len__(self):
        return len(self.atoms)

    def read(self, number):
        """The bytes of one block, checked as in view. Raises as that."""
        return self.view(number).tobytes()

    def view(self, number):
        """The same as an array uint8 [size], which is a view of the file where that is on this machine.

        Raises BadBlock where they are not what was written, and UserError where they cannot be read. Values of spectra
        are left for whoever takes them to check (block.check, gather.Held).
        """
        if isinstance(self.store, Folder):
            data = self.store.view(self.files[self.shard[number]], int(self.offset[number]), int(self.size[number]))
            return self._whole(number, data)
        into = np.empty(int(self.size[number]), np.uint8)
        if self.cache is None:
            self._read(number, into)
        else:
            self._read_cached(number, into)
        return into

    def block(self, number):
        """One block as block.decode gives it, checked. Raises as view."""
        try:
            block = blocks.decode(self.view(number))
            blocks.check(block)
        except blocks.DamagedBlock as error:
            raise self.bad(number, str(error)) from error
        return block

    def records(self, numbers):
        """Yield the Records of the given numbers, in that order. Raises IndexError outside 0 to N - 1."""
        at, held = None, []
        for number in numbers:
            if not 0 <= number < len(self):
                raise IndexError(f"record {number} of {self.folder}, which has {len(self)}")
            block = int(np.searchsorted(self.first, number, side="right")) - 1
            if block != at:
                try:
                    at, held = block, blocks.records(self.read(block))
                except blocks.DamagedBlock as error:
                    raise self.bad(block, str(error)) from error
            yield held[int(self.rows(number, block))]

    def verify(self, progress=lambda size: None):
        """Read everything and compare it with the manifest and the index. Raises UserError at the first difference.

        progress(bytes) is called after every shard and after every block.
        """
        for shard in self.manifest["shards"]:
            if self.store.sha256(shard["file"], shard["bytes"]) != shard["sha256"]:
                path = self.store.path(shard["file"])
                raise UserError(f"{path}: is damaged (sha256); copy the shard again or build it again")
            progress(shard["bytes"])
        for number in range(len(self.block_records)):
            own = self.atoms[slice(*self.first[number : number + 2])]
            if not np.array_equal(np.diff(self.block(number)["ptr"]), own):
                raise UserError(f"{self.store.path(INDEX)}: disagrees with block {number}; build the set again")
            progress(self.size[number])

    def _read(self, number, into):
        got = self.store.read(self.files[self.shard[number]], int(self.offset[number]), into)
        self._whole(number, into[:got])

    def _whole(self, number, data):
        """data, which BadBlock is raised without where they are not what was written."""
        if not self._is_whole(number, data):
            size = self.size[number]
            raise self.bad(number, "checksum" if len(data) == size else f"{len(data)} bytes of {size}")
        return data

    def _read_cached(self, number, into):
        kept = self.cache.read(self._entry(number))
        if kept is not None and self._is_whole(number, kept) and blocks.values_hold(kept):
            into[:] = np.frombuffer(kept, np.uint8)
        elif isinstance(self.store, Pipe):
            self._read_pipe(number, into)
        else:
            self._read(number, into)
            if blocks.values_hold(into):
                self._keep(number, into)

    def _read_pipe(self, number, into):
        """Run the command once; all blocks of the shard that are whole go into the cache."""
        shard = int(self.shard[number])
        own = range(*np.searchsorted(self.shard, [shard, shard + 1]).tolist())
        spans = [(int(self.offset[other]), int(self.size[other])) for other in own]
        found = False
        for other, data in zip(own, self.store.spans(self.files[shard], spans), strict=True):
            if not self._is_whole(other, data):
                continue
            if blocks.values_hold(data):
                self._keep(other, data)
            if other == number:
                into[:] = np.frombuffer(data, np.uint8)
                found = True
        if not found:
            raise self.bad(number, "checksum")

    def _is_whole(self, number, data):
        return len(data) == self.size[number] and checksum(data[: self.head[number]]) == self.checksum[number]

    def bad(self, number, reason):
        """The BadBlock of a block that turned out not to be what was written."""
        return BadBlock(self.store.path(self.files[self.shard[number]]), int(number), reason)

    def _entry(self, number):
        return f"{self.manifest['index_sha256']}-{number}"

    def _keep(self, number, data):
        self.cache.add(self._entry(number), lambda path: path.write_bytes(data))


def _read_manifest(store):
    """The dict of manifest.json. Raises UserError where it is not one that this mspt reads."""
    path = store.path(MANIFEST)
    try:
        manifest = json.loads(store.fetch(MANIFEST).decode())
    except FileNotFoundError as error:
        raise UserError(f"{path}: not there, so {store.root} is no shard set; build one with shards build") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); build the set again") from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version is {version!r}, this mspt reads {SCHEMA_VERSION}; build the set again")
    check_manifest(manifest, path)
    if manifest["grids"] != grids():
        raise UserError(f"{path}: grids differ from this mspt's; build the set again")
    return manifest


def _check_files(store, manifest):
    """Raise UserError where a file is missing or a shard has another size than the manifest says.

    Some stores can only tell when the file is read.
    """
    expected = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
    sizes = store.sizes([INDEX, *expected])
    if sizes is None:
        return
    for file in (*expected, INDEX):
        if file not in sizes:
            raise UserError(f"{store.path(file)}: {MISSING}")
        if sizes[file] != expected.get(file, sizes[file]):
            raise UserError(
                f"{store.path(file)}: {sizes[file]} bytes where the manifest says {expected[file]}; "
                "copy it again or build the set again"
            )


def _read_index(store, cache, manifest):
    """Name -> array of the index. Raises UserError where it is not what was written."""
    path, digest = store.path(INDEX), manifest["index_sha256"]
    try:
        data = _mapped(path, digest) if isinstance(store, Folder) else _fetched(store, cache, digest)
    except FileNotFoundError as error:
        raise UserError(f"{path}: {MISSING}") from error
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise UserError(f"{path}: cannot be read ({error}); restore it or build the set again") from error
    if data is None:
        raise UserError(f"{path}: is damaged (sha256); copy it again or build the set again")
    try:
        index = blocks.decode(data)
    except blocks.DamagedBlock as error:
        raise UserError(f"{path}: {error}; build the set again") from error
    check_index(index, manifest, path)
    return index


def _mapped(path, digest):
    """A local file's bytes, uint8, of which all processes of a machine share one copy; None where SHA-256 differs.

    Raises FileNotFoundError.
    """
    return np.memmap(path, np.uint8, "r") if sha256(path) == digest else None


def _fetched(store, cache, digest):
    """The same for the index of a store that is far away: mapped if there is a cache that keeps it."""
    if cache is not None:
        for missing in (True, False):
            with contextlib.suppress(OSError, ValueError):
                data = _mapped(cache.path(digest), digest)
                if data is not None:
                    return data
            if missing:
                cache.add(digest, partial(store.save, INDEX))
    data = np.frombuffer(store.fetch(INDEX), np.uint8)
    return data if hashlib.sha256(data).hexdigest() == digest else None
