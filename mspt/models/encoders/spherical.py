"""Spherical Bessel functions and real spherical harmonics, with derivatives everywhere."""

from functools import cache

import numpy as np
import torch

# Below this the recurrence of the Bessel functions loses digits and the series converges fast.
SMALL, TERMS = 2.0, 14


def spherical_bessel(x, order):
    """j_l of order l at x ≥ 0 [...], float64."""
    small = x < SMALL
    # Each branch gets arguments that are fit for it: the gradient of the other is multiplied by zero, not left out.
    large, tiny = torch.where(small, SMALL, x), torch.where(small, x, 0.0)
    before, recurrence = torch.cos(large) / large, torch.sin(large) / large
    for k in range(order):
        before, recurrence = recurrence, (2 * k + 1) / large * recurrence - before
    term = torch.ones_like(tiny)
    for k in range(order):
        term = term * tiny / (2 * k + 3)
    series = term
    for k in range(1, TERMS):
        term = term * tiny.square() / (-2 * k * (2 * order + 2 * k + 1))
        series = series + term
    return torch.where(small, series, recurrence)


@cache
def bessel_roots(orders, count):
    """The first positive roots of j_0 to j_{orders − 1}, and for each a factor: both float64 [orders, count].

    By the factor, j_l(root r) has norm 1 over r from 0 to 1 with weight r².
    """
    rows = [np.pi * np.arange(1, count + orders)]  # of j_0; those of one order lie between those of the one before
    for order in range(1, orders):
        low, high = rows[-1][:-1], rows[-1][1:]
        rises = _bessel(low, order) < 0
        for _ in range(60):
            middle = (low + high) / 2
            before = (_bessel(middle, order) < 0) == rises
            low, high = np.where(before, middle, low), np.where(before, high, middle)
        rows.append((low + high) / 2)
    rows = [row[:count] for row in rows]
    factors = [2**0.5 / np.abs(_bessel(row, order + 1)) for order, row in enumerate(rows)]
    return torch.tensor(np.stack(rows)), torch.tensor(np.stack(factors))


def _bessel(x, order):
    return spherical_bessel(torch.from_numpy(x), order).numpy()


@cache
def _prefactors(degrees):
    """The norms of the harmonics of degree l and order m, as lists [l][m]."""
    rows = []
    for degree in range(degrees):
        row, ratio = [], 1.0  # (l − m)! / (l + m)!
        for order in range(degree + 1):
            if order:
                ratio /= (degree + order) * (degree - order + 1)
            row.append(((2 if order else 1) * (2 * degree + 1) * ratio / (4 * np.pi)) ** 0.5)
        rows.append(row)
    return rows


def harmonics(z, x, y, degrees):
    """Real spherical harmonics of degree below degrees at unit vectors (x, y, z), each [t] -> [t, degrees²].

    In each degree l: m = 0, then cosines of m φ for m = 1 to l, then sines for m = l to 1; with the sign (−1)^m of
    Condon and Shortley.
    """
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
    for degree, norms in enumerate(_prefactors(degrees)):
        parts = [norm * legendre[degree, m] for m, norm in enumerate(norms)]
        values += [part * cosines[m] for m, part in enumerate(parts)]
        values += [parts[m] * sines[m] for m in range(degree, 0, -1)]
    return torch.stack(values).T  # far faster than into their places one by one
