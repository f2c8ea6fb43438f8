"""Heads: their arithmetic atom by atom, their behaviour under rotation, and their gradient at zero vectors."""

import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import silu

from mspt.models.heads import ScalarHead, VectorHead


def features(n=4, channels=6):
    torch.manual_seed(0)
    return torch.randn(n, channels, dtype=torch.float64), torch.randn(n, 3, channels, dtype=torch.float64)


def vector_head(channels=6):
    torch.manual_seed(1)
    head = VectorHead(channels).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return head


def test_vector_head_atom_by_atom():
    head, (scalars, vectors) = vector_head(), features()

    def block(part, x, vec, activate):
        lengths = (vec @ part.lengths.weight.T).norm(dim=0)
        out = part.update[2](silu(part.update[0](torch.cat([x, lengths]))))
        x, gate = out[: len(out) // 2], out[len(out) // 2 :]
        return silu(x) if activate else x, gate * (vec @ part.vectors.weight.T)

    rows = []
    for x, vec in zip(scalars, vectors, strict=True):
        x, vec = block(head.first, x, vec, True)
        rows.append(block(head.last, x, vec, False)[1][:, 0])
    torch.testing.assert_close(head(scalars, vectors), torch.stack(rows), rtol=1e-12, atol=1e-12)


def test_vector_head_turns_with_the_vectors():
    head, (scalars, vectors) = vector_head(), features()
    torch.manual_seed(2)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    for sign in (1, -1):
        expected = head(scalars, vectors) @ (sign * turn).T
        torch.testing.assert_close(head(scalars, sign * turn @ vectors), expected, rtol=1e-10, atol=1e-10)


def test_vector_head_gradients():
    head, (scalars, vectors) = vector_head(), features(n=2)
    assert gradcheck(head, (scalars.requires_grad_(), vectors.requires_grad_()))
    assert gradgradcheck(head, (scalars, vectors))
    zeros = torch.zeros_like(vectors).requires_grad_()
    total = head(scalars, zeros).sum()
    gradient = torch.autograd.grad(total, zeros, create_graph=True)[0]
    second = torch.autograd.grad(gradient.square().sum(), [zeros, *head.parameters()], allow_unused=True)
    assert all(torch.isfinite(part).all() for part in [gradient, *second] if part is not None)


def test_heads_without_atoms_have_gradients():
    for head, inputs in (
        (VectorHead(6), (torch.zeros(0, 6), torch.zeros(0, 3, 6))),
        (ScalarHead(6), (torch.zeros(0, 6),)),
    ):
        result = head(*inputs)
        assert len(result) == 0
        result.sum().backward()
        assert all((parameter.grad == 0).all() for parameter in head.parameters())


def test_scalar_head_is_one_number_an_atom():
    head, (scalars, _) = ScalarHead(6).double(), features()
    first, _, last = head.layers
    expected = silu(scalars @ first.weight.T) @ last.weight[0]
    torch.testing.assert_close(head(scalars), expected, rtol=1e-12, atol=1e-12)
