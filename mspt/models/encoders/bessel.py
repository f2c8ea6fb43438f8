"""Spherical Bessel functions, with derivatives everywhere, and their roots."""

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
