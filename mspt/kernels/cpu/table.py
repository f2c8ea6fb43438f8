"""The table of radial gates in C++: silu and spline coefficients in two sweeps over it."""

import torch
from torch.nn.functional import silu

from mspt.kernels import reference
from mspt.kernels.cpu import build
from mspt.kernels.cpu.linear import linear
from mspt.kernels.operators import LIBRARY
from mspt.kernels.second import register_second

LIBRARY.define("gate_table(Tensor pre, bool spline) -> Tensor")
LIBRARY.define("gate_table_backward(Tensor gradient, Tensor pre, bool spline) -> Tensor")


def gate_table(weight, bias, heads, basis, geometry):
    """reference.gate_table."""
    weight, bias = reference.at_least_float32(weight, bias)
    pre = linear(reference.gate_rows(basis, geometry, weight.dtype), weight, bias, heads)
    return torch.ops.mspt.gate_table(pre.transpose(0, 1), basis.knots is not None)


def _meaning(pre, is_spline):
    return (reference.arrange(silu(pre.transpose(0, 1).flatten(1)), len(pre), is_spline),)


def _forward(pre, is_spline):
    table = pre.new_empty(pre.shape)
    tensors = pre.contiguous(), table
    build.call("table", "table_forward", tensors, *pre.shape, is_spline, torch.get_num_threads())
    return table


def _backward(gradient, pre, is_spline):
    result = pre.new_empty(pre.shape)
    tensors = gradient.contiguous(), pre.contiguous(), result
    build.call("table", "table_backward", tensors, *pre.shape, is_spline, torch.get_num_threads())
    return result


def _keep(ctx, inputs, output):
    pre, ctx.is_spline = inputs
    ctx.save_for_backward(pre)


def _gradient(ctx, gradient):
    return torch.ops.mspt.gate_table_backward(gradient, *ctx.saved_tensors, ctx.is_spline), None


LIBRARY.impl("gate_table", _forward, "CPU")
LIBRARY.impl("gate_table_backward", _backward, "CPU")
torch.library.register_autograd("mspt::gate_table", _gradient, setup_context=_keep)
register_second("gate_table_backward", _meaning, results=1, tensors=1)


@torch.library.register_fake("mspt::gate_table")
def _(pre, spline):
    return pre.new_empty(pre.shape)


@torch.library.register_fake("mspt::gate_table_backward")
def _(gradient, pre, spline):
    return pre.new_empty(pre.shape)
