"""The knots on which the radial gates are tabulated, and the cubic spline between them.

A gate is a smooth function of one number, the distance. Its values at G knots are the coefficients' images under a
fixed tridiagonal matrix; between knots the spline is a sum of four coefficients. Unlike cubic Hermite interpolation
it needs no slopes (half the rows for the same error, h⁴/384 of the fourth derivative) and its second derivative is
continuous, so that forces and what is learnt from them are smooth.

Legend: G rows of the table, K radial functions, P pairs.
"""

import math
from typing import NamedTuple

import torch

# Knots beyond both ends of [0, cutoff]: what is assumed there fades by 0.27 a knot.
MARGIN = 10


class RadialBasis(NamedTuple):
    """K functions exp(−β (e^{−αr} − μ_k)²) φ(r), α = 5 / cutoff, and φ the cosine cut-off (Unke & Meuwly, 2019).

    As published: μ even in [e^{−cutoff}, 1], β = (2 / K (1 − e^{−cutoff}))^{−2}. knots: of the table of gates over
    [0, cutoff], or None to evaluate the gates at every distance.
    """

    functions: int
    cutoff: float
    knots: int | None

    def evaluate(self, distance, dtype):
        """distance [e] Å, float64 -> [e, K] in dtype."""
        first = math.exp(-self.cutoff)
        means = torch.linspace(first, 1, self.functions, dtype=distance.dtype, device=distance.device)
        # β is large: the difference must be taken before digits are dropped.
        x = (torch.exp(distance * (-5.0 / self.cutoff))[:, None] - means).to(dtype)
        # Tails that float32 holds as denormals would slow a matrix product down tenfold: they end at e^{−40}.
        exponent = (-((2 / self.functions * (1 - first)) ** -2) * x.square()).clamp(min=-40)
        return _fade(distance, self.cutoff).to(dtype)[:, None] * torch.exp(exponent)

    def coordinate(self, distance):
        """Where a distance [P] lies among the table's rows, in rows: dense where the functions are narrow."""
        x = distance * (5.0 / self.cutoff)
        return MARGIN + (0.15 * x - torch.expm1(-x)) * (self.knots - 1) / _LENGTH

    @property
    def rows(self):
        """G."""
        return self.knots + 2 * MARGIN


_LENGTH = 0.75 - math.expm1(-5.0)


def _fade(distance, cutoff):
    return 0.5 * (torch.cos(distance * (math.pi / cutoff)) + 1)


def cosine_cutoff(distance, cutoff):
    """φ(r) = ½ (cos(π r / cutoff) + 1) inside the cut-off, 0 outside."""
    return _fade(distance, cutoff) * (distance < cutoff)


def functions_at_knots(basis, device):
    """The radial functions at the table's rows, [G, K] float32."""

    def make():
        rows = torch.arange(basis.rows, dtype=torch.float64, device=device)
        low, high = torch.full_like(rows, -basis.cutoff), torch.full_like(rows, 20 * basis.cutoff)
        for _ in range(80):
            middle = (low + high) / 2
            below = basis.coordinate(middle) < rows
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        values = basis.evaluate((low + high) / 2, torch.float64)
        return torch.where(values.abs() < 1e-12, 0.0, values).to(torch.float32)  # as to denormals

    return _once(("functions", basis, device), make)


def inverse(rows, dtype, device):
    """The matrix [G, G] that takes a spline's values at the knots to its coefficients; symmetric.

    The inverse of tridiagonal (1, 4, 1) / 6, with mirrored ends.
    """

    def make():
        row = torch.arange(rows, device=device)
        apart = (row[:, None] - row).abs()
        ends = (apart == 0) & ((row == 0) | (row == rows - 1))
        matrix = 4.0 * (apart == 0) + 1.0 * (apart == 1) + 1.0 * ends
        return torch.linalg.inv(matrix.double() / 6).to(dtype)

    return _once(("inverse", rows, dtype, device), make)


_made = {}


def _once(key, make):
    """What make returns, made once; but a tensor that only stands for one, within a tracer, must not outlive it."""
    if key in _made:
        return _made[key]
    tensor = make()
    if type(tensor) is torch.Tensor:
        _made[key] = tensor
    return tensor


def locate(coordinate, rows):
    """First row [P] (int64) of the four that a coordinate [P] needs, and its fraction [P] within the knots."""
    first = (coordinate.detach().floor().long() - 1).clamp(0, rows - 4)
    return first, coordinate - (first + 1)


def weights(fraction):
    """Weights [P, 4] of the four coefficients around a fraction [P] of a knot's width (cubic B-spline)."""
    t, u = fraction, 1 - fraction
    return torch.stack([u**3, 4 - 6 * t**2 + 3 * t**3, 4 - 6 * u**2 + 3 * u**3, t**3], -1) / 6


def interpolate(table, coordinate):
    """table [H, G, C] of coefficients, coordinate [P] -> values [P, H, C]."""
    first, fraction = locate(coordinate, table.shape[1])
    weight = weights(fraction).to(table.dtype)
    rows = first[:, None] + torch.arange(4, device=first.device)
    return torch.einsum("hprc,pr->phc", table[:, rows], weight)
