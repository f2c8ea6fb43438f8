"""SphereNet: the contract of every encoder, and its basis and torsions against other ways to compute them."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from encoder_contract import EncoderContract, molecules
from torch.autograd import gradcheck, gradgradcheck

from mspt import kernels
from mspt.models import encoders
from mspt.models.encoders import spherenet, spherical, triplets


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
        torch.testing.assert_close(spherical.spherical_bessel(x, order), expected, rtol=1e-10, atol=1e-12)
    roots, factors = spherical.bessel_roots(7, 6)
    torch.testing.assert_close(roots[0], math.pi * torch.arange(1, 7).double())
    r = (torch.arange(20000).double() + 0.5) / 20000
    for order, (row, factor) in enumerate(zip(roots, factors, strict=True)):
        assert spherical.spherical_bessel(row, order).abs().max() < 1e-13
        values = factor * spherical.spherical_bessel(row * r[:, None], order)
        # Norm 1, and at right angles to each other: no root is left out.
        gram = (values * r[:, None] ** 2).T @ values / len(r)
        torch.testing.assert_close(gram, torch.eye(6).double(), rtol=0, atol=1e-6)
        assert (row.diff() > 0).all() and (row.diff() < 4.5).all()


def test_derivatives_of_bessel_functions():
    x = torch.tensor([0.0, 1e-3, 0.7, 1.999, 2.001, 9.0], dtype=torch.float64, requires_grad=True)
    for order in (0, 1, 5):
        assert gradcheck(lambda x, order=order: spherical.spherical_bessel(x + 1e-4, order), (x,))
        assert gradgradcheck(lambda x, order=order: spherical.spherical_bessel(x + 1e-4, order), (x,))


def test_harmonics():
    """Against scipy's associated Legendre functions, which have the same sign."""
    special = pytest.importorskip("scipy.special")
    rng = np.random.default_rng(0)
    theta, phi = np.arccos(rng.uniform(-1, 1, 50)), rng.uniform(0, 2 * np.pi, 50)
    unit = np.cos(theta), np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi)
    result = spherical.harmonics(*map(torch.from_numpy, unit), 7)
    expected = []
    for degree in range(7):
        norms = [
            ((2 if m else 1) * (2 * degree + 1) / (4 * np.pi) * math.factorial(degree - m) / math.factorial(degree + m))
            ** 0.5
            for m in range(degree + 1)
        ]
        parts = [norm * special.lpmv(m, degree, np.cos(theta)) for m, norm in enumerate(norms)]
        expected += [part * np.cos(m * phi) for m, part in enumerate(parts)]
        expected += [parts[m] * np.sin(m * phi) for m in range(degree, 0, -1)]
    torch.testing.assert_close(result, torch.from_numpy(np.stack(expected, -1)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("max_neighbours", [32, 4])
def test_torsions_one_by_one(max_neighbours):
    """The smallest positive torsion over all quadruplets, as it is published, against the next around the axis."""
    _, positions, ptr = molecules((6, 1, 2, 3, 9), seed=3)
    graph = kernels.radius_graph(positions, ptr, 5.0, max_neighbours, loop=False)
    into = {
        atom: [(e, int(graph.source[e])) for e in range(first, last)]
        for atom, (first, last) in enumerate(pairwise(graph.ptr.tolist()))
    }
    expected = {}
    for out, (j, i) in enumerate(zip(graph.source.tolist(), graph.target.tolist(), strict=True)):
        for edge, k in into[j]:
            if k == i:
                continue
            axis, own = positions[i] - positions[j], positions[k] - positions[j]
            normal, torsion = torch.linalg.cross(axis, own), 2 * math.pi
            for _, other in into[j]:
                if other not in (i, k):
                    plane = torch.linalg.cross(axis, positions[other] - positions[j])
                    sine = torch.linalg.cross(normal, plane) @ axis / axis.norm()
                    torsion = min(torsion, float(torch.atan2(sine, normal @ plane)) % (2 * math.pi))
            theta = math.atan2(float(normal.norm()), float(axis @ own))
            expected[edge, out] = theta, torsion
    incoming, outgoing = triplets.triplets(graph)
    assert len(incoming) == len(expected)
    axes = triplets.safe_norm(positions[graph.target] - positions[graph.source])[1]
    axes, others = axes[outgoing], -axes[incoming]
    normals = torch.linalg.cross(axes, others)
    following = triplets.next_around(axes, normals, outgoing)
    assert torch.equal(outgoing[following], outgoing)
    reference = triplets.safe_norm(normals)[1][following]
    cosine, sine = (normals * reference).sum(-1), (torch.linalg.cross(normals, reference) * axes).sum(-1)
    for place, key in enumerate(zip(incoming.tolist(), outgoing.tolist(), strict=True)):
        theta, torsion = expected[key]
        found = float(cosine[place]), float(sine[place]), float(axes[place] @ others[place])
        wanted = math.sin(theta) * math.cos(torsion), math.sin(theta) * math.sin(torsion), math.cos(theta)
        assert found == pytest.approx(wanted, abs=1e-12)


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
