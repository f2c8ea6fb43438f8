"""The table of gates: its spline against the gates themselves."""

import pytest
import torch
from torch.nn.functional import silu

from mspt.kernels import RadialBasis, reference, spline


def gates(basis, distance, weight, bias):
    return silu(basis.evaluate(distance, torch.float64) @ weight.T + bias)


@pytest.mark.parametrize(("knots", "value", "slope"), [(256, 1e-5, 4e-4), (384, 2e-6, 2e-4), (1024, 6e-8, 6e-6)])
def test_error_of_the_table(knots, value, slope):
    """At the published 64 functions and 5 Å, over the distances of molecules and at the self-loop's zero."""
    torch.manual_seed(0)
    basis = RadialBasis(64, 5.0, knots)
    distance = torch.cat([torch.zeros(1), 0.9 + 4.1 * torch.rand(2000)]).double().requires_grad_()
    weight, bias = torch.randn(128, 64, dtype=torch.float64) / 8, torch.randn(128, dtype=torch.float64)
    rows = spline.functions_at_knots(basis, torch.device("cpu")).double()
    table = reference.arrange(silu(rows @ weight.T + bias), 1, True)
    results = spline.interpolate(table, basis.coordinate(distance))[:, 0], gates(basis, distance, weight, bias)
    slopes = [torch.autograd.grad(result.sum(), distance)[0] for result in results]
    assert (results[0] - results[1]).norm() < value * results[1].norm()
    assert (slopes[0] - slopes[1]).norm() < slope * slopes[1].norm()


@pytest.mark.parametrize("cutoff", [2.5, 5.0, 10.0])
def test_rows_stand_at_whole_coordinates(cutoff):
    basis = RadialBasis(16, cutoff, 100)
    ends = basis.coordinate(torch.tensor([0.0, cutoff], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([10.0, 109.0], dtype=torch.float64))
    assert len(spline.functions_at_knots(basis, torch.device("cpu"))) == basis.rows == 120


def test_the_spline_and_its_slopes_are_smooth():
    """Up to the second derivative: what forces, and what is learnt from them, are made of."""
    torch.manual_seed(0)
    table = torch.randn(1, 12, 3, dtype=torch.float64)
    at = torch.arange(2.0, 9.0, dtype=torch.float64)
    sides = []
    for side in (-1e-9, 1e-9):
        coordinate = (at + side).requires_grad_()
        value = spline.interpolate(table, coordinate)[:, 0]
        first = torch.autograd.grad(value.sum(), coordinate, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), coordinate)[0]
        sides.append((value, first, second))
    for left, right in zip(*sides, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-7)


def test_coefficients_pass_through_the_values():
    torch.manual_seed(0)
    values = torch.randn(30, 4, dtype=torch.float64)
    table = reference.arrange(values, 2, True)
    at = torch.arange(2, 28)
    found = spline.interpolate(table, at.double()).flatten(1)
    torch.testing.assert_close(found, values[at])
