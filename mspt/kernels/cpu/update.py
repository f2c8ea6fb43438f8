"""The ET layer's update in C++, one pass over memory each way."""

import torch

from mspt.kernels import reference
from mspt.kernels.cpu import build
from mspt.kernels.operators import LIBRARY

LIBRARY.define("update(Tensor x, Tensor vec, Tensor outputs, Tensor projected) -> (Tensor, Tensor)")
# Of outputs and projected; the gradients of x and vec are those of the results.
LIBRARY.define("update_backward(Tensor g_x, Tensor g_vec, Tensor outputs, Tensor projected) -> (Tensor, Tensor)")
# h_*: gradients that meet these two -> gradients to g_x, g_vec, outputs and projected.
LIBRARY.define(
    "update_second(Tensor h_outputs, Tensor h_projected, Tensor g_x, Tensor g_vec, Tensor outputs, Tensor projected) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def update(x, vec, outputs, projected):
    """reference.update."""
    if projected is None:
        return reference.update(x, vec, outputs, projected)
    return torch.ops.mspt.update(x, vec, outputs, projected)


def _run(function, inputs, like):
    """The results of a C function, each in the shape of one of `like`."""
    tensors, results = [tensor.contiguous() for tensor in inputs], _empty(like)
    n, channels = inputs[-2].shape[0], inputs[-2].shape[1] // 3
    half = inputs[0].dtype == torch.bfloat16
    build.call("update", function, [*tensors, *results], n, channels, half, torch.get_num_threads())
    return results


def _empty(like):
    return tuple(tensor.new_empty(tensor.shape) for tensor in like)


def _forward(*inputs):
    return _run("update_forward", inputs, inputs[:2])


def _backward(*inputs):
    return _run("update_backward", inputs, inputs[2:])


def _second(*inputs):
    return _run("update_second", inputs, inputs[2:])


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[2:])


def _gradient(ctx, g_x, g_vec):
    return g_x, g_vec, *torch.ops.mspt.update_backward(g_x, g_vec, *ctx.saved_tensors)


def _keep_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient_of_gradient(ctx, h_outputs, h_projected):
    return torch.ops.mspt.update_second(h_outputs, h_projected, *ctx.saved_tensors)


LIBRARY.impl("update", _forward, "CPU")
LIBRARY.impl("update_backward", _backward, "CPU")
LIBRARY.impl("update_second", _second, "CPU")
torch.library.register_autograd("mspt::update", _gradient, setup_context=_keep)
torch.library.register_autograd("mspt::update_backward", _gradient_of_gradient, setup_context=_keep_backward)


@torch.library.register_fake("mspt::update")
def _(*inputs):
    return _empty(inputs[:2])


@torch.library.register_fake("mspt::update_backward")
def _(*inputs):
    return _empty(inputs[2:])


@torch.library.register_fake("mspt::update_second")
def _(*inputs):
    return _empty(inputs[2:])
