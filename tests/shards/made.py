"""A source of records that a test has made, and what a build leaves."""

import hashlib
import json
import os
from pathlib import Path
from unittest.mock import patch

from mspt.data.shardset import ShardSet
from shards.build import Settings, build
from shards.source import Source


class Made(Source):
    """items: Records and RejectedRecords. inputs: files that they are said to come from."""

    def __init__(self, items, inputs=()):
        self.provenance = {"source": "made", "units": {"gap": "eV"}}
        self.items, self.inputs, self.total = list(items), list(inputs), len(items)

    def chunks(self, size):
        for first in range(0, self.total, size):
            yield first, first + size

    def read(self, chunk):
        yield from self.items[slice(*chunk)]


def make(items, out, processes=1, part=None, strict=False, inputs=(), **settings):
    """Build OUT of items, in chunks of 16 rows, without waiting for the disk."""
    settings = Settings(**({"shard": 16, "block": 4, "inchikey": False} | settings))
    with patch.object(os, "fsync"):
        return build(Made(items, inputs), out, settings, "made", processes, part, strict)


def keys(folder):
    shardset = ShardSet.open(folder)
    return [r.key for r in shardset.records(range(len(shardset)))]


def content(folder):
    """File -> hash of its bytes, of a whole folder."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
