"""Real spherical harmonics, with derivatives everywhere."""

import math
from functools import cache

import torch


@cache
def norms(degrees):
    """The norms of the harmonics of degree l and order m, as lists [l][m]."""
    rows = []
    for degree in range(degrees):
        row, ratio = [], 1.0  # (l − m)! / (l + m)!
        for order in range(degree + 1):
            if order:
                ratio /= (degree + order) * (degree - order + 1)
            row.append(((2 if order else 1) * (2 * degree + 1) * ratio / (4 * math.pi)) ** 0.5)
        rows.append(row)
    return rows


def spherical_harmonics(seen, degrees, dtype):
    """Real spherical harmonics of degree below degrees at unit vectors: [t, degrees²] of dtype.

    seen [3, t] float64: z, x and y. In each degree l: m = 0, then cosines of m φ for m = 1 to l, then sines for m = l
    to 1; with the sign (−1)^m of Condon and Shortley.
    """
    z, x, y = seen
    legendre = {(0, 0): torch.ones_like(z)}  # (l, m) -> P_l^m(z) / (1 − z²)^(m / 2)
    cosines, sines = [torch.ones_like(z)], [torch.zeros_like(z)]  # of m φ, times sin^m θ
    for m in range(degrees):
        if m:
            legendre[m, m] = (1 - 2 * m) * legendre[m - 1, m - 1]
            cosines, sines = (
                [*cosines, x * cosines[-1] - y * sines[-1]],
                [*sines, x * sines[-1] + y * cosines[-1]],
            )
        for degree in range(m + 1, degrees):
            before = (degree + m - 1) * legendre[degree - 2, m] if degree > m + 1 else 0.0
            legendre[degree, m] = ((2 * degree - 1) * z * legendre[degree - 1, m] - before) / (degree - m)
    values = []
    for degree, row in enumerate(norms(degrees)):
        parts = [norm * legendre[degree, m] for m, norm in enumerate(row)]
        values += [part * cosines[m] for m, part in enumerate(parts)]
        values += [parts[m] * sines[m] for m in range(degree, 0, -1)]
    return torch.stack(values).T.to(dtype).contiguous()  # far faster than into their places one by one
