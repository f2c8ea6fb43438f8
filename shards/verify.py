"""Read all of a shard set and compare it with what its manifest and its index say."""

import math
from pathlib import Path

import numpy as np

from mspt.data import block as blocks
from mspt.data.shardset import INDEX, MANIFEST, ShardSet, sha256
from mspt.errors import UserError
from shards import duplicates
from shards.statistics import Statistics
from shards.writer import Shard

REMEDY = "copy the set again or build it again"


def verify(folder):
    """-> the ShardSet of a folder. Raises UserError that names the first file that is not what was written."""
    shardset = ShardSet.open(folder)
    manifest, statistics, words = shardset.manifest, Statistics(), []
    for shard, own in contents(shardset):
        statistics.add(shard.statistics)
        words.append(own)
    for name, value in statistics.manifest().items():
        if not _same(value, manifest.get(name)):
            where = shardset.store.path(MANIFEST)
            raise UserError(f"{where}: {name} is {manifest.get(name)} where the shards hold {value}; {REMEDY}")
    for key, _ in repeated([shardset], words):
        raise UserError(f"{shardset.folder}: the key {key} is there twice; build the set again")
    return shardset


def contents(shardset):
    """Yield each shard as a Shard, and the words (keyed.word of the key) of its records, by reading all of it.

    Raises UserError where a shard, a block of it or the index is not what was written.
    """
    index, folder = shardset.store.path(INDEX), Path(shardset.folder)
    for number, said in enumerate(shardset.manifest["shards"]):
        path, statistics, words = folder / said["file"], Statistics(), []
        begin, end = np.searchsorted(shardset.shard, [number, number + 1])
        for block in range(begin, end):
            decoded = shardset.block(block)
            atoms = shardset.atoms[slice(*shardset.first[block : block + 2])]
            if not np.array_equal(np.diff(decoded["ptr"]), atoms):
                raise UserError(f"{index}: disagrees with block {block} in {path.name}; {REMEDY}")
            statistics.add(Statistics.of(decoded))
            words.append(decoded["words"])
        found = {
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
            "blocks": int(end - begin),
            "records": statistics.records,
        }
        if found["sha256"] != said["sha256"]:
            raise UserError(f"{path}: is damaged outside of its blocks (sha256); {REMEDY}")
        for name, value in found.items():
            if said[name] != value:
                where = f"{shardset.store.path(MANIFEST)}: {name} of {path.name}"
                raise UserError(f"{where} is {said[name]} where it has {value}; {REMEDY}")
        own = ("offset", "size", "head", "block_atoms", "checksum")
        columns = {name: getattr(shardset, name)[begin:end] for name in own}
        columns["records"] = shardset.block_records[begin:end]
        columns["atoms"] = shardset.atoms[slice(*shardset.first[[begin, end]])]
        yield Shard(found, columns, statistics), np.concatenate(words)


def repeated(shardsets, words):
    """Yield keys that several records have, with the folders that have them; words: of all their shards, in order."""
    first = blocks.ptr_of([len(shardset) for shardset in shardsets])

    def place(row):
        number = int(np.searchsorted(first, row, side="right")) - 1
        return shardsets[number], row - first[number]

    def key(row):
        shardset, own = place(row)
        return next(shardset.records([own])).key

    for group in duplicates.groups(np.concatenate(words), key):
        yield key(group[0]), [place(row)[0].folder for row in group]


def _same(one, other):
    """Whether values of JSON agree; sums may differ in the order in which they were added up."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    return one == other
