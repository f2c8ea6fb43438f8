"""The message pass in C++ against the reference in float64: results, gradients, second derivatives."""

import pytest
import torch
from cpu_levels import level, threads  # noqa: F401
from torch.library import opcheck

from mspt import kernels
from mspt.kernels import RadialBasis

CASES = {
    "small": {"sizes": (5, 1, 7), "heads": 2, "width": 8},
    "fading": {"sizes": (5, 1, 7), "heads": 2, "width": 8, "fading": True},
    "no vectors": {"sizes": (5, 1, 7), "heads": 2, "width": 8, "with_vec": False},
    "direct": {"sizes": (5, 1, 7), "heads": 2, "width": 16, "knots": None, "fading": True},
    "few neighbours": {"sizes": (20, 30), "heads": 3, "width": 16, "most": 6},
    "odd width": {"sizes": (12, 3), "heads": 3, "width": 12, "fading": True},
    "published width": {"sizes": (18, 0, 3, 29), "heads": 8, "width": 32, "knots": 384},
    "wide": {"sizes": (12, 3), "heads": 1, "width": 64},
    "tiles": {"sizes": (300, 3), "heads": 2, "width": 32, "most": 20, "spread": 4.0},
    "tiles, direct": {"sizes": (300, 3), "heads": 1, "width": 8, "knots": None, "spread": 4.0},
    "200 atoms": {"sizes": (200,), "heads": 1, "width": 16, "spread": 3.0},
    "apart": {"sizes": (4, 2), "heads": 2, "width": 8, "spread": 100.0},
    "nothing": {"sizes": (0,), "heads": 2, "width": 8},
}


class Case:
    """Inputs of a message pass, and what it makes of them."""

    def __init__(self, sizes, heads, width, knots=64, most=32, with_vec=True, fading=False, spread=1.5):
        torch.manual_seed(0)
        n, channels = sum(sizes), heads * width
        self.heads, self.most, self.fading = heads, most, fading
        self.ptr = torch.tensor([0, *sizes]).cumsum(0)
        self.basis = RadialBasis(16, 5.0, knots)
        self.features = [torch.randn(n, heads, 5 * width), torch.randn(n, 3, channels) if with_vec else None]
        self.gates = [0.5 * torch.randn(4 * channels, 16), 0.5 * torch.randn(4 * channels)]
        self.positions = spread * torch.randn(n, 3)
        self.weights = [torch.randn(n, channels), torch.randn(n, 3, channels)]

    def leaves(self, features, rest):
        """Inputs as leaves: features in one type, gates and positions in another."""
        tensors = [t if t is None else t.to(features) for t in self.features]
        tensors += [t.to(rest) for t in (*self.gates, self.positions)]
        return [None if t is None else t.detach().requires_grad_() for t in tensors]

    def outputs(self, qkv, vec, weight, bias, positions):
        graph = kernels.radius_graph(positions.detach(), self.ptr, self.basis.cutoff, self.most, True)
        geometry = kernels.pair_geometry(positions, graph, self.basis, qkv.dtype)
        table = kernels.gate_table(weight, bias, self.heads, self.basis, geometry)
        return kernels.radius_graph_attention(qkv, vec, table, graph, geometry, self.fading)

    def run(self, leaves, second=False):
        """Outputs, gradients of every leaf, and with second those of a random sum of the gradients."""
        outputs = self.outputs(*leaves)
        leaves = [leaf for leaf in leaves if leaf is not None]
        total = sum((out * w.to(out.dtype)).sum().double() for out, w in zip(outputs, self.weights, strict=True))
        gradients = torch.autograd.grad(total, leaves, create_graph=second)
        seconds = ()
        if second:
            torch.manual_seed(1)
            total = sum((g * torch.randn(g.shape).to(g.dtype)).sum().double() for g in gradients)
            seconds = torch.autograd.grad(total, leaves)
        return [[t.detach() for t in group] for group in (outputs, gradients, seconds)]

    def everything(self, leaves, second=False):
        """All tensors of run, in one list."""
        return [t for group in self.run(leaves, second) for t in group]


def errors(found, expected):
    pairs = zip(found, expected, strict=True)
    return [((f.double() - e).norm() / e.norm().clamp(min=1e-30)).item() for f, e in pairs]


def compare(case, dtype, tolerance, second):
    """The kernels in dtype against the reference in float64, from the same rounded inputs."""
    with kernels.use("cpu"):
        found = case.run(case.leaves(dtype, torch.float32), second)
    exact = case.leaves(dtype, torch.float32)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in exact]
    case.weights = [w.to(dtype) for w in case.weights]
    expected = case.run(exact, second)
    *gradients, forces = errors(found[1], expected[1])
    assert max(errors(found[0], expected[0]) + gradients) < tolerance
    # The slope and the curvature of a spline amplify the rounding of its coefficients to float32.
    tabulated = case.basis.knots is not None
    assert forces < max(tolerance, 2e-5 if tabulated else 0)
    if second:
        *gradients, curvature = errors(found[2], expected[2])
        assert max(gradients) < tolerance
        assert curvature < max(tolerance, 1e-3 if tabulated else 0)


@pytest.mark.parametrize("name", CASES)
def test_float32(name):
    compare(Case(**CASES[name]), torch.float32, 1e-5, second=name != "nothing")


@pytest.mark.parametrize("name", ["small", "no vectors", "odd width", "tiles", "direct"])
def test_bfloat16(name):
    compare(Case(**CASES[name]), torch.bfloat16, 1e-2, second=True)


@pytest.mark.parametrize("name", ["fading", "direct", "few neighbours", "published width", "wide", "tiles"])
def test_every_instruction_set(level, name):  # noqa: F811
    compare(Case(**CASES[name]), torch.float32, 1e-5, second=True)
    compare(Case(**CASES[name]), torch.bfloat16, 1e-2, second=False)


def test_results_do_not_depend_on_what_memory_held():
    case = Case(**CASES["tiles"])
    with kernels.use("cpu"):
        first = case.everything(case.leaves(torch.float32, torch.float32), second=True)
        for scale in (1, 3, 10, 30):  # freed at once, and handed out again
            torch.full((scale * 10000,), float("nan"))
        again = case.everything(case.leaves(torch.float32, torch.float32), second=True)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_threads(count):
    """More threads than heads share out the tiles; equal calls give equal bits."""
    case = Case(**CASES["few neighbours"])
    with threads(count):
        compare(case, torch.float32, 1e-5, second=True)
        with kernels.use("cpu"):
            runs = [case.everything(case.leaves(torch.float32, torch.float32)) for _ in range(2)]
        for one, other in zip(*runs, strict=True):
            assert torch.equal(one, other)


def test_not_a_number_stays_one():
    case = Case(**CASES["small"])
    leaves = case.leaves(torch.float32, torch.float32)
    with torch.no_grad():
        leaves[0][2] = float("nan")
    with kernels.use("cpu"):
        (scalars, _), gradients, _ = case.run(leaves)
    assert torch.isnan(scalars[:5]).all(1).any()
    assert not torch.isnan(scalars[6:]).any()  # another molecule
    assert torch.isnan(gradients[0]).any()


def test_inputs_need_not_be_contiguous():
    case = Case(**CASES["small"])
    leaves = case.leaves(torch.float32, torch.float32)
    strided = [leaf.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for leaf in leaves[:2]]
    with kernels.use("cpu"):
        one, other = case.everything(leaves), case.everything([*strided, *leaves[2:]])
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["small", "no vectors", "direct"])
def test_operators_are_what_they_declare(name):
    """Schemas, fake tensors and autograd, by PyTorch's own check."""
    case = Case(**CASES[name])
    qkv, vec, weight, bias, positions = case.leaves(torch.float32, torch.float32)
    with kernels.use("cpu"):
        graph = kernels.radius_graph(positions, case.ptr, 5.0, 32, True)
        geometry = kernels.pair_geometry(positions.detach(), graph, case.basis, torch.float32)
        table = kernels.gate_table(weight, bias, case.heads, case.basis, geometry)
    inputs = (
        *(qkv, vec, table.detach().requires_grad_(), geometry.coordinate, geometry.fade, geometry.direction),
        *(graph.source, graph.ptr, graph.pair, list(graph.plan), case.fading),
    )
    opcheck(torch.ops.mspt.attention.default, inputs)
    outputs = [t.detach() for t in torch.ops.mspt.attention(*inputs)]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    opcheck(torch.ops.mspt.attention_backward.default, (*outputs, *inputs, True), test_utils=tests)
    opcheck(torch.ops.mspt.gate_table.default, (torch.randn(2, 20, 32, requires_grad=True), True))
    n = len(qkv)
    update = [torch.randn(*shape, requires_grad=True) for shape in ((n, 4), (n, 3, 4), (n, 12), (n, 3, 12))]
    opcheck(torch.ops.mspt.update.default, update)
    opcheck(torch.ops.mspt.update_backward.default, update)
    fixed = [tensor.detach() for tensor in update]
    opcheck(torch.ops.mspt.update_second.default, (*fixed[2:], *fixed))


def test_update_of_turned_tensors():
    """Inputs that lie in memory in another order."""
    torch.manual_seed(0)
    shapes = (6, 5), (6, 3, 5), (6, 15), (6, 3, 15)
    plain = [torch.randn(shape).requires_grad_() for shape in shapes]
    turned = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in plain]
    found = []
    for leaves in (plain, turned):
        outputs = kernels.update(*leaves)
        first = torch.autograd.grad(sum(x.square().sum() for x in outputs), leaves, create_graph=True)
        found.append([*outputs, *first, *torch.autograd.grad(sum(x.square().sum() for x in first), leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_the_compiler_sees_the_operators():
    case = Case(**CASES["small"])
    leaves = case.leaves(torch.float32, torch.float32)
    with kernels.use("cpu"):
        graph = kernels.radius_graph(leaves[4].detach(), case.ptr, 5.0, 32, True)
        geometry = kernels.pair_geometry(leaves[4].detach(), graph, case.basis, torch.float32)

        def function(qkv, vec, weight, bias):
            table = kernels.gate_table(weight, bias, case.heads, case.basis, geometry)
            scalars, vectors = kernels.radius_graph_attention(qkv, vec, table, graph, geometry, False)
            return scalars.square().sum() + vectors.square().sum()

        plain = torch.autograd.grad(function(*leaves[:4]), leaves[:4])
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        for one, other in zip(torch.autograd.grad(compiled(*leaves[:4]), leaves[:4]), plain, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update(dtype):
    """The layer's update and its gradients, first and second."""
    torch.manual_seed(0)
    n, channels = 7, 20
    shapes = (n, channels), (n, 3, channels), (n, 3 * channels), (n, 3, 3 * channels)
    given = [torch.randn(*shape).to(dtype) for shape in shapes]
    weights = [torch.randn(*shape).to(dtype) for shape in shapes]
    results = []
    for convert in (lambda t: t, torch.Tensor.double):
        leaves = [convert(t).requires_grad_() for t in given]
        outputs = kernels.update(*leaves)
        total = sum((out * convert(w)).sum() for out, w in zip(outputs, weights[:2], strict=True))
        gradients = torch.autograd.grad(total, leaves, create_graph=True)
        total = sum((g * convert(w)).sum() for g, w in zip(gradients, weights, strict=True))
        results.append([*outputs, *gradients, *torch.autograd.grad(total, leaves[2:])])
    assert max(errors(*results)) < {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
