"""Sums of rows of bytes that tell whether a row is what was written, found out while the row is copied.

NH (Black et al., UMAC, 1999): the words of 32 bits a, b, c, d, … of a row, filled up by zeros to whole steps, give
(a + k0)(b + k1) + (c + k2)(d + k3) + … modulo 2^64, each bracket modulo 2^32, with keys k from SplitMix64. Another row
has the same sum with a chance of 2^-32 at most. gather.cpp has the same in C++.
"""

from functools import cache

import numpy as np

from mspt.data import keyed

STEP = 512  # bytes; a row is filled up by one of zeros at most


@cache
def row_keys(size):
    """The keys of rows of so many bytes, two in an int64."""
    return keyed.mix(np.int64(keyed.word("rows")), np.arange((size // STEP + 1) * STEP // 8))


def row_sums(values):
    """values [m, L] of any type -> int64 [m]."""
    data = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
    keys = row_keys(data.shape[1]).view("<u4")
    words = np.pad(data, ((0, 0), (0, 4 * len(keys) - data.shape[1]))).view("<u4")
    a, b = (words + keys).reshape(len(data), -1, 2).transpose(2, 0, 1)
    return (a.astype(np.uint64) * b).sum(1, dtype=np.uint64).view(np.int64)
