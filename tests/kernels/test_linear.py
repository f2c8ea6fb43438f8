"""Linear layers on the CPU's matrix unit against PyTorch in float64."""

import pytest
import torch
from agreement import error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from mspt import kernels
from mspt.kernels import reference
from mspt.kernels.cpu.linear import ready
from mspt.models.layers import Linear

needs_unit = pytest.mark.skipif(not ready(), reason="this CPU has no matrix unit that multiplies bfloat16")
# rows, inputs, outputs, heads: as published, edges of tiles in every direction, several pieces of a sum.
SHAPES = [(996, 256, 1280, 8), (32, 32, 32, 1), (33, 47, 65, 1), (700, 300, 160, 4), (95, 290, 66, 3)]


def inputs(rows, number_in, number_out, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, number_in), (number_out, number_in), (number_out,)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def difference(heads, given):
    """The largest error of the result and of its first and second gradients."""
    return error(
        lambda *leaves: kernels.linear(*leaves, heads),
        lambda *leaves: reference.linear(*leaves, heads),
        *(given, "cpu", torch.float32),
    )


@needs_unit
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_as_float64_would_have_it(shape, bias):
    *sizes, heads = shape
    x, weight, b = inputs(*sizes)
    assert difference(heads, [x, weight, b if bias else None]) < 1e-6


@needs_unit
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 40), st.integers(1, 3))
def test_any_size(rows, number_in, width, heads):
    """Small ones are PyTorch's own."""
    assert difference(heads, inputs(rows, number_in, heads * width)) < 1e-6


@needs_unit
def test_numbers_of_any_magnitude():
    """The three parts hold all digits of large and small numbers alike, and what is not finite stays so."""
    x, weight, bias = inputs(64, 64, 64)
    scale = 10.0 ** torch.arange(-32, 32)[:, None]
    bias.zero_()
    for factor in (1e-12, 1.0, 1e12):
        result = kernels.linear(x * factor, weight, bias, 1)[:, 0].double() / factor
        expected = x.double() @ weight.double().T
        assert (result - expected).norm() < 1e-6 * expected.norm()
    rows = kernels.linear((x.double() * scale.double() ** 0.5).float(), weight, bias, 1)[:, 0].double()
    expected = (x.double() * scale.double() ** 0.5).float().double() @ weight.double().T
    assert ((rows - expected).norm(dim=1) < 1e-6 * expected.norm(dim=1)).all()
    x[3, 5] = torch.inf
    result = kernels.linear(x, weight, bias, 1)[:, 0]
    assert not result[3].isfinite().any()
    assert result[[0, 1, 2, 4]].isfinite().all()


@needs_unit
def test_the_same_every_time_and_for_strided_arguments():
    x, weight, bias = inputs(200, 96, 160)
    one = kernels.linear(x, weight, bias, 5)
    assert torch.equal(one, kernels.linear(x, weight, bias, 5))
    strided = x.T.contiguous().T, torch.stack([weight, weight], 2)[..., 0], bias
    assert torch.equal(one, kernels.linear(*strided, 5))


@needs_unit
def test_operators_are_what_they_declare():
    x, weight, bias = (tensor.requires_grad_() for tensor in inputs(64, 32, 64))
    opcheck(torch.ops.mspt.linear.default, (x, weight, bias, 2))
    g = torch.randn(2, 64, 32)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for moving in (True, False):
        opcheck(torch.ops.mspt.linear_backward.default, (g, x, weight, bias, 2, moving), test_utils=tests)
        opcheck(torch.ops.mspt.linear_backward.default, (g, x, weight, None, 2, moving), test_utils=tests)


def test_a_layer_is_a_linear_map(monkeypatch):
    """With the unit and, as on other CPUs, without: leading dimensions are kept, heads split the last one."""
    torch.manual_seed(0)
    layer, x = Linear(48, 96, heads=3), torch.randn(20, 3, 48)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    for level in ("avx512", "avx2"):
        monkeypatch.setenv("MSPT_CPU", level)
        kernels.cpu.build.load.cache_clear()
        torch.testing.assert_close(layer(x), expected.unflatten(-1, (3, 32)), atol=1e-5, rtol=1e-5)
        layer.heads = None
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
        layer.heads = 3
    kernels.cpu.build.load.cache_clear()
