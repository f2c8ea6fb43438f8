"""PaiNN's message pass in C++: one pass over the edges each way, nothing of size [edges, F] in memory."""

import torch

from mspt.kernels import reference
from mspt.kernels.cpu import build
from mspt.kernels.operators import LIBRARY
from mspt.kernels.second import register_second

# vec is empty where it stands for zeros.
INPUTS = "Tensor sent, Tensor vec, Tensor filters, Tensor direction, Tensor source, Tensor ptr, Tensor pair"
LIBRARY.define(f"filtered_messages({INPUTS}) -> (Tensor scalars, Tensor vectors)")
LIBRARY.define(
    f"filtered_messages_backward(Tensor g_scalars, Tensor g_vectors, {INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def filtered_messages(sent, vec, filters, graph, direction):
    """reference.filtered_messages."""
    if sent.dtype != torch.float32:  # PaiNN hands over float32, whatever its weights are
        return reference.filtered_messages(sent, vec, filters, graph, direction)
    vec = sent.new_empty(0, 3, sent.shape[1] // 3) if vec is None else vec
    return torch.ops.mspt.filtered_messages(sent, vec, filters, direction, graph.source, graph.ptr, graph.pair)


def _rows(filters):
    """With what lies side by side in a row, and the distance of rows."""
    filters = filters if filters.stride(1) == 1 else filters.contiguous()
    return filters, filters.stride(0)


def _forward(sent, vec, filters, direction, source, ptr, pair):
    n, channels = sent.shape[0], sent.shape[1] // 3
    (filters, stride), results = _rows(filters), (sent.new_empty(n, channels), sent.new_empty(n, 3, channels))
    own = [tensor.contiguous() for tensor in (sent, vec)]
    given = [*own, filters, direction.contiguous(), source, ptr, pair, *results]
    numbers = (n, channels, stride, len(vec) > 0, torch.get_num_threads())
    build.call("filtered_messages", "filtered_messages_forward", given, *numbers)
    return results


def _backward(g_scalars, g_vectors, sent, vec, filters, direction, source, ptr, pair):
    n, channels = sent.shape[0], sent.shape[1] // 3
    shapes = (sent.shape, vec.shape, filters.shape, direction.shape)
    (filters, stride), results = _rows(filters), tuple(sent.new_empty(shape) for shape in shapes)
    own = [tensor.contiguous() for tensor in (g_scalars, g_vectors, sent, vec)]
    given = [*own, filters, direction.contiguous(), source, ptr, pair, *results]
    numbers = (n, channels, len(direction), stride, len(vec) > 0, torch.get_num_threads())
    build.call("filtered_messages", "filtered_messages_backward", given, *numbers)
    return results


def _meaning(sent, vec, filters, direction, source, ptr, pair):
    target = torch.repeat_interleave(torch.arange(len(ptr) - 1), ptr.diff())
    graph = reference.Graph(source, target, ptr, pair, None, None)
    return reference.filtered_messages(sent, vec if len(vec) else None, filters, graph, direction)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, g_scalars, g_vectors):
    return *torch.ops.mspt.filtered_messages_backward(g_scalars, g_vectors, *ctx.saved_tensors), None, None, None


LIBRARY.impl("filtered_messages", _forward, "CPU")
LIBRARY.impl("filtered_messages_backward", _backward, "CPU")
torch.library.register_autograd("mspt::filtered_messages", _gradient, setup_context=_keep)
register_second("filtered_messages_backward", _meaning, results=2, tensors=4)


@torch.library.register_fake("mspt::filtered_messages")
def _(sent, vec, filters, direction, source, ptr, pair):
    n, channels = sent.shape[0], sent.shape[1] // 3
    return sent.new_empty(n, channels), sent.new_empty(n, 3, channels)


@torch.library.register_fake("mspt::filtered_messages_backward")
def _(g_scalars, g_vectors, sent, vec, filters, direction, source, ptr, pair):
    return tuple(sent.new_empty(tensor.shape) for tensor in (sent, vec, filters, direction))
