"""The whitened vector norm in C++ against plain PyTorch in float64."""

import pytest
import torch
from cpu_levels import assert_close, level, poison, threads  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from mspt.kernels import reference
from mspt.kernels.cpu.whiten import whiten

REGULAR = [(2e-5, 2e-5, 2e-5), (1e-5, 2e-5, 3e-5)]
# How far vectors reach along three axes of a random orientation.
KINDS = {
    "full": (1.0, 1.0, 1.0),
    "uneven": (1.0, 0.3, 0.05),
    "nearly flat": (1.0, 1.0, 1e-3),
    "flat": (1.0, 1.0, 0.0),
    "line": (1.0, 0.0, 0.0),
    "large": (1e3, 1e3, 1.0),
    "small": (1e-3, 1e-3, 1e-3),
    "zero": (0.0, 0.0, 0.0),
}


def inputs(n, channels, kind="full", dtype=torch.float32, seed=0):
    """vec [n, 3, channels], weight [channels] and a gradient to the result."""
    torch.manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(n, 3, 3))[0]
    vec = turn @ (torch.tensor(KINDS[kind])[:, None] * torch.randn(n, 3, channels)) + 0.1 * (kind == "full")
    weight = torch.rand(channels) + 0.5
    parts = (vec.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_())
    return parts, torch.randn(n, 3, channels).to(dtype)


def run(function, parts, gradient, regular=REGULAR[0]):
    result = function(*parts, regular)
    return [result, *torch.autograd.grad(result, parts, gradient)]


def wide(parts, gradient):
    return [part.detach().double().requires_grad_() for part in parts], gradient.double()


def check(n, channels, kind, dtype, regular, seed=0):
    parts, gradient = inputs(n, channels, kind, dtype, seed)
    poison(gradient.shape)
    results = run(whiten, parts, gradient, regular)
    assert results[0].is_contiguous()
    assert_close(results, run(reference.whiten, *wide(parts, gradient), regular), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_float64_at_every_level(level, dtype):  # noqa: F811
    for kind in KINDS:
        for regular in REGULAR:
            check(9, 256, kind, dtype, regular)
            check(4, 37, kind, dtype, regular)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 20),
    channels=st.integers(1, 70),
    kind=st.sampled_from([*KINDS]),
    regular=st.sampled_from(REGULAR),
    seed=st.integers(0, 2**32),
)
def test_agrees_with_float64_at_any_size(n, channels, kind, regular, seed):
    # Of one channel nothing is left when it is centred: there are rounding errors alone to compare.
    check(n, max(channels, 2), kind, torch.float32, regular, seed)


def test_even_covariances_and_axes():
    """Eigenvalues that meet, and covariances that are diagonal from the start."""
    vec = torch.zeros(2, 3, 6)
    for axis in range(3):
        vec[:, axis, 2 * axis], vec[:, axis, 2 * axis + 1] = 1.0, -1.0
    vec[1, 2] *= 3
    parts, gradient = [vec.requires_grad_(), torch.ones(6, requires_grad=True)], torch.randn(2, 3, 6)
    assert_close(run(whiten, parts, gradient), run(reference.whiten, *wide(parts, gradient)), torch.float32)


def test_no_atoms():
    parts, gradient = inputs(0, 5)
    result, to_vec, to_weight = run(whiten, parts, gradient)
    assert result.shape == to_vec.shape == (0, 3, 5)
    assert (to_weight == 0).all()


def test_layouts():
    parts, gradient = inputs(5, 12)
    expected = run(whiten, parts, gradient[:1].expand(5, -1, -1).contiguous())
    turned = parts[0].detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    spread = parts[1].detach().repeat_interleave(2)[::2].requires_grad_()
    assert not turned.is_contiguous() and not spread.is_contiguous()
    results = run(whiten, [turned, spread], gradient[:1].expand(5, -1, -1))
    assert all(torch.equal(one, two) for one, two in zip(results, expected, strict=True))


def test_nan_stays_nan(level):  # noqa: F811
    parts, gradient = inputs(4, 20)
    with torch.no_grad():
        parts[0][2, 1, 13] = torch.nan
    result, to_vec, to_weight = run(whiten, parts, gradient)
    assert result[2].isnan().all() and to_vec[2].isnan().all() and to_weight.isnan().all()
    others = [0, 1, 3]
    assert not result[others].isnan().any() and not to_vec[others].isnan().any()


def test_same_again():
    parts, gradient = inputs(50, 64)
    first, again = (run(whiten, parts, gradient) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


def second(function, parts, gradient, heads, regular=REGULAR[1]):
    """What meets heads in the gradients to vec and weight, differentiated by vec, weight and the gradient."""
    gradient = gradient.detach().requires_grad_()
    first = torch.autograd.grad(function(*parts, regular), parts, gradient, create_graph=True)
    return torch.autograd.grad(first, [*parts, gradient], heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivative_agrees_with_float64_at_every_level(level, dtype):  # noqa: F811
    for kind in KINDS:
        for n, channels in ((9, 64), (4, 37)):
            parts, gradient = inputs(n, channels, kind, dtype)
            heads = [torch.randn(part.shape).to(dtype) for part in parts]
            poison(gradient.shape)
            results = second(whiten, parts, gradient, heads)
            truth = second(reference.whiten, *wide(parts, gradient), [head.double() for head in heads])
            assert_close(results, truth, dtype)


def test_second_derivative_by_any_number_of_threads():
    parts, gradient = inputs(50, 64)
    heads = [torch.randn(part.shape) for part in parts]
    found = []
    for count in (1, 3, 3, 60):
        with threads(count):
            found.append(second(whiten, parts, gradient, heads))
    assert all(torch.equal(one, two) for one, two in zip(found[1], found[2], strict=True))
    for other in found[1:]:
        for one, two in zip(other, found[0], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)


def test_second_derivative_where_the_weight_is_frozen():
    parts, gradient = inputs(4, 9)

    def of(function, vec, weight, gradient):
        first = torch.autograd.grad(function(vec, weight, REGULAR[1]), [vec], gradient, create_graph=True)
        return torch.autograd.grad(first[0].square().sum(), [vec])

    truth = of(
        reference.whiten, parts[0].detach().double().requires_grad_(), parts[1].detach().double(), gradient.double()
    )
    assert_close(of(whiten, parts[0], parts[1].detach(), gradient), truth, torch.float32)


def test_other_types_take_the_reference():
    parts, gradient = wide(*inputs(3, 9))
    results = run(whiten, parts, gradient)
    for one, two in zip(results, run(reference.whiten, parts, gradient), strict=True):
        assert torch.equal(one, two)


def test_operators_are_well_formed():
    parts, gradient = inputs(3, 9)
    torch.library.opcheck(torch.ops.mspt.whiten.default, (*parts, list(REGULAR[1])))
    vec, weight = (part.detach() for part in parts)
    _, saved = torch.ops.mspt.whiten(vec, weight, list(REGULAR[1]))
    torch.library.opcheck(torch.ops.mspt.whiten_backward.default, (gradient, vec, weight, saved, list(REGULAR[1])))
    heads = torch.randn(vec.shape), torch.randn(weight.shape)
    torch.library.opcheck(torch.ops.mspt.whiten_second.default, (*heads, gradient, vec, weight, saved))


def test_compiles_in_one_graph():
    parts, gradient = inputs(3, 9)
    compiled = torch.compile(whiten, backend="aot_eager", fullgraph=True)
    expected = run(whiten, parts, gradient)
    for one, two in zip(run(compiled, parts, gradient), expected, strict=True):
        assert torch.equal(one, two)


@settings(max_examples=60, deadline=None)
@given(
    exponents=st.tuples(*[st.floats(-7, 2)] * 3),
    gap=st.sampled_from([None, 0.0, 1e-12, 1e-7, 1e-4]),
    regular=st.sampled_from(REGULAR),
    seed=st.integers(0, 100),
)
def test_gradient_is_bounded_where_the_covariance_degenerates(exponents, gap, regular, seed):
    """Equal or nearly equal axes, flat and vanishing ones.

    A gradient through an eigenvalue decomposition divides by the gaps between eigenvalues and turns to NaN there. This
    one is at most 7 / √ε times what comes in: with the eigenvalues of C at least ε, ‖C^{−1/2} dV‖ ≤ ‖dV‖ / √ε and
    ‖d(C^{−1/2}) V‖ ≤ 6 ‖dV‖ / √ε.
    """
    torch.manual_seed(seed)
    scales = torch.tensor([10.0**e for e in exponents])
    if gap is not None:
        scales = scales[0] * (1 + gap * torch.arange(3))
    channels = 16
    axes = torch.linalg.qr(torch.randn(channels, 4))[0].T  # orthonormal, of which three are centred
    axes = torch.linalg.qr((axes - axes.mean(1, keepdim=True)).T)[0].T[:3]
    vec = torch.linalg.qr(torch.randn(3, 3))[0] @ (scales[:, None] * channels**0.5 * axes)
    weight, gradient = torch.rand(channels) + 0.5, torch.randn(1, 3, channels)
    bound = 7 * weight.max() * gradient.norm() / min(regular) ** 0.5
    for function, dtype in ((whiten, torch.float32), (reference.whiten, torch.float64)):
        parts = [vec[None].to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        _, to_vec, to_weight = run(function, parts, gradient.to(dtype), regular)
        assert to_vec.norm() <= bound
        # The result's rows are whitened, of length √F at most.
        assert to_weight.norm() <= 2 * gradient.norm() * channels**0.5


def test_the_reference_takes_matrices_in_pieces(monkeypatch):
    """Values, gradients and gradients of these: to the bit those of all matrices at once."""
    torch.manual_seed(0)
    vec, weight = torch.randn(10, 3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)

    def everything():
        leaves = [vec.clone().requires_grad_(), weight.clone().requires_grad_()]
        value = reference.whiten(*leaves, (1e-4, 2e-4, 3e-4))
        first = torch.autograd.grad(value.square().sum(), leaves, create_graph=True)
        return [value, *first, *torch.autograd.grad(first[0].square().sum(), leaves)]

    expected = everything()
    monkeypatch.setattr(reference, "EIGH_AT_A_TIME", 4)
    for one, other in zip(everything(), expected, strict=True):
        assert torch.equal(one, other)
