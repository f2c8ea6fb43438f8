"""The message pass in C++: forward, backward and second derivative of the operators in operators.py."""

import ctypes

import torch
from torch.nn.functional import pad

from mspt import native
from mspt.kernels import operators, reference, spline
from mspt.kernels.cpu import build

WIDTHS = (8, 16, 32, 64)  # of a head that the kernels are compiled for


class Inputs(ctypes.Structure):
    """struct Inputs of attention.cpp."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("atoms", "heads", "width", "rows", "pairs", "tiles", "margin")],
        *[(name, ctypes.c_int64) for name in ("half", "direct", "fading", "threads")],
        *[(name, ctypes.c_int64) for name in ("atom_stride", "head_stride")],
        *[(name, ctypes.c_void_p) for name in ("qkv", "vec", "table", "coordinate", "fade", "direction")],
        *[(name, ctypes.c_void_p) for name in ("own_ptr", "atom_ptr", "atom", "pair_ptr", "pair", "in_ptr", "in_atom")],
        *[(name, ctypes.c_void_p) for name in ("in_pair", "out_ptr", "out_atom", "out_pair")],
        *[(name, ctypes.c_void_p) for name in ("h_qkv", "h_vec", "h_table", "h_geometry")],
    ]


class Gradients(ctypes.Structure):
    """struct Gradients of attention.cpp."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("scalars", "vectors", "qkv", "vec", "table", "geometry", "query")],
        ("groups", ctypes.c_int64),
    ]


def radius_graph_attention(qkv, vec, table, graph, geometry, vector_cutoff):
    """reference.radius_graph_attention."""
    width = qkv.shape[2] // 5
    if width in WIDTHS and graph.plan:
        return operators.attention(qkv, vec, table, graph, geometry, vector_cutoff)
    wider = next((w for w in WIDTHS if w > width), None)
    if wider is None or not graph.plan:  # heads too wide, or a graph of the reference's
        return reference.radius_graph_attention(qkv, vec, table, graph, geometry, vector_cutoff)
    # Channels of zeros change nothing.
    heads = qkv.shape[1]

    def widen(tensor, parts):
        return pad(tensor.unflatten(-1, (parts, width)), (0, wider - width)).flatten(-2)

    wide_vec = None if vec is None else widen(vec, heads)
    scalars, vectors = operators.attention(widen(qkv, 5), wide_vec, widen(table, 4), graph, geometry, vector_cutoff)
    return tuple(out.unflatten(-1, (heads, wider))[..., :width].flatten(-2) for out in (scalars, vectors))


def _inputs(qkv, vec, table, coordinate, fade, direction, source, ptr, pair, plan, vector_cutoff, tangents=None):
    n, heads, width = qkv.shape
    own_ptr = plan[0]
    address = [None if t is None else t.data_ptr() for t in (qkv, vec, table, coordinate, fade, direction, *plan)]
    tangent = [None if t is None else t.data_ptr() for t in tangents or (None,) * 4]
    sizes = (n, heads, width // 5, table.shape[1], len(fade), len(own_ptr) - 1, spline.MARGIN)
    flags = (qkv.dtype == torch.bfloat16, coordinate is None, vector_cutoff, torch.get_num_threads())
    return Inputs(*sizes, *flags, *qkv.stride()[:2], *address, *tangent)


def _forward(inputs, qkv, dual):
    n, heads, width = qkv.shape
    scalars = qkv.new_empty(n, heads * (width // 5))
    vectors = qkv.new_empty(n, 3, heads * (width // 5))
    run = build.load("attention").attention_forward
    run(ctypes.byref(inputs), int(dual), native.pointer(scalars), native.pointer(vectors))
    return scalars, vectors


def _backward(inputs, g_scalars, g_vectors, qkv, vec, table, fade, plan, moving, dual):
    heads, threads = qkv.shape[1], torch.get_num_threads()
    g_qkv, g_vec, g_table, g_geometry = operators.empty_gradients(qkv, vec, table, fade, moving)
    # A molecule cut into tiles has atoms that belong to several: their queries are added up aside.
    own_ptr, _, atom, *_ = plan
    query = g_qkv.new_zeros(len(qkv), heads * qkv.shape[2] // 5, dtype=torch.float32) if len(atom) > len(qkv) else None
    # A thread takes whole heads; where there are more threads, tiles are shared out too, each with a table of its own.
    groups = 1 if query is not None else max(1, min(-(-threads // heads), len(own_ptr) - 1))
    tables = g_table if groups == 1 else table.new_empty(groups, *table.shape)
    geometries = fade.new_zeros(threads, len(fade), 5) if moving else None
    addresses = [
        None if t is None else t.data_ptr()
        for t in (g_scalars, g_vectors, g_qkv, None if vec is None else g_vec, tables, geometries, query)
    ]
    gradients = Gradients(*addresses, groups)
    build.load("attention").attention_backward(ctypes.byref(inputs), int(dual), ctypes.byref(gradients))
    if groups > 1:
        torch.sum(tables, 0, out=g_table)
    if moving:
        torch.sum(geometries, 0, out=g_geometry)
    return g_qkv, g_vec, g_table, g_geometry


def attention(*arguments):
    return _forward(_inputs(*arguments), arguments[0], dual=False)


def attention_backward(g_scalars, g_vectors, *arguments):
    *arguments, moving = arguments
    qkv, vec, table, _, fade, *_, plan, _ = arguments
    return _backward(_inputs(*arguments), g_scalars, g_vectors, qkv, vec, table, fade, plan, moving, dual=False)


def attention_second(h_qkv, h_vec, h_table, h_geometry, g_scalars, g_vectors, *arguments):
    qkv, vec, table, _, fade, *_, plan, _ = arguments
    h_qkv = torch.empty_like(qkv).copy_(h_qkv)  # laid out as qkv is
    inputs = _inputs(*arguments, tangents=(h_qkv, None if vec is None else h_vec, h_table, h_geometry))
    # Gradients of g_scalars and g_vectors are the derivative of the outputs; h_vec meets vec, which is added to them.
    outputs = _forward(inputs, qkv, dual=True)
    return *outputs, *_backward(inputs, g_scalars, g_vectors, qkv, vec, table, fade, plan, moving=True, dual=True)


operators.implement("attention", "CPU", attention)
operators.implement("attention_backward", "CPU", attention_backward)
operators.implement("attention_second", "CPU", attention_second)
