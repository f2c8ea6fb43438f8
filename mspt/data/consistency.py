"""Whether a shard set's manifest and index are complete, and agree with themselves and each other."""

from collections import Counter

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from mspt.errors import UserError

PER_BLOCK = {
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int64,
    "head": np.int64,
    "records": np.int32,
    "block_atoms": np.int64,
    "checksum": np.int64,
}


class _Shard(BaseModel):
    """What the manifest says of one shard. file is a plain name: it gets into URLs and commands."""

    file: str = Field(pattern=r"^\w[\w.-]*$")
    bytes: int = Field(gt=0)
    sha256: str
    blocks: int = Field(gt=0)
    records: int = Field(gt=0)


class _Manifest(BaseModel):
    """What a manifest must hold to be read."""

    grids: dict
    records: int = Field(gt=0)
    atoms: int = Field(gt=0)
    largest: int = Field(gt=0)
    elements: dict
    targets: list
    spectra: dict
    provenance: dict
    shards: list[_Shard] = Field(min_length=1)
    index_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def check_manifest(manifest, path):
    """Raise UserError where a manifest, a dict, lacks what it is read for or contradicts itself."""

    def refuse(what):
        raise UserError(f"{path}: {what}; restore the file or build the set again")

    if manifest.get("records") == 0:
        raise UserError(f"{path}: records is 0; see rejects.jsonl of its build, then build it again")
    try:
        shards = _Manifest.model_validate(manifest, strict=True).shards
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        refuse(f"{field} is missing" if first["type"] == "missing" else f"{field} is {first['input']!r:.60}")
    name, times = Counter(shard.file for shard in shards).most_common(1)[0]
    if times > 1:
        refuse(f"shards lists {name} {times} times")
    records = sum(shard.records for shard in shards)
    if records != manifest["records"]:
        refuse(f"records is {manifest['records']}, but its shards have {records}")


def check_index(index, manifest, path):
    """Raise UserError where an index, name -> array, contradicts itself or a manifest that was checked."""

    def refuse(what):
        raise UserError(f"{path}: {what}; restore the file or build the set again")

    def refuse_block(wrong, what):
        if wrong.any():
            number = int(wrong.argmax())
            own = ", ".join(f"{name} {index[name][number]}" for name in PER_BLOCK if name != "checksum")
            refuse(f"block {number} {what} ({own})")

    shards = manifest["shards"]
    count = sum(shard["blocks"] for shard in shards)
    for name, kind in (PER_BLOCK | {"atoms": np.int32}).items():
        if name not in index:
            refuse(f"{name} is missing")
        if index[name].dtype != kind or index[name].ndim != 1:
            refuse(f"{name} is {index[name].dtype} {index[name].shape} where a list of {np.dtype(kind)} is needed")
        if name in PER_BLOCK and len(index[name]) != count:
            refuse(f"{name} has {len(index[name])} values where the manifest says {count} blocks")
    shard, offset, size, head, records = (index[name] for name in ("shard", "offset", "size", "head", "records"))
    refuse_block((shard < 0) | (shard >= len(shards)), "lies in no shard")
    refuse_block((records < 1) | (size < 1), "is empty")
    refuse_block((head < 1) | (head > size), "has a head of another length")
    ends = np.array([entry["bytes"] for entry in shards])[shard]
    refuse_block((offset < 0) | (offset > ends - size), "does not lie inside its shard")
    # In their order and apart: what lies in two blocks would be read twice.
    apart = (shard[1:] > shard[:-1]) | ((shard[1:] == shard[:-1]) & (offset[1:] >= (offset + size)[:-1]))
    refuse_block(~apart, "is not followed by the next")
    for name, weights in (("blocks", None), ("records", records)):
        found = np.bincount(shard, weights, len(shards)).astype(np.int64).tolist()
        for entry, number in zip(shards, found, strict=True):
            if entry[name] != number:
                refuse(f"{number} {name} in {entry['file']} where the manifest says {entry[name]}")
    atoms = index["atoms"]
    refuse_record = atoms < 1
    if refuse_record.any():
        refuse(f"record {refuse_record.argmax()} has {atoms[refuse_record.argmax()]} atoms")
    own = index["block_atoms"]
    found = {"records": len(atoms), "atoms": int(own.sum()), "largest": int(atoms.max(initial=0))}
    for name, number in found.items():
        if number != manifest[name]:
            refuse(f"{name} is {number} where the manifest says {manifest[name]}")
    first = np.cumsum(records, dtype=np.int64) - records
    refuse_block(np.add.reduceat(atoms, first, dtype=np.int64) != own, "has other atoms than its records")
