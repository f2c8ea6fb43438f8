"""The message pass as an operator of PyTorch: shapes, gradients and second derivatives, on any device.

mspt::attention, its gradient mspt::attention_backward and the gradient of that, mspt::attention_second, each call what
an implementation registers for its device. All take the same arguments:

    qkv [n, H, 5D], vec [n, 3, F] or None for zeros, table [H, rows, 4D] float32
    coordinate [P] float64 or None, fade [P] and direction [P, 3] float32: of the pairs (reference.Geometry)
    source [e], ptr [n + 1], pair [e], plan: of the edges (reference.Graph)
    vector_cutoff: as reference.radius_graph_attention
"""

from functools import partial

import torch

INPUTS = (
    "Tensor qkv, Tensor? vec, Tensor table, Tensor? coordinate, Tensor fade, Tensor direction, "
    "Tensor source, Tensor ptr, Tensor pair, Tensor[] plan, bool vector_cutoff"
)
LIBRARY = torch.library.Library("mspt", "FRAGMENT")
# The interpreted twins are for tensors on the CPU in Triton's interpreter: attention itself is the C++ kernels' there.
FORMS = ("", "_interpreted")
for form in FORMS:
    LIBRARY.define(f"attention{form}({INPUTS}) -> (Tensor scalars, Tensor vectors)")
    # Gradients of qkv, vec (empty without vec), table, and of the geometry [P, 5]: coordinate, fade, direction (empty
    # unless asked for).
    LIBRARY.define(
        f"attention_backward{form}(Tensor g_scalars, Tensor g_vectors, {INPUTS}, bool moving) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )
    # h_*: gradients that meet the four results above -> gradients of g_scalars, g_vectors, qkv, vec, table and
    # geometry.
    LIBRARY.define(
        f"attention_second{form}(Tensor h_qkv, Tensor h_vec, Tensor h_table, Tensor h_geometry, Tensor g_scalars, "
        f"Tensor g_vectors, {INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )


def implement(name, device, function):
    """Let function run the operator of this name for tensors on a device ("CPU" or "CUDA")."""
    LIBRARY.impl(name, function, device)


def attention(qkv, vec, table, graph, geometry, vector_cutoff, form=""):
    """reference.radius_graph_attention by the operator of one of FORMS."""
    coordinate = None if geometry.coordinate is None else geometry.coordinate.contiguous()
    # The C++ kernels take qkv head by head in memory too, as linear gives it.
    by_head = qkv.device.type == "cpu" and not form and qkv.transpose(0, 1).is_contiguous()
    return _operator("attention", form)(
        qkv if by_head else qkv.contiguous(),
        None if vec is None else vec.contiguous(),
        table.contiguous(),
        coordinate,
        geometry.fade.float().contiguous(),
        geometry.direction.float().contiguous(),
        graph.source,
        graph.ptr,
        graph.pair,
        list(graph.plan),
        vector_cutoff,
    )


def _operator(name, form):
    return getattr(torch.ops.mspt, name + form)


def empty_gradients(qkv, vec, table, fade, moving):
    """Where the gradients of qkv, vec, table and geometry go, not yet filled."""
    return (
        torch.empty_like(qkv),
        torch.empty_like(vec) if vec is not None else qkv.new_empty(0),
        torch.empty_like(table),
        fade.new_empty((len(fade), 5) if moving else 0),
    )


def _fake(qkv, vec, table, coordinate, fade, direction, source, ptr, pair, plan, vector_cutoff):
    n, heads, width = qkv.shape
    channels = heads * (width // 5)
    return qkv.new_empty(n, channels), qkv.new_empty(n, 3, channels)


def _fake_backward(
    g_scalars, g_vectors, qkv, vec, table, coordinate, fade, direction, source, ptr, pair, plan, vector_cutoff, moving
):
    return empty_gradients(qkv, vec, table, fade, moving)


def _fake_second(h_qkv, h_vec, h_table, h_geometry, g_scalars, g_vectors, qkv, vec, table, coordinate, fade, *rest):
    return torch.empty_like(g_scalars), torch.empty_like(g_vectors), *empty_gradients(qkv, vec, table, fade, True)


def _keep(ctx, inputs, output):
    *tensors, plan, ctx.vector_cutoff = inputs
    ctx.save_for_backward(*tensors, *plan)


def _restore(ctx, count):
    """The saved tensors as the operators take them: count of them one by one, the rest as the plan."""
    return (*ctx.saved_tensors[:count], list(ctx.saved_tensors[count:]), ctx.vector_cutoff)


def split(geometry, coordinate):
    """The gradient of the geometry [P, 5] -> of coordinate (None without), fade and direction."""
    return None if coordinate is None else geometry[:, 0].double(), geometry[:, 1], geometry[:, 2:]


def _no_gradient(plan):
    """In place of gradients of source, ptr, pair and the plan."""
    return None, None, None, [None] * len(plan)


def _backward(form, ctx, g_scalars, g_vectors):
    inputs = _restore(ctx, 9)
    vec, coordinate, plan = inputs[1], inputs[3], inputs[9]
    moving = any(ctx.needs_input_grad[3:6])
    g_qkv, g_vec, g_table, g_geometry = _operator("attention_backward", form)(
        g_scalars.contiguous(), g_vectors.contiguous(), *inputs, moving
    )
    geometry = split(g_geometry, coordinate) if moving else (None, None, None)
    return g_qkv, None if vec is None else g_vec, g_table, *geometry, *_no_gradient(plan), None


def _keep_backward(ctx, inputs, output):
    *tensors, plan, ctx.vector_cutoff, ctx.moving = inputs
    ctx.save_for_backward(*tensors, *plan)


def _second(form, ctx, h_qkv, h_vec, h_table, h_geometry):
    inputs = _restore(ctx, 11)
    vec, coordinate, fade, plan = inputs[3], inputs[5], inputs[6], inputs[11]
    if not ctx.moving:
        h_geometry = fade.new_zeros(len(fade), 5)
    heads = [h.contiguous() for h in (h_qkv, h_vec, h_table, h_geometry)]
    gg_scalars, gg_vectors, g_qkv, g_vec, g_table, g_geometry = _operator("attention_second", form)(*heads, *inputs)
    vec_gradient = None if vec is None else g_vec
    geometry = split(g_geometry, coordinate)
    return gg_scalars, gg_vectors, g_qkv, vec_gradient, g_table, *geometry, *_no_gradient(plan), None, None


for form in FORMS:
    torch.library.register_fake(f"mspt::attention{form}", _fake)
    torch.library.register_fake(f"mspt::attention_backward{form}", _fake_backward)
    torch.library.register_fake(f"mspt::attention_second{form}", _fake_second)
    torch.library.register_autograd(f"mspt::attention{form}", partial(_backward, form), setup_context=_keep)
    torch.library.register_autograd(
        f"mspt::attention_backward{form}", partial(_second, form), setup_context=_keep_backward
    )
