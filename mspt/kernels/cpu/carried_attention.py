"""Attention with scores carried over layers on CPUs, as an operator of torch. The kernel: carried_attention.cpp."""

import ctypes

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mspt import native
from mspt.kernels import reference
from mspt.kernels.cpu import build
from mspt.kernels.operators import LIBRARY
from mspt.kernels.second import gradients_of_gradients

LIBRARY.define(
    "carried_attention(Tensor[] queries, Tensor[] keys, Tensor values, Tensor? mask) -> (Tensor result, Tensor norm)"
)
LIBRARY.define(
    "carried_attention_backward(Tensor gradient, Tensor[] queries, Tensor[] keys, Tensor values, Tensor? mask, "
    "Tensor norm) -> Tensor[]"
)


def carried_score_attention(queries, keys, values, mask):
    """As reference.carried_score_attention, which also serves what is neither float32 nor bfloat16 throughout."""
    types = {tensor.dtype for tensor in (*queries, *keys, values)}
    if types not in ({torch.float32}, {torch.bfloat16}):
        return reference.carried_score_attention(queries, keys, values, mask)
    return torch.ops.mspt.carried_attention(list(queries), list(keys), values, mask)[0]


def _call(back, tensors, mask, norm, layers):
    """Call the kernel. tensors [m, T, H, D] in its order, the last dimension contiguous."""
    m, tokens, heads, width = tensors[0].shape
    addresses = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    build.load("carried_attention").carried_attention(
        ctypes.c_int(back),
        ctypes.c_int(tensors[0].dtype == torch.bfloat16),
        ctypes.c_int(torch.get_num_threads()),
        *map(ctypes.c_int64, (m, tokens, heads, width, layers)),
        addresses,
        (ctypes.c_int64 * len(strides))(*strides),
        None if mask is None else native.pointer(mask),
        native.pointer(norm),
    )


def _rows(*tensors):
    """The tensors, copied where their last dimension is not contiguous."""
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def _empty(values):
    """A result, and of every query what makes scores probabilities, [m, H, 2, T]; not yet filled."""
    m, tokens, heads, _ = values.shape
    result = torch.empty_like(values, memory_format=torch.contiguous_format)
    return result, values.new_empty(m, heads, 2, tokens, dtype=torch.float32)


def _empty_gradients(queries, values):
    """Gradients to queries, keys and values, not yet filled."""
    return [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(2 * len(queries) + 1)]


@torch.library.impl(LIBRARY, "carried_attention", "CPU")
def _forward(queries, keys, values, mask):
    result, norm = _empty(values)
    mask = None if mask is None else mask.contiguous()
    _call(False, [*_rows(*queries, *keys, values), result], mask, norm, len(queries))
    return result, norm


@torch.library.impl(LIBRARY, "carried_attention_backward", "CPU")
def _backward(gradient, queries, keys, values, mask, norm):
    gradients = _empty_gradients(queries, values)
    mask = None if mask is None else mask.contiguous()
    _call(True, [*_rows(*queries, *keys, values, gradient), *gradients], mask, norm.contiguous(), len(queries))
    return gradients


@torch.library.register_fake("mspt::carried_attention", lib=LIBRARY)
def _fake_forward(queries, keys, values, mask):
    return _empty(values)


@torch.library.register_fake("mspt::carried_attention_backward", lib=LIBRARY)
def _fake_backward(gradient, queries, keys, values, mask, norm):
    return _empty_gradients(queries, values)


def _split(heads):
    """Queries, keys and values out of one list."""
    layers = len(heads) // 2
    return list(heads[:layers]), list(heads[layers:-1]), heads[-1]


def _setup(ctx, inputs, output):
    queries, keys, values, mask = inputs
    ctx.save_for_backward(*queries, *keys, values, mask, output[1])


def _differentiate(ctx, gradient, _):
    *heads, mask, norm = ctx.saved_tensors
    gradients = torch.ops.mspt.carried_attention_backward(gradient, *_split(heads), mask, norm)
    return *_split(gradients), None


def _setup_backward(ctx, inputs, output):
    gradient, queries, keys, values, mask, _ = inputs
    ctx.save_for_backward(gradient, *queries, *keys, values, mask)


def _differentiate_backward(ctx, gradients):
    gradient, *heads, mask = ctx.saved_tensors
    with sdpa_kernel(SDPBackend.MATH):  # the one that can be differentiated twice
        to_gradient, to_heads = gradients_of_gradients(
            lambda *parts: reference.carried_score_attention(*_split(parts), mask), heads, [gradient], gradients
        )
    return to_gradient[0], *_split(to_heads), None, None


torch.library.register_autograd("mspt::carried_attention", _differentiate, setup_context=_setup, lib=LIBRARY)
torch.library.register_autograd(
    "mspt::carried_attention_backward", _differentiate_backward, setup_context=_setup_backward, lib=LIBRARY
)
