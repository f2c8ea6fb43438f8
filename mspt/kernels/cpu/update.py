"""The ET layer's update in C++, one pass over memory each way."""

import torch

from mspt.kernels import reference
from mspt.kernels.cpu import build
from mspt.kernels.operators import LIBRARY
from mspt.kernels.second import register_second

LIBRARY.define("update(Tensor x, Tensor vec, Tensor outputs, Tensor projected) -> (Tensor, Tensor)")
# Of outputs and projected; the gradients of x and vec are those of the results.
LIBRARY.define("update_backward(Tensor g_x, Tensor g_vec, Tensor outputs, Tensor projected) -> (Tensor, Tensor)")


def update(x, vec, outputs, projected):
    """reference.update."""
    if projected is None:
        return reference.update(x, vec, outputs, projected)
    return torch.ops.mspt.update(x, vec, outputs, projected)


def _run(function, inputs, results):
    n, channels = inputs[0].shape
    tensors = [tensor.contiguous() for tensor in inputs]
    half = inputs[0].dtype == torch.bfloat16
    build.call("update", function, [*tensors, *results], n, channels, half, torch.get_num_threads())
    return results


def _forward(x, vec, outputs, projected):
    return _run("update_forward", (x, vec, outputs, projected), (torch.empty_like(x), torch.empty_like(vec)))


def _backward(g_x, g_vec, outputs, projected):
    results = torch.empty_like(outputs), torch.empty_like(projected)
    return _run("update_backward", (g_x, g_vec, outputs, projected), results)


def _meaning(outputs, projected):
    """What the gradients of outputs and projected depend on."""
    n, channels = outputs.shape[0], outputs.shape[1] // 3
    return reference.update(outputs.new_zeros(n, channels), outputs.new_zeros(n, 3, channels), outputs, projected)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[2:])


def _gradient(ctx, g_x, g_vec):
    return g_x, g_vec, *torch.ops.mspt.update_backward(g_x, g_vec, *ctx.saved_tensors)


LIBRARY.impl("update", _forward, "CPU")
LIBRARY.impl("update_backward", _backward, "CPU")
torch.library.register_autograd("mspt::update", _gradient, setup_context=_keep)
register_second("update_backward", _meaning, results=2, tensors=2)


@torch.library.register_fake("mspt::update")
def _(x, vec, outputs, projected):
    return torch.empty_like(x), torch.empty_like(vec)


@torch.library.register_fake("mspt::update_backward")
def _(g_x, g_vec, outputs, projected):
    return torch.empty_like(outputs), torch.empty_like(projected)
