"""PaiNN's message pass in C++ against the reference in float64: results, gradients, second derivatives."""

import pytest
import torch
from agreement import TOLERANCE, error, molecules
from cpu_levels import level, poison, threads  # noqa: F401
from torch.library import opcheck

from mspt import kernels
from mspt.kernels import reference

# sizes of molecules, channels, nearest neighbours kept, whether there are vectors
CASES = {
    "small": ((5, 1, 7), 16, 32, True),
    "no vectors": ((5, 1, 7), 16, 32, False),
    "odd width": ((12, 0, 3), 37, 32, True),
    "few neighbours": ((20, 30), 8, 4, True),
    "published width": ((18, 29, 9), 128, 32, True),
    "no edges": ((1, 1), 8, 32, True),
    "nothing": ((0,), 8, 32, True),
}


def case(sizes, channels, most, with_vec):
    """Inputs, of which filters are rows of a wider tensor as in the model, and the graph."""
    positions, ptr = molecules(sizes)
    graph = kernels.radius_graph(positions, ptr, 3.0, most, False)
    geometry = kernels.pair_geometry(positions, graph, kernels.RadialBasis(8, 3.0, None), torch.float32)
    torch.manual_seed(0)
    n, pairs = len(positions), len(graph.first)
    vec = torch.randn(n, 3, channels) if with_vec else None
    wide = torch.randn(pairs, 6 * channels)
    return (torch.randn(n, 3 * channels), vec, wide[:, 3 * channels :], geometry.direction), graph


def worst(name):
    inputs, graph = case(*CASES[name])

    def through(module):
        return lambda sent, vec, filters, direction: module.filtered_messages(sent, vec, filters, graph, direction)

    poison(inputs[0].shape)
    with kernels.use("cpu"):
        return error(through(kernels), through(reference), inputs, "cpu", torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_float32(name):
    assert worst(name) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["small", "odd width", "published width"])
def test_every_instruction_set(level, name):  # noqa: F811
    assert worst(name) < TOLERANCE[torch.float32]


def everything(inputs, graph):
    """Results and gradients by the C++ kernels."""
    leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
    with kernels.use("cpu"):
        sent, vec, filters, direction = leaves
        outputs = kernels.filtered_messages(sent, vec, filters, graph, direction)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])]


@pytest.mark.parametrize("count", [1, 3, 16])
def test_any_number_of_threads(count):
    inputs, graph = case(*CASES["published width"])
    expected = everything(inputs, graph)
    with threads(count):
        found, again = everything(inputs, graph), everything(inputs, graph)
    for one, other, truth in zip(found, again, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, truth, rtol=1e-5, atol=1e-5)


def test_inputs_need_not_be_contiguous():
    inputs, graph = case(*CASES["small"])
    strided = [torch.stack([x, x], -1)[..., 0] for x in inputs]
    for one, other in zip(everything(inputs, graph), everything(strided, graph), strict=True):
        assert torch.equal(one, other)


def test_not_a_number_stays_one():
    (sent, *rest), graph = case(*CASES["small"])
    sent[0, 0] = torch.nan
    scalars = everything((sent, *rest), graph)[0]
    heard = graph.target[graph.source == 0]
    assert len(heard) and scalars[heard, 0].isnan().all() and scalars[:, 1:].isfinite().all()


@pytest.mark.parametrize("name", ["small", "no vectors"])
def test_operators_are_what_they_declare(name):
    (sent, vec, filters, direction), graph = case(*CASES[name])
    vec = sent.new_empty(0, 3, 16) if vec is None else vec
    inputs = [x.requires_grad_() for x in (sent, vec, filters, direction)]
    inputs += [graph.source, graph.ptr, graph.pair]
    opcheck(torch.ops.mspt.filtered_messages.default, inputs)
    outputs = [x.detach() for x in torch.ops.mspt.filtered_messages(*inputs)]
    opcheck(torch.ops.mspt.filtered_messages_backward.default, (*outputs, *inputs))
