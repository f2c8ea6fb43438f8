"""The gradient of labels, forces among them, does not depend on how a global batch is cut into ranks × micro-batches,
nor on the ZeRO stage.
"""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.launching import launch

WORKER = Path(__file__).parent / "workers" / "labelled_gradients.py"
CUTS = ((1, 1), (2, 4))


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """Per cut (ranks, micro-batches in all) and run the gradients by parameter."""
    folder, result = tmp_path_factory.mktemp("gradients"), {}
    for ranks, micro_batches in CUTS:
        launch(WORKER, ranks, micro_batches, folder / f"{ranks}-{micro_batches}", timeout=600)
        for run in ("float64", "float32", "zero3"):
            path = folder / f"{ranks}-{micro_batches}-{run}.safetensors"
            result[ranks, micro_batches, run] = safetensors.torch.load_file(path)
    return result


def relative(a, b):
    return ((a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize(("run", "tolerance"), [("float64", 1e-10), ("float32", 1e-4), ("zero3", 1e-4)])
def test_every_cut_gives_the_same_gradient(gradients, run, tolerance):
    """A second derivative costs digits: in float32 a parameter's gradient is right to four."""
    whole = gradients[1, 1, "float64"]
    assert all(gradient.abs().max() > 0 for name, gradient in whole.items() if "vectors" not in name)
    for ranks, micro_batches in CUTS:
        own = gradients[ranks, micro_batches, run]
        assert own.keys() == whole.keys()
        expected = whole if run == "float64" else gradients[1, 1, "float32"]
        together, all_expected = (torch.cat([part[name].flatten() for name in whole]) for part in (own, expected))
        assert relative(all_expected, together) < tolerance
        if run == "float64":
            # Where a gradient is a sum that cancels, what is left of it is rounding.
            size = all_expected.norm()
            assert all((own[name] - whole[name]).norm() < tolerance * size for name in whole)
