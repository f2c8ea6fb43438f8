"""Two streams of tests side by side: what waits for SLURM most of the time, and all the rest one after another."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.xdist_group("slurm" if item.path.is_relative_to(HERE / "slurm") else "runs"))
