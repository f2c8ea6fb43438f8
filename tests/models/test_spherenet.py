"""SphereNet: the contract of every encoder, and its functions of distances against other ways to compute them."""

import math

import pytest
import torch
from encoder_contract import EncoderContract, molecules
from torch.autograd import gradcheck, gradgradcheck

from mspt.models import encoders
from mspt.models.encoders import bessel, spherenet


class TestSphereNet(EncoderContract):
    settings = spherenet.TINY
    mirror = False


def build(**changes):
    """A small encoder with no parameter at its initial value."""
    settings = spherenet.TINY.model_copy(update=changes)
    return type("Built", (EncoderContract,), {"settings": settings})().build()


def test_parameters():
    """The public code makes 1 898 566 with its defaults, one output, 95 elements; here there are F and 119."""
    model = encoders.build(spherenet.QM9)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count - (119 - 95) * 128 - 5 * 256 * (128 - 1) == 1_898_566


def test_bessel_functions():
    """Against scipy's, from 0 over both branches; roots and norms by what they are to fulfil."""
    special = pytest.importorskip("scipy.special")
    x = torch.cat([torch.zeros(1), torch.logspace(-8, 1.6, 500)]).double()
    for order in range(8):
        expected = torch.from_numpy(special.spherical_jn(order, x.numpy()))
        torch.testing.assert_close(bessel.spherical_bessel(x, order), expected, rtol=1e-10, atol=1e-12)
    roots, factors = bessel.bessel_roots(7, 6)
    torch.testing.assert_close(roots[0], math.pi * torch.arange(1, 7).double())
    r = (torch.arange(20000).double() + 0.5) / 20000
    for order, (row, factor) in enumerate(zip(roots, factors, strict=True)):
        assert bessel.spherical_bessel(row, order).abs().max() < 1e-13
        values = factor * bessel.spherical_bessel(row * r[:, None], order)
        # Norm 1, and at right angles to each other: no root is left out.
        gram = (values * r[:, None] ** 2).T @ values / len(r)
        torch.testing.assert_close(gram, torch.eye(6).double(), rtol=0, atol=1e-6)
        assert (row.diff() > 0).all() and (row.diff() < 4.5).all()


def test_derivatives_of_bessel_functions():
    x = torch.tensor([0.0, 1e-3, 0.7, 1.999, 2.001, 9.0], dtype=torch.float64, requires_grad=True)
    for order in (0, 1, 5):
        assert gradcheck(lambda x, order=order: bessel.spherical_bessel(x + 1e-4, order), (x,))
        assert gradgradcheck(lambda x, order=order: bessel.spherical_bessel(x + 1e-4, order), (x,))


def test_mirror_images_differ_where_nothing_is_flat():
    """Five atoms that fill space have a mirror image of their own; four in a plane are their own."""
    encoder = build()
    numbers, positions, ptr = molecules((5,))
    mirror = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    one, other = (encoder(numbers, x, ptr)[0] for x in (positions, positions * mirror))
    assert (one - other).abs().max() > 1e-3 * one.abs().max()
    flat = positions[:4] * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    images = [encoder(numbers[:4], flat @ t.T, torch.tensor([0, 4]))[0] for t in (torch.eye(3).double(), turn, -turn)]
    for image in images[1:]:
        torch.testing.assert_close(image, images[0], rtol=1e-10, atol=1e-10)


def test_rounding_does_not_choose_in_flat_and_linear_molecules():
    """Benzene and carbon dioxide in float32, turned: features agree to rounding, and forces are finite."""
    angle = torch.arange(6) * math.pi / 3
    ring = torch.stack([torch.cos(angle), torch.sin(angle), 0 * angle], 1)
    positions = torch.cat([1.39 * ring, 2.48 * ring, torch.tensor([[0, 0, -1.16], [0, 0, 0], [0, 0, 1.16]])])
    numbers, ptr = torch.tensor([6] * 6 + [1] * 6 + [8, 6, 8]), torch.tensor([0, 12, 15])
    encoder = build()
    expected = encoder(numbers, positions.double(), ptr)[0]
    for seed in range(5):
        turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)))[0]
        leaf = (positions @ turn.T).double().requires_grad_()
        scalars = encoder(numbers, leaf, ptr)[0]
        torch.testing.assert_close(scalars, expected, rtol=1e-4, atol=1e-4)
        assert torch.isfinite(torch.autograd.grad(scalars.sum(), leaf)[0]).all()


def test_features_jump_where_another_neighbour_becomes_the_next():
    """As published: an atom that is turned past another around an axis changes the torsion to that of a third."""
    encoder, jumps = build(), []

    def at(turn):
        angle = torch.tensor([1.0, 1.0 + turn, 4.0], dtype=torch.float64)
        around = torch.stack([torch.cos(angle), torch.sin(angle), torch.tensor([0.3, 0.5, 0.4]).double()], 1)
        positions = torch.cat([torch.zeros(1, 3).double(), torch.tensor([[0, 0, -1.5]]).double(), 1.4 * around])
        return encoder(torch.tensor([6, 7, 8, 9, 1]), positions, torch.tensor([0, 5]))[0]

    for turn in (0.0, 0.3):
        jumps.append(float((at(turn + 1e-4) - at(turn - 1e-4)).detach().abs().max()))
    assert jumps[0] > 20 * jumps[1]
