"""Heads: their arithmetic atom by atom, their behaviour under rotation, and their gradient at zero vectors."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import silu

from mspt.models.heads import DipoleNorm, ScalarHead, ScalarReadout, SpatialExtent, VectorHead


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


class Molecules:
    """What a readout asks of a MoleculeBatch, of two molecules."""

    def __init__(self, atoms=(5, 3)):
        torch.manual_seed(3)
        n = sum(atoms)
        self.molecule = torch.repeat_interleave(torch.arange(2), torch.tensor(atoms))
        self.numbers = torch.tensor([1, 6, 7, 8, 9])[torch.arange(n) % 5]
        self.positions = torch.randn(n, 3, dtype=torch.float64)

    def sum(self, values):
        return values.new_zeros(2, *values.shape[1:]).index_add(0, self.molecule, values)


def readout(kind, channels=6):
    torch.manual_seed(1)
    head = kind(channels).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return head


@pytest.mark.parametrize("kind", [ScalarReadout, DipoleNorm, SpatialExtent])
def test_readouts_do_not_turn_or_move_with_the_molecule(kind):
    """The charges of the dipole do not add up to zero: about the centre of mass that does not matter."""
    head, batch, (x, vec) = readout(kind), Molecules(), features(8)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    value = head(x, vec, batch, batch.positions)
    assert value.shape == (2,) and not torch.allclose(value[0], value[1])
    moved = batch.positions @ turn.T + torch.tensor([3.0, -2.0, 7.0])
    torch.testing.assert_close(head(x, turn @ vec, batch, moved), value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(head(x, -turn @ vec, batch, -moved), value, rtol=1e-10, atol=1e-10)


def test_readouts_from_known_charges():
    """Two charges 2 Å apart; R² of hydrogen about the centre of mass, which is near the heavy atom."""
    batch = Molecules((2, 1))
    batch.numbers = torch.tensor([9, 1, 8])
    batch.positions = torch.tensor([[0.0, 0, 0], [0, 0, 2.0], [5.0, 5, 5]]).double()
    charges, nothing = torch.tensor([-0.5, 0.5, 1.0]).double(), torch.zeros(3, 3).double()
    dipole, extent = readout(DipoleNorm), readout(SpatialExtent)
    dipole.atoms = extent.atoms = lambda x, vec: (charges, nothing)
    assert dipole(None, None, batch, batch.positions).tolist() == pytest.approx([1.0, 0.0])
    centre = 2.0 * 1.008 / (1.008 + 18.998)
    expected = [0.5 * (2 - centre) ** 2 - 0.5 * centre**2, 0.0]
    assert extent(None, None, batch, batch.positions).tolist() == pytest.approx(expected)
    atomic = torch.tensor([[0.0, 0.0, 1.0], [3.0, 0.0, 1.0], [0.0, 0.0, 0.0]]).double()
    dipole.atoms = lambda x, vec: (0 * charges, atomic)
    assert dipole(None, None, batch, batch.positions).tolist() == pytest.approx([13**0.5, 0.0])


def test_readouts_have_finite_gradients_and_need_no_vectors():
    batch, (x, _) = Molecules(), features(8)
    for kind in (ScalarReadout, DipoleNorm, SpatialExtent):
        head = readout(kind)
        value = head(x, None, batch, batch.positions)
        value.sum().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())
        assert torch.equal(value, head(x, torch.zeros(8, 3, 6).double(), batch, batch.positions))
    # A single atom has no dipole of its own charge: the root at zero.
    batch, head = Molecules((1, 1)), readout(DipoleNorm)
    batch.positions.zero_()
    head(x[:2], torch.zeros(2, 3, 6).double(), batch, batch.positions).sum().backward()
    assert all((parameter.grad == 0).all() for parameter in head.parameters())
