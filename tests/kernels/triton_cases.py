"""The Triton kernels, on a GPU or else in Triton's interpreter, which test_triton.py starts."""

from functools import partial

import pytest
import torch
from agreement import TOLERANCE, attention_error, error, spanning

from mspt import kernels
from mspt.kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _poisoned():
    """PyTorch fills with NaN whatever is allocated and not yet written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_triton_is_what_runs():
    assert kernels.implementation(DEVICE) == "triton"


@pytest.mark.parametrize(
    ("dtype", "width", "options"),
    [
        (FLOAT, 8, {}),
        (FLOAT, 16, {"vector_cutoff": True}),
        (FLOAT, 8, {"vectors": False, "vector_cutoff": True}),
        (FLOAT, 8, {"knots": None, "vector_cutoff": True}),
        (FLOAT, 8, {"knots": None, "vectors": False, "max_neighbours": 3}),
        (FLOAT, 8, {"loop": False, "max_neighbours": 2}),
        (HALF, 16, {}),
        (HALF, 8, {"vectors": False, "vector_cutoff": True}),
    ],
)
def test_message_pass(dtype, width, options):
    found = attention_error(DEVICE, dtype, (4, 1, 0, 2), width, **options)
    assert found < TOLERANCE[dtype]


def test_lonely_atoms_keep_their_vectors():
    found = attention_error(DEVICE, FLOAT, (1, 1), 8, loop=False)
    assert found == 0


def test_other_head_widths_are_left_to_the_reference():
    found = attention_error(DEVICE, FLOAT, (3, 2), 5, second=False)
    assert found < TOLERANCE[FLOAT]


@pytest.mark.parametrize("regular", [(2e-5, 2e-5, 2e-5), (1e-5, 2e-5, 3e-5)])
@pytest.mark.parametrize("directions", [3, 2, 1, 0])
def test_whiten(directions, regular):
    inputs = spanning(directions, 5, 24), torch.linspace(0.5, 2, 24)
    found = error(
        partial(kernels.whiten, regular=regular), partial(reference.whiten, regular=regular), inputs, DEVICE, FLOAT
    )
    assert found < TOLERANCE[FLOAT]


def test_whiten_in_low_precision():
    regular = (2e-5, 2e-5, 2e-5)
    inputs = spanning(3, 5, 24), torch.linspace(0.5, 2, 24)
    found = error(
        partial(kernels.whiten, regular=regular), partial(reference.whiten, regular=regular), inputs, DEVICE, HALF
    )
    assert found < TOLERANCE[HALF]


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_update(dtype):
    torch.manual_seed(0)
    inputs = torch.randn(5, 24), torch.randn(5, 3, 24), torch.randn(5, 72), torch.randn(3, 5, 72).transpose(0, 1)
    found = error(kernels.update, reference.update, inputs, DEVICE, dtype)
    assert found < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_gate_table(dtype):
    torch.manual_seed(0)
    basis = kernels.RadialBasis(6, 3.0, 16)

    def through(module):
        def run(weight, bias):
            nowhere = torch.empty(0, device=weight.device)
            return module.gate_table(weight, bias, 2, basis, reference.Geometry(nowhere, nowhere, nowhere, nowhere))

        return run

    inputs = torch.randn(64, 6), torch.randn(64)
    found = error(through(kernels), through(reference), inputs, DEVICE, dtype)
    assert found < TOLERANCE[dtype]


def test_nothing_gives_nothing():
    x, vec = torch.zeros(0, 16, device=DEVICE), torch.zeros(0, 3, 16, device=DEVICE, requires_grad=True)
    weight = torch.ones(16, device=DEVICE, requires_grad=True)
    (kernels.whiten(vec, weight, (2e-5, 2e-5, 2e-5)).sum() + x.sum()).backward()
    assert vec.grad.shape == (0, 3, 16)
    assert (weight.grad == 0).all()
