"""The gradient of a global batch does not depend on how it is cut into ranks × micro-batches.

All three objectives are on, contrast with negatives from the whole global batch; cuts are uneven and one is empty.
"""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.launching import launch

WORKER = Path(__file__).parent / "workers" / "gradients.py"


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """Per cut (ranks, micro-batches in all) and precision the gradients by parameter."""
    folder = tmp_path_factory.mktemp("gradients")
    result = {}
    for ranks, micro_batches in ((1, 1), (1, 4), (2, 4), (4, 4)):
        launch(WORKER, ranks, micro_batches, folder / f"{ranks}-{micro_batches}", timeout=600)
        for precision in ("float64", "float32"):
            path = folder / f"{ranks}-{micro_batches}-{precision}.safetensors"
            result[ranks, micro_batches, precision] = safetensors.torch.load_file(path)
    return result


def relative(a, b):
    return ((a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 4), (2, 4), (4, 4)])
def test_gradient_equals_that_of_one_process_and_one_batch(gradients, ranks, micro_batches, precision, tolerance):
    whole, cut = gradients[1, 1, precision], gradients[ranks, micro_batches, precision]
    assert whole.keys() == cut.keys()
    silent = [name for name, gradient in whole.items() if gradient.abs().max() == 0]
    # All but what no output depends on: the last block's scalar of the vector head.
    assert len(silent) <= 2, silent
    assert relative(*(torch.cat([g.flatten() for g in gradient.values()]) for gradient in (whole, cut))) < tolerance
    # A parameter whose gradient is a small difference of large terms has more of their rounding.
    worst = max(whole, key=lambda name: relative(whole[name], cut[name]))
    assert relative(whole[worst], cut[worst]) < 5 * tolerance, worst


def test_precisions_agree(gradients):
    """float32 at ZeRO 2 and float64 at ZeRO 0 are the same gradient."""
    exact, rounded = gradients[1, 1, "float64"], gradients[1, 1, "float32"]
    worst = max(exact, key=lambda name: relative(exact[name], rounded[name]))
    assert relative(exact[worst], rounded[worst]) < 1e-3, worst
