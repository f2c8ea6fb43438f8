"""SphereNet's messages over triplets in C++: one pass over the triplets each way, atom by atom."""

import math

import torch

from mspt.kernels import reference
from mspt.kernels.cpu import build
from mspt.kernels.operators import LIBRARY
from mspt.kernels.second import register_second

INPUTS = (
    "Tensor sent, Tensor harmonics, Tensor angle_map, Tensor torsion_map, Tensor angle_weight, Tensor torsion_weight, "
    "Tensor begin, Tensor outgoing, Tensor ptr"
)
LIBRARY.define(f"triplet_messages({INPUTS}) -> Tensor")
# The gradient of harmonics is empty unless asked for.
LIBRARY.define(
    f"triplet_messages_backward(Tensor gradient, {INPUTS}, bool moving) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# The widest basis that the C++ is written for; the published one is as wide.
MOST = 8


def triplet_messages(*inputs):
    """reference.triplet_messages."""
    sent, angle_weight = inputs[0], inputs[4]
    if sent.dtype != torch.float32 or angle_weight.shape[1] > MOST:
        return reference.triplet_messages(*inputs)
    return torch.ops.mspt.triplet_messages(*inputs)


def _numbers(sent, harmonics, angle_weight, ptr):
    """Sizes, as the C++ functions take them."""
    channels, basis = angle_weight.shape
    return len(ptr) - 1, len(sent), channels, math.isqrt(harmonics.shape[1]), basis


def _forward(sent, harmonics, angle_map, torsion_map, angle_weight, torsion_weight, begin, outgoing, ptr):
    given = [sent, harmonics, angle_map, torsion_map, angle_weight, torsion_weight, begin, outgoing, ptr]
    heard = torch.empty_like(sent, memory_format=torch.contiguous_format)
    numbers = (*_numbers(sent, harmonics, angle_weight, ptr), torch.get_num_threads())
    given = [tensor.contiguous() for tensor in given]
    build.call("triplet_messages", "triplet_messages_forward", [*given, heard], *numbers)
    return heard


def _empty(tensors, moving):
    """Where the gradients of the six tensors go, not yet filled."""
    found = [tensor.new_empty(tensor.shape) for tensor in tensors]
    return found if moving else [found[0], found[1].new_empty(0), *found[2:]]


def _backward(gradient, *rest):
    *given, moving = rest
    sent, harmonics, _, _, angle_weight, *_, ptr = given
    results = _empty(given[:6], moving)
    numbers = (*_numbers(sent, harmonics, angle_weight, ptr), moving, torch.get_num_threads())
    given = [tensor.contiguous() for tensor in (gradient, *given)]
    build.call("triplet_messages", "triplet_messages_backward", [*given, *results], *numbers)
    return tuple(results)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, gradient):
    moving = ctx.needs_input_grad[1]
    sent, harmonics, *others = torch.ops.mspt.triplet_messages_backward(gradient, *ctx.saved_tensors, moving)
    return sent, harmonics if moving else None, *others, None, None, None


def _meaning(*inputs):
    return reference.triplet_messages(*inputs[:-1])


LIBRARY.impl("triplet_messages", _forward, "CPU")
LIBRARY.impl("triplet_messages_backward", _backward, "CPU")
torch.library.register_autograd("mspt::triplet_messages", _gradient, setup_context=_keep)
register_second("triplet_messages_backward", _meaning, results=1, tensors=6)


@torch.library.register_fake("mspt::triplet_messages")
def _(sent, *rest):
    return sent.new_empty(sent.shape)


@torch.library.register_fake("mspt::triplet_messages_backward")
def _(gradient, *rest):
    return tuple(_empty(rest[:6], rest[-1]))
