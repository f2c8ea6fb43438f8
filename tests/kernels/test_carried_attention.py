"""Attention with carried scores in C++ against plain PyTorch in float64."""

import pytest
import torch
from cpu_levels import assert_close, level, poison  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from mspt.kernels import reference
from mspt.kernels.cpu.carried_attention import carried_score_attention as carried_attention


def inputs(m, tokens, heads, width, layers, dtype=torch.float32, seed=0, scale=1.0):
    """Leaves [m, T, 3, H, D], one a layer, and a gradient to the result [m, T, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (m, tokens, 3, heads, width)
    leaves = [(scale * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for _ in range(layers)]
    return leaves, torch.randn(m, tokens, heads, width, generator=generator).to(dtype)


def run(function, leaves, gradient, mask=None):
    """The result and its gradients to all leaves; the last layer's values alone take part."""
    heads = [leaf.unbind(2) for leaf in leaves]
    result = function([q for q, _, _ in heads], [k for _, k, _ in heads], heads[-1][2], mask)
    return [result, *torch.autograd.grad(result, leaves, gradient)]


def wide(leaves, gradient):
    return [leaf.detach().double().requires_grad_() for leaf in leaves], gradient.double()


def some_mask(m, tokens):
    """The second molecule has nothing to attend to, the last has all."""
    mask = torch.rand(m, tokens, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[:, :1] = True
    mask[1:2] = False
    mask[-1:] = True
    return mask


def check(m, tokens, heads, width, layers, dtype=torch.float32, masked=False, **kwargs):
    leaves, gradient = inputs(m, tokens, heads, width, layers, dtype, **kwargs)
    mask = some_mask(m, tokens) if masked else None
    poison(gradient.shape)
    results = run(carried_attention, leaves, gradient, mask)
    assert results[0].is_contiguous()
    assert_close(results, run(reference.carried_score_attention, *wide(leaves, gradient), mask), dtype)


SIZES = [  # m, T, H, D, layers
    (2, 347, 2, 8, 3),  # the published model's
    (3, 33, 1, 16, 2),
    (2, 65, 3, 5, 2),
    (3, 1, 2, 4, 1),
    (1, 96, 1, 33, 1),
    (2, 12, 2, 1, 4),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_float64_at_every_level(level, dtype, masked):  # noqa: F811
    for size in SIZES:
        check(*size, dtype=dtype, masked=masked)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(0, 3),
    tokens=st.integers(1, 80),
    heads=st.integers(1, 3),
    width=st.integers(1, 20),
    layers=st.integers(1, 4),
    masked=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_agrees_with_float64_at_any_size(m, tokens, heads, width, layers, masked, seed):
    check(m, tokens, heads, width, layers, masked=masked, seed=seed)


def test_sharp_attention_in_low_precision():
    """Where one key takes nearly all, the gradient to the scores is a difference of numbers that nearly agree."""
    check(2, 50, 2, 8, 1, seed=1, scale=3.0)
    leaves, gradient = inputs(2, 50, 2, 8, 1, torch.bfloat16, seed=1, scale=2.0)
    expected = run(reference.carried_score_attention, *wide(leaves, gradient))
    assert_close(run(carried_attention, leaves, gradient), expected, torch.bfloat16)


def test_large_scores_do_not_overflow():
    check(1, 40, 2, 8, 2, scale=8.0)


def test_no_molecules():
    leaves, gradient = inputs(0, 5, 2, 4, 2)
    assert [part.shape for part in run(carried_attention, leaves, gradient)] == [(0, 5, 2, 4), *[(0, 5, 3, 2, 4)] * 2]


def test_nothing_to_attend_to_gives_zeros():
    leaves, gradient = inputs(3, 20, 2, 4, 2)
    mask = some_mask(3, 20)
    poison(gradient.shape)
    for part in run(carried_attention, leaves, gradient, mask):
        assert (part[1] == 0).all()
        assert part[0].abs().sum() > 0
    for part in run(carried_attention, leaves, gradient, torch.zeros_like(mask)):
        assert (part == 0).all()


def test_masked_keys_get_exact_zeros():
    leaves, gradient = inputs(2, 50, 2, 8, 1)
    mask = torch.arange(50).expand(2, -1) < 30
    (to_leaf,) = run(carried_attention, leaves, gradient, mask)[1:]
    assert (to_leaf[:, 30:, 1:] == 0).all()


def test_layouts():
    """Views of any strides, also with the channels not contiguous, broadcast gradients and masks."""
    leaves, _ = inputs(2, 21, 3, 4, 1)
    q, k, v = leaves[0].detach().unbind(2)
    mask = (torch.arange(21) % 3 > 0)[:, None].expand(-1, 2).T

    def turned(x):
        return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)

    expected = carried_attention([q], [k], v, mask)
    views = [turned(x).requires_grad_() for x in (q, k, v)]
    assert views[0].stride(-1) != 1
    result = carried_attention([views[0]], [views[1]], views[2], mask)
    assert torch.equal(result, expected)
    gradients = torch.autograd.grad(result, views, torch.ones(1, 1, 1, 1).expand_as(result))
    copies = [x.contiguous().requires_grad_() for x in (q, k, v)]
    result = carried_attention([copies[0]], [copies[1]], copies[2], mask)
    for one, two in zip(gradients, torch.autograd.grad(result, copies, torch.ones_like(result)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("part", range(3))
def test_nan_stays_nan(level, part):  # noqa: F811
    """A query's in its own row, a key's in all rows, a value's in its channel; other heads and molecules are free."""
    leaves, gradient = inputs(2, 40, 2, 4, 1)
    with torch.no_grad():
        leaves[0][0, 7, part, 1, 2] = torch.nan
    result, to_leaf = run(carried_attention, leaves, gradient)
    nan = result.isnan()
    expected = torch.zeros_like(nan)
    expected[0, slice(7, 8) if part == 0 else slice(None), 1, slice(2, 3) if part == 2 else slice(None)] = True
    assert torch.equal(nan, expected)
    assert to_leaf[0, :, :, 1].isnan().any()
    assert not to_leaf[1].isnan().any() and not to_leaf[0, :, :, 0].isnan().any()


def test_same_again():
    leaves, gradient = inputs(3, 70, 4, 8, 3)
    first, again = (run(carried_attention, leaves, gradient) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


def test_second_derivative_is_the_references():
    leaves, gradient = inputs(2, 9, 2, 4, 2, seed=5)

    def second(function, leaves, gradient):
        gradient.requires_grad_()
        heads = [leaf.unbind(2) for leaf in leaves]
        result = function([q for q, _, _ in heads], [k for _, k, _ in heads], heads[-1][2], some_mask(2, 9))
        first = torch.autograd.grad(result, leaves, gradient, create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in first), [*leaves, gradient])

    with sdpa_kernel(SDPBackend.MATH):
        expected = second(reference.carried_score_attention, *wide(leaves, gradient))
    assert_close(second(carried_attention, leaves, gradient), expected, torch.float32)
    # Also where some inputs are frozen.
    query = torch.randn(1, 5, 1, 4, requires_grad=True)
    result = carried_attention([query], [query.detach()], query.detach(), None)
    assert torch.autograd.grad(result.sum(), query, create_graph=True)[0].requires_grad


def test_other_types_take_the_reference():
    leaves, gradient = wide(*inputs(2, 9, 2, 4, 2))
    results = run(carried_attention, leaves, gradient)
    for one, two in zip(results, run(reference.carried_score_attention, leaves, gradient), strict=True):
        assert torch.equal(one, two)


def test_operators_are_well_formed():
    leaves, gradient = inputs(2, 9, 2, 4, 2)
    heads = [leaf.detach().unbind(2) for leaf in leaves]
    queries, keys = [q for q, _, _ in heads], [k for _, k, _ in heads]
    values = heads[-1][2]
    for mask in (None, some_mask(2, 9)):
        _, norm = torch.ops.mspt.carried_attention(queries, keys, values, mask)
        back = (gradient, queries, keys, values, mask, norm)
        torch.library.opcheck(torch.ops.mspt.carried_attention_backward.default, back)
        leaf_lists = [[x.clone().requires_grad_() for x in part] for part in (queries, keys)]
        arguments = (*leaf_lists, values.clone().requires_grad_(), mask)
        torch.library.opcheck(torch.ops.mspt.carried_attention.default, arguments)


def test_compiles_in_one_graph():
    leaves, gradient = inputs(2, 9, 2, 4, 2)
    compiled = torch.compile(carried_attention, backend="aot_eager", fullgraph=True)
    expected = run(carried_attention, leaves, gradient, some_mask(2, 9))
    for one, two in zip(run(compiled, leaves, gradient, some_mask(2, 9)), expected, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("attention", [reference.carried_score_attention, carried_attention])
def test_weights_are_what_the_values_are_multiplied_with(attention, layers, masked):
    leaves, _ = inputs(3, 33, 2, 8, layers)
    mask = some_mask(3, 33) if masked else None
    queries, keys, values = zip(*(leaf.detach().unbind(2) for leaf in leaves), strict=True)
    weights = reference.carried_score_weights(queries, keys, mask)
    result = torch.einsum("mhts,mshd->mthd", weights, values[-1])
    torch.testing.assert_close(attention(queries, keys, values[-1], mask), result, rtol=1e-4, atol=1e-5)
    there = torch.ones(3, 33, dtype=torch.bool) if mask is None else mask
    assert (weights.transpose(1, 3)[~there] == 0).all()
    torch.testing.assert_close(weights.sum(-1), there.any(1)[:, None, None].expand(3, 2, 33).float())
