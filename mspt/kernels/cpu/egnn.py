"""EGNN's layer between its matrix products in C++: one pass over the edges for each order of derivatives."""

import torch

from mspt.kernels import reference
from mspt.kernels.cpu import build
from mspt.kernels.operators import LIBRARY

# Four tensors that have gradients, then the edges.
EDGE_FEATURES = "Tensor target, Tensor source, Tensor along, Tensor squared, Tensor from_atom, Tensor ptr"
GATED_SUMS = "Tensor x, Tensor weight, Tensor bias, Tensor fade, Tensor ptr"
FOUR = "Tensor, Tensor, Tensor, Tensor"


def edge_features(target, source, along, squared, graph):
    """reference.edge_features."""
    if not target.dtype == along.dtype == squared.dtype == torch.float32:
        return reference.edge_features(target, source, along, squared, graph)
    return torch.ops.mspt.edge_features(target, source, along, squared, graph.source, graph.ptr)


def gated_sums(x, weight, bias, fade, graph):
    """reference.gated_sums."""
    if not x.dtype == weight.dtype == fade.dtype == torch.float32:
        return reference.gated_sums(x, weight, bias, fade, graph)
    return torch.ops.mspt.gated_sums(x, weight, bias, fade, graph.ptr)


def _call(function, inputs, results, ptr, channels):
    tensors = [tensor.contiguous() for tensor in inputs]
    build.call("egnn", function, [*tensors, *results], len(ptr) - 1, channels, torch.get_num_threads())


def _define(name, inputs, output):
    """An operator of four tensors and edges, its gradient, and that one's; output(*inputs): an empty result."""
    LIBRARY.define(f"{name}({inputs}) -> Tensor")
    LIBRARY.define(f"{name}_backward(Tensor g, {inputs}) -> ({FOUR})")
    # h0 to h3: gradients that meet those four -> gradients of g and of the four tensors.
    LIBRARY.define(f"{name}_second(Tensor h0, Tensor h1, Tensor h2, Tensor h3, Tensor g, {inputs}) -> (Tensor, {FOUR})")

    def gradients(*inputs):
        return tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:4])

    def forward(*inputs):
        result = output(*inputs)
        _call(f"{name}_forward", inputs, [result], inputs[-1], result.shape[1])
        return result

    def backward(g, *inputs):
        results = gradients(*inputs)
        _call(f"{name}_backward", [g, *inputs], results, inputs[-1], g.shape[1])
        return results

    def second(*tensors):
        g, inputs = tensors[4], tensors[5:]
        results = (g.new_empty(g.shape), *gradients(*inputs))
        _call(f"{name}_second", tensors, results, inputs[-1], g.shape[1])
        return results

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def gradient(ctx, g):
        inputs = ctx.saved_tensors
        found = getattr(torch.ops.mspt, f"{name}_backward")(g, *inputs)
        return *found, *[None] * (len(inputs) - 4)

    def gradient_of_gradient(ctx, *heads):
        tensors = ctx.saved_tensors
        found = getattr(torch.ops.mspt, f"{name}_second")(*heads, *tensors)
        return *found, *[None] * (len(tensors) - 5)

    for suffix, function in (("", forward), ("_backward", backward), ("_second", second)):
        LIBRARY.impl(name + suffix, function, "CPU")
    torch.library.register_autograd(f"mspt::{name}", gradient, setup_context=keep)
    torch.library.register_autograd(f"mspt::{name}_backward", gradient_of_gradient, setup_context=keep)
    torch.library.register_fake(f"mspt::{name}", output)
    torch.library.register_fake(f"mspt::{name}_backward", lambda g, *inputs: gradients(*inputs))
    torch.library.register_fake(
        f"mspt::{name}_second", lambda *tensors: (tensors[4].new_empty(tensors[4].shape), *gradients(*tensors[5:]))
    )


_define(
    "edge_features",
    EDGE_FEATURES,
    lambda target, source, along, squared, *edges: target.new_empty(len(squared), target.shape[1]),
)
_define("gated_sums", GATED_SUMS, lambda x, weight, bias, fade, ptr: x.new_empty(len(ptr) - 1, x.shape[1]))
