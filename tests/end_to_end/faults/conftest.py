"""Uninterrupted runs to compare with, and what an end must be like."""

import pytest
import torch

from mspt.data import keyed
from mspt.data.shardset import ShardSet
from mspt.training import checkpoint, metrics
from tests.end_to_end.faults.ranks import Run
from tests.end_to_end.runs import SHARDS

STEPS = 13  # more than two epochs
MODULUS = 1 << 52  # of records_digest


@pytest.fixture(scope="session")
def ends_as_uninterrupted(tmp_path_factory):
    """A check of a run folder: weights bit-equal to an uninterrupted run's, each record once an epoch, no litter."""
    wholes = {}

    def whole(world_size):
        if world_size not in wholes:
            folder = tmp_path_factory.mktemp("whole") / "run"
            run = Run(folder, world_size, STEPS)
            assert run.end() == [0] * world_size, run.said()
            assert "not finite, update skipped (1 in a row)" in run.said()
            wholes[world_size] = folder
        return wholes[world_size]

    def check(folder, world_size):
        expected = metrics.read(whole(world_size))
        rows = metrics.read(folder)
        for name in ("step", "epoch", "records_digest", "molecules"):
            assert [row[name] for row in rows] == [row[name] for row in expected], name
        everything = ShardSet.open(SHARDS)
        words = torch.tensor([keyed.word(record.key) for record in everything.records(range(len(everything)))])
        digest = int(keyed.mix(words, 0).sum()) % MODULUS
        for epoch in (0, 1):
            own = [row for row in rows if row["epoch"] == epoch]
            assert sum(row["molecules"] for row in own) == len(everything)
            assert sum(int(row["records_digest"]) for row in own) % MODULUS == digest
        ours, theirs = (checkpoint.latest(each) for each in (folder, whole(world_size)))
        assert ours.name == theirs.name == f"step-{STEPS:08d}"
        ours, theirs = checkpoint.read_weights(ours), checkpoint.read_weights(theirs)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert not list(folder.rglob("*.partial"))

    return check
