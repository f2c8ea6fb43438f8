"""SphereNet's messages over triplets in C++: one pass over the triplets each way, atom by atom."""

import torch

from mspt.kernels import reference
from mspt.kernels.cpu import build
from mspt.kernels.operators import LIBRARY
from mspt.kernels.second import register_second

INPUTS = (
    "Tensor sent, Tensor harmonics, Tensor spherical, Tensor angle_down, Tensor torsion_down, Tensor angle_up, "
    "Tensor torsion_up, Tensor begin, Tensor outgoing, Tensor ptr"
)
LIBRARY.define(f"triplet_messages({INPUTS}) -> Tensor")
# The gradients of harmonics and spherical are empty unless asked for.
LIBRARY.define(
    f"triplet_messages_backward(Tensor gradient, {INPUTS}, bool moving) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# The widest basis that the C++ is written for; the published one is as wide.
MOST = 8


def triplet_messages(*inputs):
    """reference.triplet_messages."""
    sent, angle_up = inputs[0], inputs[5]
    if sent.dtype != torch.float32 or angle_up.shape[1] > MOST:
        return reference.triplet_messages(*inputs)
    return torch.ops.mspt.triplet_messages(*inputs)


def _sizes(sent, harmonics, spherical, angle_down, torsion_down, angle_up, torsion_up, begin, outgoing, ptr):
    """Of the inputs, as the C++ functions take them."""
    channels, basis = angle_up.shape
    return len(ptr) - 1, len(sent), channels, *spherical.shape[1:], basis


def _forward(*given):
    heard = torch.empty_like(given[0], memory_format=torch.contiguous_format)
    numbers = (*_sizes(*given), torch.get_num_threads())
    given = [tensor.contiguous() for tensor in given]
    build.call("triplet_messages", "triplet_messages_forward", [*given, heard], *numbers)
    return heard


def _empty(tensors, moving):
    """Where the gradients of the first seven inputs go, not yet filled."""
    found = [tensor.new_empty(tensor.shape) for tensor in tensors[:7]]
    return found if moving else [found[0], found[1].new_empty(0), found[2].new_empty(0), *found[3:]]


def _backward(gradient, *rest):
    *given, moving = rest
    results = _empty(given, moving)
    numbers = (*_sizes(*given), moving, torch.get_num_threads())
    given = [tensor.contiguous() for tensor in (gradient, *given)]
    build.call("triplet_messages", "triplet_messages_backward", [*given, *results], *numbers)
    return tuple(results)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, gradient):
    moving = any(ctx.needs_input_grad[1:3])
    sent, harmonics, spherical, *weights = torch.ops.mspt.triplet_messages_backward(
        gradient, *ctx.saved_tensors, moving
    )
    seen = (harmonics, spherical) if moving else (None, None)
    return sent, *seen, *weights, None, None, None


def _meaning(*inputs):
    return reference.triplet_messages(*inputs[:-1])


LIBRARY.impl("triplet_messages", _forward, "CPU")
LIBRARY.impl("triplet_messages_backward", _backward, "CPU")
torch.library.register_autograd("mspt::triplet_messages", _gradient, setup_context=_keep)
register_second("triplet_messages_backward", _meaning, results=1, tensors=7)


@torch.library.register_fake("mspt::triplet_messages")
def _(sent, *rest):
    return sent.new_empty(sent.shape)


@torch.library.register_fake("mspt::triplet_messages_backward")
def _(gradient, *rest):
    return tuple(_empty(rest, rest[-1]))
