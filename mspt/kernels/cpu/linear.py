"""Linear layers on the CPU's matrix unit, as operators of torch. The kernel: linear.cpp."""

import torch

from mspt.kernels import reference
from mspt.kernels.cpu import build
from mspt.kernels.operators import LIBRARY
from mspt.kernels.second import register_second

SMALLEST = 32  # rows, inputs and outputs that fill a block of the unit

LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias, int heads) -> Tensor")
# Of x (empty unless asked for), weight and bias (empty without bias).
LIBRARY.define(
    "linear_backward(Tensor g, Tensor x, Tensor weight, Tensor? bias, int heads, bool moving) "
    "-> (Tensor, Tensor, Tensor)"
)


def linear(x, weight, bias, heads):
    """As reference.linear, which also serves other CPUs, other types, and what is too small to be worth packing."""
    rows = x.shape[:-1].numel()
    if not x.dtype == weight.dtype == torch.float32 or min(rows, *weight.shape) < SMALLEST or not ready():
        return reference.linear(x, weight, bias, heads)
    return torch.ops.mspt.linear(x.flatten(0, -2), weight, bias, heads).transpose(0, 1).unflatten(0, x.shape[:-1])


@torch.compiler.assume_constant_result
def ready():
    """Whether this CPU has the matrix unit that the kernel needs, and the process may use it."""
    return bool(build.load("linear").linear_ready())


def _forward(x, weight, bias, heads):
    result = x.new_empty(heads, len(x), len(weight) // heads)
    tensors = x.contiguous(), weight.contiguous(), bias, result
    build.call("linear", "linear_forward", tensors, *x.shape, *result.shape[::2], torch.get_num_threads())
    return result


def _empty_gradients(x, weight, bias, moving):
    """Where the gradients of x, weight and bias go, not yet filled."""
    to_bias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    return x.new_empty(x.shape if moving else 0), weight.new_empty(weight.shape), to_bias


def _backward(g, x, weight, bias, heads, moving):
    g, x, weight = g.contiguous(), x.contiguous(), weight.contiguous()
    to_x, to_weight, to_bias = _empty_gradients(x, weight, bias, moving)
    sizes = *x.shape, *g.shape[::2], torch.get_num_threads()
    if moving:
        build.call("linear", "linear_backward_input", (g, weight, to_x), *sizes)
    build.call("linear", "linear_backward_weight", (g, x, to_weight, None if bias is None else to_bias), *sizes)
    return to_x, to_weight, to_bias


def _meaning(x, weight, bias, heads, moving):
    return reference.linear(x, weight, bias, heads).transpose(0, 1)


def _keep(ctx, inputs, output):
    x, weight, bias, ctx.heads = inputs
    ctx.save_for_backward(x, weight, bias)


def _gradient(ctx, g):
    x, weight, bias = ctx.saved_tensors
    moving = ctx.needs_input_grad[0]
    to_x, to_weight, to_bias = torch.ops.mspt.linear_backward(g, x, weight, bias, ctx.heads, moving)
    return to_x if moving else None, to_weight, None if bias is None else to_bias, None


LIBRARY.impl("linear", _forward, "CPU")
LIBRARY.impl("linear_backward", _backward, "CPU")
torch.library.register_autograd("mspt::linear", _gradient, setup_context=_keep)
register_second("linear_backward", _meaning, results=1, tensors=3)


@torch.library.register_fake("mspt::linear")
def _(x, weight, bias, heads):
    return x.new_empty(heads, len(x), len(weight) // heads)


@torch.library.register_fake("mspt::linear_backward")
def _(g, x, weight, bias, heads, moving):
    return _empty_gradients(x, weight, bias, moving)
