"""EGNN's kernels in C++ against the reference in float64: results, gradients, second derivatives."""

import pytest
import torch
from agreement import TOLERANCE, error, molecules
from cpu_levels import level, poison, threads  # noqa: F401
from torch.library import opcheck

from mspt import kernels
from mspt.kernels import reference

# sizes of molecules, channels, nearest neighbours kept
CASES = {
    "small": ((5, 1, 7), 16, 32),
    "odd width": ((12, 0, 3), 37, 32),
    "narrow": ((4, 3), 3, 32),
    "few neighbours": ((20, 30), 8, 4),
    "published width": ((18, 29, 9), 128, 64),
    "no edges": ((1, 1), 8, 32),
    "nothing": ((0,), 8, 32),
}
OPERATIONS = ("edge_features", "gated_sums")


def case(operation, sizes, channels, most):
    """The four tensors of an operation, and the graph."""
    positions, ptr = molecules(sizes)
    graph = kernels.radius_graph(positions, ptr, 3.0, most, False)
    torch.manual_seed(0)
    n, e = len(positions), len(graph.source)
    shapes = {
        "edge_features": ((n, channels), (n, channels), (channels,), (e,)),
        "gated_sums": ((e, channels), (1, channels), (1,), (e,)),
    }
    return [torch.randn(shape) for shape in shapes[operation]], graph


def through(module, operation, graph):
    return lambda *tensors: getattr(module, operation)(*tensors, graph)


def worst(operation, name):
    tensors, graph = case(operation, *CASES[name])
    poison(tensors[0].shape)
    with kernels.use("cpu"):
        functions = [through(module, operation, graph) for module in (kernels, reference)]
        return error(*functions, tensors, "cpu", torch.float32)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", CASES)
def test_float32(operation, name):
    assert worst(operation, name) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["small", "odd width", "published width"])
def test_every_instruction_set(level, operation, name):  # noqa: F811
    assert worst(operation, name) < TOLERANCE[torch.float32]


def test_mean_what_they_say():
    """The reference, one edge after another."""
    (target, source, along, squared), graph = case("edge_features", *CASES["small"])
    (x, weight, bias, fade), _ = case("gated_sums", *CASES["small"])
    silu = torch.nn.functional.silu
    sums = torch.zeros_like(target)
    assert len(squared) > 20
    features = reference.edge_features(target, source, along, squared, graph)
    for e, (i, j) in enumerate(zip(graph.target, graph.source, strict=True)):
        torch.testing.assert_close(features[e], silu(target[i] + source[j] + squared[e] * along))
        message = silu(x[e])
        sums[i] += message * torch.sigmoid(weight[0] @ message + bias[0]) * fade[e]
    torch.testing.assert_close(reference.gated_sums(x, weight, bias, fade, graph), sums)


def everything(operation, tensors, graph):
    """Results, gradients and their gradients by the C++ kernels."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    with kernels.use("cpu"):
        output = through(kernels, operation, graph)(*leaves)
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
    return [output, *first, *second]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("count", [1, 3, 16])
def test_any_number_of_threads(operation, count):
    tensors, graph = case(operation, *CASES["published width"])
    expected = everything(operation, tensors, graph)
    with threads(count):
        found, again = everything(operation, tensors, graph), everything(operation, tensors, graph)
    for one, other, truth in zip(found, again, expected, strict=True):
        assert torch.equal(one, other)
        assert (one - truth).norm() < 1e-5 * truth.norm()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_inputs_need_not_be_contiguous(operation):
    tensors, graph = case(operation, *CASES["small"])
    strided = [torch.stack([x, x], -1)[..., 0] for x in tensors]
    results = [everything(operation, given, graph) for given in (tensors, strided)]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_not_a_number_stays_one():
    (target, source, *rest), graph = case("edge_features", *CASES["small"])
    source[0, 0] = torch.nan
    features = everything("edge_features", (target, source, *rest), graph)[0]
    heard = graph.source == 0
    assert heard.any() and features[heard, 0].isnan().all() and features[:, 1:].isfinite().all()
    (x, *rest), graph = case("gated_sums", *CASES["small"])
    x[0, 0] = torch.nan
    sums = everything("gated_sums", (x, *rest), graph)[0]
    # The gate sees all channels of the message.
    assert sums[graph.target[0]].isnan().all() and sums[graph.target[0] + 1 :].isfinite().all()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operators_are_what_they_declare(operation):
    tensors, graph = case(operation, *CASES["small"])
    inputs = [x.requires_grad_() for x in tensors]
    inputs += [graph.source, graph.ptr] if operation == "edge_features" else [graph.ptr]
    form = getattr(torch.ops.mspt, operation)
    opcheck(form.default, inputs)
    opcheck(getattr(torch.ops.mspt, f"{operation}_backward").default, (form(*inputs).detach(), *inputs))
    given = [x.detach() for x in inputs]
    heads = [torch.ones_like(x) for x in given[:4]]
    second = getattr(torch.ops.mspt, f"{operation}_second").default
    # It has no gradient of its own.
    opcheck(second, (*heads, form(*given), *given), test_utils=("test_schema", "test_faketensor"))
