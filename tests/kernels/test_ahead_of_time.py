"""Triton's kernels compiled for GPUs that are not here: that they compile, and what they take of a multiprocessor."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernels_fit():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "mspt.kernels.triton.ahead_of_time", "--json"],
        env=environment | {"MSPT_KERNELS": "reference"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout)
    assert {row["architecture"] for row in rows} == {"sm_80", "sm_90"}
    for row in rows:
        # Nothing spills, and at least 12 of 64 warps fit at once: each has eight loads or more under way.
        assert row["spilled"] == 0, row
        assert row["registers"] <= 168 and row["warps"] >= 12, row
        assert row["shared"] <= 4096, row
