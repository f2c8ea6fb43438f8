"""SphereNet's messages over triplets in C++ against the reference in float64: results and two derivatives."""

import pytest
import torch
from agreement import TOLERANCE, error, molecules
from cpu_levels import level, poison, threads  # noqa: F401
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from mspt import kernels
from mspt.kernels import reference, triplet_sums

# sizes of molecules, channels, degrees, radial functions, width of the basis, nearest neighbours kept
CASES = {
    "small": ((5, 1, 4), 8, 3, 2, 4, 32),
    "odd": ((7, 0, 3), 13, 4, 5, 3, 32),
    "few neighbours": ((12, 9), 16, 3, 3, 8, 3),
    "published widths": ((14, 9), 64, 7, 6, 8, 32),
    "a wide basis": ((5, 4), 8, 3, 2, 9, 32),
    "no triplets": ((2, 2), 8, 3, 2, 8, 32),
    "no edges": ((1, 1), 8, 3, 2, 8, 32),
    "nothing": ((0,), 8, 3, 2, 8, 32),
}


def case(sizes, channels, degrees, radial, basis, most):
    """Tensors that have gradients, and those of the triplets."""
    positions, ptr = molecules(sizes)
    graph = kernels.radius_graph(positions, ptr, 3.0, most, False)
    met = kernels.triplets((positions[graph.target] - positions[graph.source]).T, graph)
    torch.manual_seed(0)
    e, functions = len(graph.source), degrees**2
    shapes = [(e, channels), (len(met.outgoing), functions), (e, degrees, radial)]
    shapes += [(basis, degrees * radial), (basis, functions * radial), (channels, basis), (channels, basis)]
    tensors = [torch.randn(shape) for shape in shapes]
    return tensors, (met.begin, met.outgoing, graph.ptr)


def worst(name):
    tensors, rest = case(*CASES[name])
    poison(tensors[0].shape)
    with kernels.use("cpu"):
        return error(
            lambda *given: kernels.triplet_messages(*given, *rest),
            lambda *given: reference.triplet_messages(*given, *rest),
            tensors, "cpu", torch.float32,
        )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_float32(name):
    assert worst(name) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["small", "odd", "published widths"])
def test_every_instruction_set(level, name):  # noqa: F811
    assert worst(name) < TOLERANCE[torch.float32]


def test_means_what_it_says():
    """The reference, one triplet after another."""
    tensors, (begin, outgoing, ptr) = case(*CASES["small"])
    tensors = [tensor.double() for tensor in tensors]
    sent, harmonics, spherical, angle_down, torsion_down, angle_up, torsion_up = tensors
    expected = torch.zeros_like(sent)
    for edge in range(len(sent)):
        for t in range(begin[edge], begin[edge + 1]):
            angle = harmonics[t, [0, 1, 4], None] * spherical[edge]
            # The public code has harmonic f beside the Bessel functions of order f mod S, here 3.
            torsion = torch.stack([harmonics[t, f] * spherical[edge, f % 3] for f in range(9)])
            a, b = angle_up @ (angle_down @ angle.flatten()), torsion_up @ (torsion_down @ torsion.flatten())
            expected[outgoing[t]] += sent[edge] * a * b
    found = reference.triplet_messages(*tensors, begin, outgoing, ptr)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def everything(tensors, rest, frozen=()):
    """Results and gradients by the C++ kernels; no gradient for the tensors of these numbers."""
    leaves = [x.detach().requires_grad_(place not in frozen) for place, x in enumerate(tensors)]
    with kernels.use("cpu"):
        output = kernels.triplet_messages(*leaves, *rest)
    wanted = [x for x in leaves if x.requires_grad]
    return [output, *torch.autograd.grad(output, wanted, torch.ones_like(output))]


@pytest.mark.parametrize("count", [1, 3, 16])
def test_any_number_of_threads(count):
    tensors, rest = case(*CASES["published widths"])
    expected = everything(tensors, rest)
    with threads(count):
        found, again = everything(tensors, rest), everything(tensors, rest)
    for one, other, truth in zip(found, again, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, truth, rtol=1e-4, atol=1e-4)


def test_inputs_need_not_be_contiguous():
    tensors, rest = case(*CASES["small"])
    strided = [torch.stack([x, x], -1)[..., 0] for x in tensors]
    for one, other in zip(everything(tensors, rest), everything(strided, rest), strict=True):
        assert torch.equal(one, other)


def test_positions_that_do_not_move():
    """Without gradients of what they decide, the others are the same."""
    tensors, rest = case(*CASES["small"])
    output, sent, _, _, *others = everything(tensors, rest)
    for one, other in zip([output, sent, *others], everything(tensors, rest, frozen={1, 2}), strict=True):
        assert torch.equal(one, other)


def test_second_derivative_where_positions_do_not_move():
    tensors, rest = case(*CASES["small"])
    leaves = [x.detach().requires_grad_(place not in (1, 2)) for place, x in enumerate(tensors)]
    found = []
    for module in (kernels, reference):
        with kernels.use("cpu"):
            output = module.triplet_messages(*leaves, *rest)
            first = torch.autograd.grad(output.square().sum(), leaves[0], create_graph=True)[0]
            found.append(torch.autograd.grad(first.square().sum(), [leaves[0], *leaves[3:]]))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


def test_not_a_number_stays_one():
    tensors, (begin, outgoing, ptr) = case(*CASES["small"])
    edge = int(begin.diff().argmax())
    tensors[0][edge, 0] = torch.nan
    heard = everything(tensors, (begin, outgoing, ptr))[0]
    reached = outgoing[begin[edge] : begin[edge + 1]]
    assert len(reached) and heard[reached, 0].isnan().all() and heard[:, 1:].isfinite().all()


@pytest.mark.parametrize("moving", [True, False])
def test_operators_are_what_they_declare(moving):
    tensors, rest = case(*CASES["small"])
    inputs = [*(x.requires_grad_(moving or place not in (1, 2)) for place, x in enumerate(tensors)), *rest]
    opcheck(torch.ops.mspt.triplet_messages.default, inputs)
    output = torch.ops.mspt.triplet_messages(*inputs).detach()
    # Its gradient is the reference's, whose rows are as long as the data says: that cannot be traced.
    utilities = "test_schema", "test_autograd_registration", "test_faketensor"
    opcheck(torch.ops.mspt.triplet_messages_backward.default, (output, *inputs, moving), test_utils=utilities)


def test_sums_a_few_at_a_time(monkeypatch):
    """The sums of the reference: values and gradients, and gradients of these, as of all at once."""
    monkeypatch.setattr(triplet_sums, "AT_A_TIME", 4)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)

    edges, channels, basis, count = 5, 3, 2, 11
    values = random(edges, channels), random(count, basis), random(count, basis), random(channels, basis)
    values = (*values, random(channels, basis))
    incoming, outgoing = torch.randint(edges, (2, count), generator=generator)
    outgoing = outgoing.sort().values

    def plain(sent, angles, torsions, angle_weight, torsion_weight):
        heard = sent[incoming] * (angles @ angle_weight.T) * (torsions @ torsion_weight.T)
        return torch.zeros_like(sent).index_add(0, outgoing, heard)

    def summed(*values):
        return triplet_sums.triplet_sums(*values, incoming, outgoing)

    torch.testing.assert_close(summed(*values), plain(*values), rtol=1e-12, atol=1e-12)
    assert gradcheck(summed, values)
    assert gradgradcheck(summed, values)
