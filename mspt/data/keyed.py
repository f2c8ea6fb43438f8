"""Random numbers that are a pure function of what they are for: (seed, purpose, record, counter).

The same record gets the same noise in the same epoch wherever, whenever and in whatever company it is processed.
Words are mixed by SplitMix64 (Steele et al., 2014) in wrapping int64 arithmetic, the same on every device.
"""

import hashlib
import math

import torch


def word(*parts):
    """A signed 64-bit word for any sequence of strings and integers; stable over runs and machines."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _signed(value):
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _shift(x, bits):
    """Logical right shift of int64 (>> of torch is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(state, value):
    """Fold int64 value into int64 state; tensors, or arrays of numpy, broadcast."""
    x = (state ^ value) + _GAMMA
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


class Keyed:
    """Source of random numbers for one epoch of one run."""

    def __init__(self, seed, epoch):
        self.seed, self.epoch = seed, epoch

    def bits(self, purpose, records, counters, width):
        """int64 [n, width]: row i is fixed by (seed, epoch, purpose, records[i], counters[i]).

        purpose: a string; records, counters: int64 [n].
        """
        state = torch.full_like(records, word(self.seed, self.epoch, purpose))
        state = mix(mix(state, records), counters)
        return mix(state[:, None], torch.arange(width, device=records.device))

    def uniform(self, purpose, records, counters, width, dtype=torch.float32):
        """Uniform in (0, 1), [n, width]."""
        # 53 bits in float64, never 0 or 1.
        fine = (_shift(self.bits(purpose, records, counters, width), 11).double() + 0.5) * 2.0**-53
        return fine.clamp(max=1 - 2.0**-24).to(dtype)

    def normal(self, purpose, records, counters, width, dtype=torch.float32):
        """Standard normal, [n, width] (Box-Muller)."""
        half = -(-width // 2)
        u = self.uniform(purpose, records, counters, 2 * half, torch.float64)
        radius, angle = torch.sqrt(-2 * torch.log(u[:, :half])), 2 * math.pi * u[:, half:]
        both = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], 1)
        return both[:, :width].to(dtype)
