"""The whitened vector norm on CPUs, as an operator of torch. The kernel: whiten.cpp."""

import torch

from mspt.kernels import reference
from mspt.kernels.cpu import build
from mspt.kernels.operators import LIBRARY
from mspt.kernels.second import register_second

LIBRARY.define("whiten(Tensor vec, Tensor weight, float[] regular) -> (Tensor result, Tensor saved)")
LIBRARY.define(
    "whiten_backward(Tensor gradient, Tensor vec, Tensor weight, Tensor saved, float[] regular) "
    "-> (Tensor to_vec, Tensor to_weight)"
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


@torch.library.register_fake("mspt::whiten", lib=LIBRARY)
def _fake_forward(vec, weight, regular):
    return _empty(vec)


@torch.library.register_fake("mspt::whiten_backward", lib=LIBRARY)
def _fake_backward(gradient, vec, weight, saved, regular):
    contiguous = torch.contiguous_format
    return torch.empty_like(vec, memory_format=contiguous), torch.empty_like(weight, memory_format=contiguous)


def _setup(ctx, inputs, output):
    vec, weight, ctx.regular = inputs
    ctx.save_for_backward(vec, weight, output[1])


def _differentiate(ctx, gradient, _):
    return *torch.ops.mspt.whiten_backward(gradient, *ctx.saved_tensors, ctx.regular), None


torch.library.register_autograd("mspt::whiten", _differentiate, setup_context=_setup, lib=LIBRARY)
register_second(
    "whiten_backward", lambda vec, weight, saved, regular: reference.whiten(vec, weight, regular), results=1, tensors=2
)
