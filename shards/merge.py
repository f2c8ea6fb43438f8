"""Several shard sets -> one, without writing their blocks again."""

import itertools
import os
import shutil
from pathlib import Path

from mspt.data.shardset import ShardSet
from mspt.errors import UserError
from shards.verify import contents, repeated
from shards.writer import complete, shard_name


def merge(out, folders, command):
    """Make OUT a set of all records of the sets, in their order -> its manifest.

    The shards are linked where the file system can, copied where it cannot. Everything is read and checked on the way.
    Raises UserError where out is there already, a set is damaged, sets share a key or differ in a unit.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out}: is there already; remove it or choose another name")
    shardsets = [ShardSet.open(folder) for folder in folders]
    units = _units(shardsets)
    read = [list(contents(shardset)) for shardset in shardsets]
    twice = repeated(shardsets, [words for own in read for _, words in own])
    named = [f"{key} ({', '.join(map(str, where))})" for key, where in itertools.islice(twice, 3)]
    if named:
        raise UserError(
            f"keys must be unique in a set, and these and perhaps more are there twice: {'; '.join(named)}; "
            "leave a set out, or build one again with --exclude and the keys of the others"
        )
    aside = out.with_name(f".{out.name}.merging")
    if aside.exists():  # left by a kill
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    shards = []
    for shardset, own in zip(shardsets, read, strict=True):
        for said, (shard, _) in zip(shardset.manifest["shards"], own, strict=True):
            _place(Path(shardset.folder, said["file"]).resolve(), aside / shard_name(len(shards)))
            shards.append(shard)
    provenances = [shardset.manifest["provenance"] for shardset in shardsets]
    sources = dict.fromkeys(provenance.get("source", "") for provenance in provenances)
    provenance = {"command": command, "source": "; ".join(sources), "units": units, "sets": provenances}
    manifest = complete(aside, shards, provenance)
    os.replace(aside, out)
    return manifest


def _units(shardsets):
    """The units of targets and spectra of all sets. A target without a unit differs from one with a unit."""
    units, where = {}, {}
    for shardset in shardsets:
        said = shardset.manifest["provenance"].get("units", {})
        for name in (*said, *shardset.manifest["targets"]):
            unit = said.get(name, "")
            if units.setdefault(name, unit) != unit:
                one, other = (f"in {each}" if each else "without a unit" for each in (units[name], unit))
                raise UserError(
                    f"{name} is {one} in {where[name]} and {other} in {shardset.folder}; "
                    "build one of them again in the unit of the other"
                )
            where.setdefault(name, shardset.folder)
    return {name: unit for name, unit in units.items() if unit}


def _place(path, place):
    try:
        os.link(path, place)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, place)
        with place.open("rb") as file:
            os.fsync(file.fileno())
