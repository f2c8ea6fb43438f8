"""Spherical harmonics: against scipy's, and in C++ against the reference in float64, with two derivatives."""

import math

import numpy as np
import pytest
import torch
from agreement import TOLERANCE, error
from cpu_levels import level, threads  # noqa: F401
from torch.library import opcheck

from mspt import kernels
from mspt.kernels import reference

DEGREES = [2, 3, 7]


def unit_vectors(count, seed=0):
    """z, x and y [3, count] float64; the first ones along the axes."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(3, count, dtype=torch.float64, generator=generator)
    along = torch.cat([torch.eye(3), -torch.eye(3)], 1).double()[:, :count]
    vectors[:, : along.shape[1]] = along
    return vectors / vectors.norm(dim=0)


def test_against_scipy():
    """Against scipy's associated Legendre functions, which have the same sign."""
    special = pytest.importorskip("scipy.special")
    rng = np.random.default_rng(0)
    theta, phi = np.arccos(rng.uniform(-1, 1, 50)), rng.uniform(0, 2 * np.pi, 50)
    unit = np.cos(theta), np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi)
    result = reference.spherical_harmonics(torch.from_numpy(np.stack(unit)), 7, torch.float64)
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


def worst(count, degrees):
    with kernels.use("cpu"):
        return error(
            lambda seen: kernels.spherical_harmonics(seen, degrees, torch.float32),
            lambda seen: reference.spherical_harmonics(seen, degrees, torch.float64),
            [unit_vectors(count)], "cpu", torch.float32,
        )  # fmt: skip


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("count", [0, 1, 16, 37])
def test_float32(count, degrees):
    assert worst(count, degrees) < TOLERANCE[torch.float32]


def test_every_instruction_set(level):  # noqa: F811
    assert worst(37, 7) < TOLERANCE[torch.float32]


def test_any_number_of_threads():
    """Every vector is a thread's own: not one bit differs."""
    seen, found = unit_vectors(100), []
    for count in (1, 3):
        leaf = seen.clone().requires_grad_()
        with kernels.use("cpu"), threads(count):
            values = kernels.spherical_harmonics(leaf, 7, torch.float32)
            found.append([values, *torch.autograd.grad(values.square().sum(), leaf)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_inputs_need_not_be_contiguous():
    seen = unit_vectors(20)
    with kernels.use("cpu"):
        one, other = (kernels.spherical_harmonics(x, 4, torch.float32) for x in (seen, seen.T.contiguous().T))
    assert torch.equal(one, other)


def test_not_a_number_stays_one():
    seen = unit_vectors(20)
    seen[0, 3] = torch.nan
    with kernels.use("cpu"):
        values = kernels.spherical_harmonics(seen, 3, torch.float32)
    assert values[3, 1:].isnan().any() and values[[*range(3), *range(4, 20)]].isfinite().all()


def test_operators_are_what_they_declare():
    seen = unit_vectors(20).requires_grad_()
    opcheck(torch.ops.mspt.spherical_harmonics.default, (seen, 3))
    gradient = torch.randn(20, 9)
    opcheck(torch.ops.mspt.spherical_harmonics_backward.default, (gradient, seen, 3))
