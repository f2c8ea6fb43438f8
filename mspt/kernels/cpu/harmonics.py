"""Real spherical harmonics in C++: one pass over the vectors each way."""

from functools import cache

import torch

from mspt.kernels import reference
from mspt.kernels.cpu import build
from mspt.kernels.harmonics import norms
from mspt.kernels.operators import LIBRARY
from mspt.kernels.second import register_second

LIBRARY.define("spherical_harmonics(Tensor seen, int degrees) -> Tensor")
LIBRARY.define("spherical_harmonics_backward(Tensor gradient, Tensor seen, int degrees) -> Tensor")


def spherical_harmonics(seen, degrees, dtype):
    """reference.spherical_harmonics."""
    return torch.ops.mspt.spherical_harmonics(seen, degrees).to(dtype)


@cache
def _norms(degrees):
    """norms as a tensor, zero where the order is above the degree."""
    rows = torch.zeros(degrees, degrees, dtype=torch.float64)
    for degree, row in enumerate(norms(degrees)):
        rows[degree, : degree + 1] = torch.tensor(row, dtype=torch.float64)
    return rows


def _forward(seen, degrees):
    values = seen.new_empty(seen.shape[1], degrees**2, dtype=torch.float32)
    tensors = seen.contiguous(), _norms(degrees), values
    build.call("harmonics", "harmonics_forward", tensors, seen.shape[1], degrees, torch.get_num_threads())
    return values


def _backward(gradient, seen, degrees):
    result = seen.new_empty(seen.shape)
    tensors = gradient.contiguous(), seen.contiguous(), _norms(degrees), result
    build.call("harmonics", "harmonics_backward", tensors, seen.shape[1], degrees, torch.get_num_threads())
    return result


def _meaning(seen, degrees):
    return reference.spherical_harmonics(seen, degrees, torch.float32)


def _keep(ctx, inputs, output):
    seen, ctx.degrees = inputs
    ctx.save_for_backward(seen)


def _gradient(ctx, gradient):
    return torch.ops.mspt.spherical_harmonics_backward(gradient, *ctx.saved_tensors, ctx.degrees), None


LIBRARY.impl("spherical_harmonics", _forward, "CPU")
LIBRARY.impl("spherical_harmonics_backward", _backward, "CPU")
torch.library.register_autograd("mspt::spherical_harmonics", _gradient, setup_context=_keep)
register_second("spherical_harmonics_backward", _meaning, results=1, tensors=1)


@torch.library.register_fake("mspt::spherical_harmonics")
def _(seen, degrees):
    return seen.new_empty(seen.shape[1], degrees**2, dtype=torch.float32)


@torch.library.register_fake("mspt::spherical_harmonics_backward")
def _(gradient, seen, degrees):
    return seen.new_empty(seen.shape)
