"""The gradient of a global batch does not depend on how it is cut into ranks × micro-batches.

Each denoising objective beside masked patches and contrast, which has negatives from the whole global batch; cuts are
uneven and one is empty. float64 is at ZeRO 0, float32 at ZeRO 2, and zero3 says where float32 is.
"""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from mspt.objectives import DENOISING
from tests.launching import launch

WORKER = Path(__file__).parent / "workers" / "gradients.py"
RUNS = ("float64", "float32", "zero3")
# What no output depends on: vectors before there are any; the last vectors, of which scalars see nothing; a constant in
# the energy. And the last block's scalar of the vector head.
SILENT = {
    "coord": 2,
    "frad": 2,
    "se3_ddm": 3,
    "emgp": 4,
}


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """Per cut (ranks, micro-batches in all), denoising objective and run the gradients by parameter."""
    folder = tmp_path_factory.mktemp("gradients")
    result = {}
    for ranks, micro_batches in ((1, 1), (1, 4), (2, 4), (4, 4)):
        launch(WORKER, ranks, micro_batches, folder / f"{ranks}-{micro_batches}", *DENOISING, timeout=900)
        for denoising in DENOISING:
            for run in RUNS:
                path = folder / f"{ranks}-{micro_batches}-{denoising}-{run}.safetensors"
                result[ranks, micro_batches, denoising, run] = safetensors.torch.load_file(path)
    return result


def relative(a, b):
    return ((a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize(("run", "tolerance"), [("float64", 1e-10), ("float32", 1e-5), ("zero3", 1e-5)])
@pytest.mark.parametrize("denoising", DENOISING)
@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 4), (2, 4), (4, 4)])
def test_gradient_equals_that_of_one_process_and_one_batch(gradients, ranks, micro_batches, denoising, run, tolerance):
    whole, cut = gradients[1, 1, denoising, run], gradients[ranks, micro_batches, denoising, run]
    assert whole.keys() == cut.keys()
    silent = [name for name, gradient in whole.items() if gradient.abs().max() == 0]
    assert len(silent) <= SILENT[denoising], silent
    assert relative(*(torch.cat([g.flatten() for g in gradient.values()]) for gradient in (whole, cut))) < tolerance
    # A parameter whose gradient is a small difference of large terms has more of their rounding.
    worst = max(whole, key=lambda name: relative(whole[name], cut[name]))
    assert relative(whole[worst], cut[worst]) < 5 * tolerance, worst


@pytest.mark.parametrize("denoising", DENOISING)
@pytest.mark.parametrize("run", ["float32", "zero3"])
def test_stages_and_precisions_agree(gradients, denoising, run):
    """float32 at ZeRO 2 and at ZeRO 3, and float64 at ZeRO 0, are the same gradient."""
    exact, rounded = gradients[1, 1, denoising, "float64"], gradients[1, 1, denoising, run]
    worst = max(exact, key=lambda name: relative(exact[name], rounded[name]))
    assert relative(exact[worst], rounded[worst]) < 1e-3, worst
