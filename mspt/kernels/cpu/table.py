"""The table of radial gates in C++: silu, spline coefficients and the order of heads in two sweeps over it."""

import torch
from torch.nn.functional import linear, silu

from mspt.kernels import reference
from mspt.kernels.cpu import build
from mspt.kernels.operators import LIBRARY
from mspt.kernels.second import register_second

LIBRARY.define("gate_table(Tensor pre, Tensor bias, int heads, bool spline) -> Tensor")
LIBRARY.define(
    "gate_table_backward(Tensor gradient, Tensor pre, Tensor bias, int heads, bool spline) -> (Tensor, Tensor)"
)


def gate_table(weight, bias, heads, basis, geometry):
    """reference.gate_table."""
    weight, bias = reference.at_least_float32(weight, bias)
    pre = linear(reference.gate_rows(basis, geometry, weight.dtype), weight)
    return torch.ops.mspt.gate_table(pre, bias, heads, basis.knots is not None)


def _meaning(pre, bias, heads, is_spline):
    return (reference.arrange(silu(pre + bias), heads, is_spline),)


def _forward(pre, bias, heads, is_spline):
    rows, channels = pre.shape
    table = pre.new_empty(heads, rows, channels // heads)
    tensors = pre.contiguous(), bias.contiguous(), table
    build.call("table", "table_forward", tensors, rows, heads, channels // heads, is_spline, torch.get_num_threads())
    return table


def _backward(gradient, pre, bias, heads, is_spline):
    result, rows, width = torch.empty_like(pre), len(pre), len(bias) // heads
    tensors = gradient.contiguous(), pre.contiguous(), bias.contiguous(), result
    build.call("table", "table_backward", tensors, rows, heads, width, is_spline, torch.get_num_threads())
    return result, result.sum(0)


def _keep(ctx, inputs, output):
    pre, bias, ctx.heads, ctx.is_spline = inputs
    ctx.save_for_backward(pre, bias)


def _gradient(ctx, gradient):
    return *torch.ops.mspt.gate_table_backward(gradient, *ctx.saved_tensors, ctx.heads, ctx.is_spline), None, None


LIBRARY.impl("gate_table", _forward, "CPU")
LIBRARY.impl("gate_table_backward", _backward, "CPU")
torch.library.register_autograd("mspt::gate_table", _gradient, setup_context=_keep)
register_second("gate_table_backward", _meaning, results=1, tensors=2)


@torch.library.register_fake("mspt::gate_table")
def _(pre, bias, heads, spline):
    return pre.new_empty(heads, len(pre), pre.shape[1] // heads)


@torch.library.register_fake("mspt::gate_table_backward")
def _(gradient, pre, bias, heads, spline):
    return torch.empty_like(pre), torch.empty_like(bias)
