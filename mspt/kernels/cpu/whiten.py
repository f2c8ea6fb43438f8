"""The whitened vector norm on CPUs, as an operator of torch. The kernel: whiten.cpp."""

import torch

from mspt.kernels import reference
from mspt.kernels.cpu import build
from mspt.kernels.operators import LIBRARY

LIBRARY.define("whiten(Tensor vec, Tensor weight, float[] regular) -> (Tensor result, Tensor saved)")
LIBRARY.define(
    "whiten_backward(Tensor gradient, Tensor vec, Tensor weight, Tensor saved, float[] regular) "
    "-> (Tensor to_vec, Tensor to_weight)"
)
# h_*: gradients that meet the two results above.
LIBRARY.define(
    "whiten_second(Tensor h_vec, Tensor h_weight, Tensor gradient, Tensor vec, Tensor weight, Tensor saved) "
    "-> (Tensor to_gradient, Tensor to_vec, Tensor to_weight)"
)


def whiten(vec, weight, regular):
    """As reference.whiten, which also serves what is neither float32 nor bfloat16 throughout."""
    if vec.dtype != weight.dtype or vec.dtype not in (torch.float32, torch.bfloat16):
        return reference.whiten(vec, weight, regular)
    return torch.ops.mspt.whiten(vec, weight, list(regular))[0]


def _empty(vec):
    """A result, and what is saved of every atom: eigenvalues, eigenvectors and means; not yet filled."""
    result = torch.empty_like(vec, memory_format=torch.contiguous_format)
    return result, vec.new_empty(len(vec), 15, dtype=torch.float64)


def _call(function, tensors, vec):
    n, _, channels = vec.shape
    build.call("whiten", function, tensors, n, channels, vec.dtype == torch.bfloat16, torch.get_num_threads())


@torch.library.impl(LIBRARY, "whiten", "CPU")
def _forward(vec, weight, regular):
    result, saved = _empty(vec)
    added = torch.tensor(regular, dtype=torch.float64)
    _call("whiten", (vec.contiguous(), weight.contiguous(), added, result, saved), vec)
    return result, saved


@torch.library.impl(LIBRARY, "whiten_backward", "CPU")
def _backward(gradient, vec, weight, saved, regular):
    tensors = [tensor.contiguous() for tensor in (gradient, vec, weight, saved)]
    results = torch.empty_like(tensors[1]), torch.empty_like(tensors[2])
    _call("whiten_backward", (*tensors, *results), vec)
    return results


@torch.library.impl(LIBRARY, "whiten_second", "CPU")
def _second(h_vec, h_weight, gradient, vec, weight, saved):
    tensors = [tensor.contiguous() for tensor in (h_vec, h_weight, gradient, vec, weight, saved)]
    results = [torch.empty_like(tensors[at]) for at in (2, 3, 4)]
    _call("whiten_second", (*tensors, *results), vec)
    return tuple(results)


@torch.library.register_fake("mspt::whiten", lib=LIBRARY)
def _fake_forward(vec, weight, regular):
    return _empty(vec)


@torch.library.register_fake("mspt::whiten_backward", lib=LIBRARY)
def _fake_backward(gradient, vec, weight, saved, regular):
    contiguous = torch.contiguous_format
    return torch.empty_like(vec, memory_format=contiguous), torch.empty_like(weight, memory_format=contiguous)


@torch.library.register_fake("mspt::whiten_second", lib=LIBRARY)
def _fake_second(h_vec, h_weight, *given):
    return tuple(torch.empty_like(given[at], memory_format=torch.contiguous_format) for at in range(3))


def _setup(ctx, inputs, output):
    vec, weight, ctx.regular = inputs
    ctx.save_for_backward(vec, weight, output[1])


def _differentiate(ctx, gradient, _):
    return *torch.ops.mspt.whiten_backward(gradient, *ctx.saved_tensors, ctx.regular), None


def _setup_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-1])


def _differentiate_backward(ctx, h_vec, h_weight):
    # What is saved of the forward pass is known by vec: it has no gradient of its own.
    return *torch.ops.mspt.whiten_second(h_vec, h_weight, *ctx.saved_tensors), None, None


torch.library.register_autograd("mspt::whiten", _differentiate, setup_context=_setup, lib=LIBRARY)
torch.library.register_autograd(
    "mspt::whiten_backward", _differentiate_backward, setup_context=_setup_backward, lib=LIBRARY
)
