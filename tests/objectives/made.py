"""Molecules with bonds for the tests beside this file."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from mspt.data.batch import MoleculeBatch
from mspt.data.shardset import ShardSet
from shards.sources.computed import bonds

ROOT = Path(__file__).parents[2]


def bonded(record):
    """The record with bonds by distance, all of them single."""
    pairs = np.array(sorted(bonds(record.numbers, record.positions)), np.int16)
    return replace(record, bonds=pairs, bond_types=np.ones(len(pairs), np.uint8))


@cache
def bonded_records():
    """Real molecules, of an odd number of atoms: no bond has the same number on both sides."""
    records = ShardSet.open(ROOT / "shards/bundled/qm9-spectra/heldout").records(range(40))
    return [bonded(record) for record in records if len(record.numbers) % 2]


def batch_of(records):
    """A MoleculeBatch in float64, with spectra as values, which a Pass needs."""
    return MoleculeBatch.from_records(records).to(torch.float64)
