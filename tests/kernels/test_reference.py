"""The reference kernels against what they mean, written out atom by atom, in float64."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from mspt import kernels
from mspt.kernels.reference import InverseSquareRoot

ISOTROPIC, PUBLISHED = (2e-5, 2e-5, 2e-5), (1e-5, 2e-5, 3e-5)


# Whitened vector norm


def by_svd(vec, weight, regular):
    """The published way: an SVD of every atom's covariance, in float64."""
    rows = []
    for v in vec.double():
        v = v - v.mean(-1, keepdim=True)
        u, s, _ = torch.linalg.svd(v @ v.T / v.shape[1] + torch.diag(torch.tensor(regular, dtype=torch.float64)))
        rows.append((u / s.sqrt()) @ u.T @ v * weight.double())
    return torch.stack(rows)


def vectors(kind, n=4, channels=7, dtype=torch.float64):
    """Vector features [n, 3, channels] that span three, two, one or no directions, or three evenly."""
    torch.manual_seed(0)
    vec = torch.randn(n, 3, channels, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(n, 3, 3, dtype=torch.float64))[0]
    if kind == "even":
        centred = vec - vec.mean(-1, keepdim=True)
        vec = torch.linalg.svd(centred, full_matrices=False)[2] * channels**0.5
    else:
        rank = {"full": 3, "plane": 2, "line": 1, "zero": 0}[kind]
        vec[:, rank:] = 0
    return (turn @ vec).to(dtype)


KINDS = ["full", "even", "plane", "line", "zero"]


@pytest.mark.parametrize("regular", [ISOTROPIC, PUBLISHED])
@pytest.mark.parametrize("kind", KINDS)
def test_whiten_is_the_published_formula(kind, regular):
    weight = torch.linspace(0.5, 2, 7)
    vec = vectors(kind, dtype=torch.float32)
    expected = by_svd(vec, weight, regular)
    result = kernels.whiten(vec.double(), weight.double(), regular)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)
    error = (kernels.whiten(vec, weight, regular).double() - expected).norm()
    assert error <= 1e-6 * expected.norm() + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_whiten_gradients(kind):
    vec = vectors(kind, n=2, channels=4).requires_grad_()
    weight = torch.linspace(0.5, 2, 4, dtype=torch.float64).requires_grad_()
    # In units of √ε, in which the function is smooth also where the vectors are zero.
    scale = 1.0 if kind in ("full", "even") else 3e-3

    def function(vec, weight):
        return kernels.whiten(vec * scale, weight, ISOTROPIC)

    assert gradcheck(function, (vec, weight))
    assert gradgradcheck(function, (vec, weight))


def test_two_ways_of_the_inverse_square_root_gradient_agree():
    """Without a graph the backward takes the Loewner form, with one a linear system."""
    torch.manual_seed(0)
    half = torch.randn(5, 3, 3, dtype=torch.float64)
    matrix = (half @ half.mT + 1e-3 * torch.eye(3)).requires_grad_()
    weights = torch.randn(5, 3, 3, dtype=torch.float64)
    total = (InverseSquareRoot.apply(matrix) * weights).sum()
    loewner = torch.autograd.grad(total, matrix, retain_graph=True)[0]
    system = torch.autograd.grad(total, matrix, create_graph=True)[0]
    torch.testing.assert_close(loewner, system, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("regular", [ISOTROPIC, PUBLISHED])
def test_whiten_gradient_is_bounded_where_eigenvalues_meet(regular):
    """An SVD's backward divides by differences of eigenvalues: the cause of NaN in the published fine-tuning."""
    torch.manual_seed(1)
    even, offset, weights = vectors("even"), torch.randn(4, 3, 7), torch.randn(4, 3, 7)
    for split in (0.0, 1e-14, 1e-10, 1e-7, 1e-4):
        vec = (even + split * offset).requires_grad_()
        (kernels.whiten(vec, torch.ones(7), regular) * weights).sum().backward()
        # The derivative of a whitened unit covariance is of the order of the weights.
        assert vec.grad.norm() < 2 * weights.norm()
    for kind in KINDS:
        vec = vectors(kind, dtype=torch.float32).requires_grad_()
        (kernels.whiten(vec, torch.ones(7), regular) * weights).sum().backward()
        assert vec.grad.norm() < 2 * weights.norm() / min(regular) ** 0.5


@pytest.mark.parametrize("kind", ["even", "zero"])
def test_where_the_gradient_of_an_svd_is_not_finite_this_one_is(kind):
    """Equal eigenvalues: of an even covariance, and of one that ε alone makes, as in a molecule of a single atom."""
    weights, gradients = torch.randn(4, 3, 7), []
    for function in (by_svd, kernels.whiten):
        vec = vectors(kind).requires_grad_()
        (function(vec, torch.ones(7), ISOTROPIC) * weights).sum().backward()
        gradients.append(vec.grad)
    published, ours = gradients
    assert not published.isfinite().all() and ours.norm() < 2 * weights.norm() / ISOTROPIC[0] ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_whiten_turns_with_its_vectors(kind):
    """Exactly with an isotropic regularisation; as published, up to its size against the covariance."""
    vec, weight = vectors(kind), torch.ones(7, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]

    def error(regular):
        turned, before = kernels.whiten(turn @ vec, weight, regular), kernels.whiten(vec, weight, regular)
        return (turned - turn @ before).abs().max()

    assert error(ISOTROPIC) < 1e-9
    if kind in ("full", "even"):
        assert 1e-8 < error(PUBLISHED) < 1e-3


def test_whiten_of_no_atoms():
    vec, weight = torch.zeros(0, 3, 5, requires_grad=True), torch.ones(5, requires_grad=True)
    kernels.whiten(vec, weight, ISOTROPIC).sum().backward()
    assert vec.grad.shape == (0, 3, 5)
    assert (weight.grad == 0).all()


# Attention whose scores are carried from layer to layer


def heads(layers, m=3, h=2, t=5, d=4):
    torch.manual_seed(0)
    return [[torch.randn(m, t, h, d, dtype=torch.float64) for _ in range(layers)] for _ in range(3)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_carried_scores_are_the_recursion(layers, masked):
    queries, keys, values = heads(layers)
    mask = None
    if masked:
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    score = 0.0
    for layer in range(layers):
        q, k, v = (part[layer].transpose(1, 2) for part in (queries, keys, values))
        score = q @ k.mT / 4**0.5 + score
        seen = score if mask is None else score.masked_fill(~mask[:, None, None], -math.inf)
        expected = (seen.softmax(-1) @ v).transpose(1, 2)
        result = kernels.carried_score_attention(queries[: layer + 1], keys[: layer + 1], values[layer], mask)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_nothing_to_attend_to_gives_zeros_and_finite_gradients():
    queries, keys, values = heads(2)
    leaf = values[1].requires_grad_()
    mask = torch.tensor([[True] * 5, [False] * 5, [True] + [False] * 4])
    result = kernels.carried_score_attention(queries, keys, leaf, mask)
    assert (result[1] == 0).all()
    result.sum().backward()
    assert torch.isfinite(leaf.grad).all()
    assert (leaf.grad[1] == 0).all()
