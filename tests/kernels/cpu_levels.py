"""What tests of the C++ kernels share: the instruction sets to run them at, and comparison with float64."""

from contextlib import contextmanager

import pytest
import torch

from mspt import native
from mspt.kernels.cpu import build

ABILITY = torch.backends.cpu.get_cpu_capability().lower()
LEVELS = list(native.LEVELS)[list(native.LEVELS).index(ABILITY if ABILITY in native.LEVELS else "portable") :]
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    """Runs the test with kernels compiled for every instruction set that this CPU has."""
    monkeypatch.setenv("MSPT_CPU", request.param)
    build.load.cache_clear()
    yield request.param
    build.load.cache_clear()


@contextmanager
def threads(count):
    """Within the context, torch has so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def poison(shape):
    """Leave NaN in freed memory of the size of the results to come."""
    for dtype in (torch.float32, torch.bfloat16):
        held = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(8)]
        del held


def assert_close(results, expected, dtype):
    """‖result − expected‖ within the bound of the type, of ‖expected‖, for every tensor of two lists."""
    for result, truth in zip(results, expected, strict=True):
        assert result.shape == truth.shape
        assert result.dtype == dtype
        error, size = (result.detach().double() - truth).norm(), truth.detach().norm()
        # Where the truth is zero, what is left of it in float64 is no measure.
        assert error <= BOUNDS[dtype] * size + 1e-9, f"{error / size:.1e}"
