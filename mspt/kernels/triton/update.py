"""The layer's update of scalars and vectors in one pass over their elements, and its gradient in another.

Legend: n atoms, F channels; u1, u2, u3 the three parts of projected, o1, o2, o3 those of outputs.
"""

import torch
import triton
import triton.language as tl

from mspt.kernels import reference
from mspt.kernels.triton.fused import fused
from mspt.kernels.triton.launch import launch

BLOCK = 256


@triton.jit
def update_kernel(x, vec, outputs, projected, x_out, vec_out, size, F: tl.constexpr, BLOCK: tl.constexpr):
    """x [n, F], vec [n, 3, F], outputs [n, 3F], projected [n, 3, 3F] -> x_out, vec_out; size: n F."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    atom, channel = place // F, place % F
    outputs += atom * 3 * F + channel
    o1 = tl.load(outputs, mask=inside, other=0.0).to(tl.float32)
    o2 = tl.load(outputs + F, mask=inside, other=0.0).to(tl.float32)
    o3 = tl.load(outputs + 2 * F, mask=inside, other=0.0).to(tl.float32)
    product = tl.zeros((BLOCK,), tl.float32)
    for axis in tl.static_range(3):
        u = projected + (atom * 3 + axis) * 3 * F + channel
        u1 = tl.load(u, mask=inside, other=0.0).to(tl.float32)
        u2 = tl.load(u + F, mask=inside, other=0.0).to(tl.float32)
        u3 = tl.load(u + 2 * F, mask=inside, other=0.0).to(tl.float32)
        product += u1 * u2
        at = (atom * 3 + axis) * F + channel
        value = tl.load(vec + at, mask=inside, other=0.0).to(tl.float32) + u3 * o1
        tl.store(vec_out + at, value.to(vec_out.dtype.element_ty), mask=inside)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) + product * o2 + o3
    tl.store(x_out + place, value.to(x_out.dtype.element_ty), mask=inside)


@triton.jit
def update_backward_kernel(
    g_x, g_vec, outputs, projected, g_outputs, g_projected, size, F: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradients of outputs and projected; those of x and vec are g_x and g_vec themselves."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    atom, channel = place // F, place % F
    o1 = tl.load(outputs + atom * 3 * F + channel, mask=inside, other=0.0).to(tl.float32)
    o2 = tl.load(outputs + atom * 3 * F + channel + F, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_x + place, mask=inside, other=0.0).to(tl.float32)
    g_o1 = tl.zeros((BLOCK,), tl.float32)
    product = tl.zeros((BLOCK,), tl.float32)
    for axis in tl.static_range(3):
        at = (atom * 3 + axis) * 3 * F + channel
        u1 = tl.load(projected + at, mask=inside, other=0.0).to(tl.float32)
        u2 = tl.load(projected + at + F, mask=inside, other=0.0).to(tl.float32)
        u3 = tl.load(projected + at + 2 * F, mask=inside, other=0.0).to(tl.float32)
        g_v = tl.load(g_vec + (atom * 3 + axis) * F + channel, mask=inside, other=0.0).to(tl.float32)
        product += u1 * u2
        g_o1 += g_v * u3
        tl.store(g_projected + at, (g * o2 * u2).to(g_projected.dtype.element_ty), mask=inside)
        tl.store(g_projected + at + F, (g * o2 * u1).to(g_projected.dtype.element_ty), mask=inside)
        tl.store(g_projected + at + 2 * F, (g_v * o1).to(g_projected.dtype.element_ty), mask=inside)
    g_outputs += atom * 3 * F + channel
    tl.store(g_outputs, g_o1.to(g_outputs.dtype.element_ty), mask=inside)
    tl.store(g_outputs + F, (g * product).to(g_outputs.dtype.element_ty), mask=inside)
    tl.store(g_outputs + 2 * F, g.to(g_outputs.dtype.element_ty), mask=inside)


def _forward(x, vec, outputs, projected):
    x_out, vec_out, size = torch.empty_like(x), torch.empty_like(vec), x.numel()
    grid = (triton.cdiv(size, BLOCK),)
    launch(update_kernel, grid, x, vec, outputs, projected, x_out, vec_out, size, F=x.shape[1], BLOCK=BLOCK, warps=4)
    return (x_out, vec_out), ()


def _backward(gradients, tensors, _kept):
    (g_x, g_vec), (x, _vec, outputs, projected) = gradients, tensors
    g_outputs, g_projected = torch.empty_like(outputs), torch.empty_like(projected)
    launch(
        update_backward_kernel,
        (triton.cdiv(x.numel(), BLOCK),),
        *(g_x, g_vec, outputs, projected, g_outputs, g_projected, x.numel()),
        F=x.shape[1],
        BLOCK=BLOCK,
        warps=4,
    )
    return g_x, g_vec, g_outputs, g_projected


_update = fused(_forward, _backward, reference.update)


def update(x, vec, outputs, projected):
    """reference.update."""
    if projected is None:  # one sum is left, which is PyTorch's
        return reference.update(x, vec, outputs, projected)
    return _update((x, vec, outputs, projected))
