"""A shard set that tests of several files read; they copy it before they break it."""

from pathlib import Path

import pytest

from mspt.data.shardset import ShardSet
from tests.data.molecules import write_set

BUNDLED = Path(__file__).parents[2] / "shards/bundled/qm9-spectra/heldout"


@pytest.fixture(scope="session")
def qm9(tmp_path_factory):
    """Sixty molecules of QM9 with their spectra, in eight blocks of three shards."""
    folder = tmp_path_factory.mktemp("qm9") / "set"
    write_set(folder, ShardSet.open(BUNDLED).records(range(60)), block=8, blocks_per_shard=3)
    return folder
