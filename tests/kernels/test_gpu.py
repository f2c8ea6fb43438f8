"""The kernels on a real GPU at published sizes, against the reference in float64 on the CPU."""

from functools import partial

import pytest
import torch
from agreement import TOLERANCE, attention_error, error, molecules, spanning

from mspt import kernels
from mspt.kernels import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
TYPES = [torch.float32, torch.bfloat16]
SIZES = (1, 18, 9, 0, 30, 2, 25, 60)


@pytest.fixture(autouse=True)
def _as_on_a_gpu():
    with kernels.use("auto"):
        yield


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("width", "heads"), [(32, 8), (16, 4), (64, 2), (8, 2)])
def test_message_pass(dtype, width, heads):
    found = attention_error("cuda", dtype, SIZES, width, heads, vector_cutoff=True, cutoff=5.0)
    assert found < TOLERANCE[dtype]


def test_message_pass_with_as_many_knots_as_published():
    """A slope is a difference of float32 coefficients over a knot's width: gradients of positions lose digits."""
    found = attention_error("cuda", torch.float32, SIZES, 32, 8, knots=384, cutoff=5.0, second=False)
    assert found < 2e-4


@pytest.mark.parametrize("options", [{"vectors": False}, {"knots": None}, {"max_neighbours": 4}, {"loop": False}])
def test_message_pass_with_options(options):
    found = attention_error("cuda", torch.float32, SIZES, 32, 8, cutoff=5.0, **options)
    assert found < TOLERANCE[torch.float32]


def test_gradients_are_the_same_every_time():
    positions, ptr = (x.cuda() for x in molecules((20,) * 50))
    basis = kernels.RadialBasis(64, 5.0, 384)
    torch.manual_seed(0)
    qkv = torch.randn(len(positions), 8, 160, device="cuda", requires_grad=True)
    weight, bias = torch.randn(1024, 64, device="cuda", requires_grad=True), torch.randn(1024, device="cuda")

    def gradients():
        graph = kernels.radius_graph(positions.float(), ptr, 5.0, 32, True)
        geometry = kernels.pair_geometry(positions, graph, basis, qkv.dtype)
        table = kernels.gate_table(weight, bias, 8, basis, geometry)
        scalars, vectors = kernels.radius_graph_attention(qkv, None, table, graph, geometry, False)
        first = torch.autograd.grad(scalars.sum() + vectors.square().sum(), (qkv, weight), create_graph=True)
        return *first, *torch.autograd.grad(first[0].square().sum(), (qkv, weight))

    for first, again in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("directions", [3, 2, 1, 0])
def test_whiten(dtype, directions):
    functions = [partial(module.whiten, regular=(1e-5, 2e-5, 3e-5)) for module in (kernels, reference)]
    inputs = spanning(directions, 100, 256), torch.linspace(0.5, 2, 256)
    assert error(*functions, inputs, "cuda", dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TYPES)
def test_update(dtype):
    torch.manual_seed(0)
    inputs = torch.randn(70, 256), torch.randn(70, 3, 256), torch.randn(70, 768), torch.randn(70, 3, 768)
    assert error(kernels.update, reference.update, inputs, "cuda", dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("loop", [True, False])
@pytest.mark.parametrize("max_neighbours", [5, 32])
def test_radius_graph(max_neighbours, loop):
    positions, ptr = molecules((*SIZES, 300, 1000))
    positions = positions.float()  # of which float64 is exact
    found = kernels.radius_graph(positions.cuda(), ptr.cuda(), 5.0, max_neighbours, loop)
    expected = reference.radius_graph(positions, ptr, 5.0, max_neighbours, loop)
    for name in ("source", "target", "ptr", "pair", "first", "second"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
