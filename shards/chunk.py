"""One chunk of a source -> its shards, in a folder that is there when all of it is.

A folder chunk-00012 holds

    chunk.json              what was read, what was refused and why
    records.safetensors     of each record, in the order of the source: keys, words (keyed.word of the key), part (its
                            number); inchikeys, molecules (keyed.word of the InChIKey, 0 without one)
    PART                    shard.tar, and of it shard.json and index.safetensors
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from mspt import files
from mspt.data import block as blocks
from mspt.data import keyed
from mspt.data.schema import RejectedRecord, validate
from mspt.errors import UserError
from shards import identity
from shards.source import Source
from shards.split import Split
from shards.writer import Shard, ShardWriter

SHARD, RECORDS, COUNT = "shard.tar", "records.safetensors", "chunk.json"
INCHIKEY = 27  # characters


@dataclass(frozen=True)
class Plan:
    """What a build does with every row. exclude: keys to leave out. inchikey: whether molecules are told apart."""

    source: Source
    work: Path
    split: Split
    block: int
    exclude: frozenset
    inchikey: bool
    strict: bool


@dataclass(frozen=True)
class Task:
    """name: of the folder to make. chunk: of the source. rows: how many of it to read, None for all.

    twice: keys to refuse, because an earlier chunk has them. dropped: keys to leave out, because it has the molecule.
    """

    name: str
    chunk: object
    rows: int | None = None
    twice: frozenset = frozenset()
    dropped: frozenset = frozenset()


@dataclass
class Count:
    """What chunk.json holds. excluded, dropped: left out as asked. unknown: without a scaffold."""

    rows: int = 0
    excluded: int = 0
    dropped: int = 0
    unknown: int = 0
    rejects: list = field(default_factory=list)


def build(plan, task):
    """Make the folder of a task -> its Count. Raises UserError at the first refused record where the plan is strict."""
    for left in plan.work.glob(f".{task.name}.*"):  # by a kill
        shutil.rmtree(left)
    aside = plan.work / f".{task.name}.{os.getpid()}"
    aside.mkdir()
    count, writers, keys, parts, smiles = Count(), {}, {}, [], []
    for item in islice(plan.source.read(task.chunk), task.rows):
        count.rows += 1
        try:
            if isinstance(item, RejectedRecord):
                raise item
            if item.key in plan.exclude:
                count.excluded += 1
                continue
            validate(item)
            if item.key in task.twice or item.key in keys:
                raise RejectedRecord(item.key, "key", "is there twice")
            if item.key in task.dropped:
                count.dropped += 1
                continue
        except RejectedRecord as error:
            row = {"key": error.key, "field": error.field, "reason": error.reason}
            if plan.strict:
                raise refusal(row) from error
            count.rejects.append(row)
            continue
        molecule = plan.source.molecule(item.key)
        group = plan.split.group(molecule, item.smiles)
        if group is None:
            count.unknown += 1
            group = molecule
        part = plan.split.part(group)
        if part not in writers:
            (aside / plan.split.parts[part]).mkdir(exist_ok=True)
            writers[part] = ShardWriter(aside / plan.split.parts[part] / SHARD, plan.block)
        writers[part].add(item)
        keys[item.key] = keyed.word(item.key)
        parts.append(part)
        smiles.append(item.smiles)
    for part, writer in writers.items():
        writer.close().save(aside / plan.split.parts[part])
    # In a row at the end: between other work, each takes twice as long.
    inchikeys = [identity.inchikey(one) if plan.inchikey and one else "" for one in smiles]
    texts = [key.encode() for key in keys]
    records = {
        "keys": np.frombuffer(b"".join(texts), np.uint8),
        "keys_ptr": blocks.ptr_of([len(text) for text in texts]),
        "words": np.array(list(keys.values()), np.int64),
        "part": np.array(parts, np.uint8),
        "inchikeys": np.array(inchikeys, f"S{INCHIKEY}").view(np.uint8),
        "inchikeys_ptr": np.arange(len(keys) + 1) * INCHIKEY,
        "molecules": np.array([keyed.word(one) if one else 0 for one in inchikeys], np.int64),
    }
    files.write(aside / RECORDS, save(records))
    files.write(aside / COUNT, json.dumps(asdict(count), ensure_ascii=False))
    os.rename(aside, plan.work / task.name)
    return count


def refusal(row):
    """What --strict says of a row of the rejects."""
    return UserError(
        f"{row['key']}: {row['field']}: {row['reason']}; leave --strict out to list it in rejects.jsonl instead"
    )


def load(folder):
    """The Count of a folder that is there."""
    return Count(**json.loads((folder / COUNT).read_text()))


def shards(folder, parts):
    """The shards of a folder: part -> Shard, of the parts that have one."""
    return {part: Shard.load(folder / part) for part in parts if (folder / part / "shard.json").exists()}


class Records:
    """What the records.safetensors of folders say, end to end, without reading them into memory."""

    def __init__(self, folders):
        self.chunks = [blocks.decode(np.memmap(folder / RECORDS, np.uint8, "r")) for folder in folders]
        self.first = blocks.ptr_of([len(chunk["words"]) for chunk in self.chunks])

    def column(self, name):
        """words, part or molecules of all records, [N]."""
        return np.concatenate([chunk[name] for chunk in self.chunks])

    def chunk_of(self, row):
        """The number of the folder that has a record."""
        return int(np.searchsorted(self.first, row, side="right")) - 1

    def text(self, name, row):
        """keys or inchikeys of a record."""
        number = self.chunk_of(row)
        chunk, own = self.chunks[number], row - self.first[number]
        begin, end = chunk[f"{name}_ptr"][own : own + 2]
        return chunk[name][begin:end].tobytes().decode()
