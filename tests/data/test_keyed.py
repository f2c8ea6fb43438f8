"""Keyed random numbers: the generator against plain integers, stability, independence, moments."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mspt.data import keyed
from mspt.data.keyed import Keyed

WORD = (1 << 64) - 1
int64 = st.integers(-(1 << 63), (1 << 63) - 1)


def signed(value):
    return value - (1 << 64) if value >> 63 else value


def splitmix(state):
    """Next output of SplitMix64 at this state, in unsigned 64-bit arithmetic (Steele, Lea & Flood, 2014)."""
    z = (state + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def test_reference_gives_the_published_sequence():
    """First outputs for seed 1234567, as published with the reference implementations."""
    gamma, outputs = 0x9E3779B97F4A7C15, [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix(1234567 + i * gamma & WORD) for i in range(3)] == outputs


@settings(deadline=None, max_examples=50)
@given(int64, int64)
def test_mixing_is_splitmix(state, value):
    mixed = keyed.mix(torch.tensor([state]), torch.tensor([value]))
    assert mixed.dtype == torch.int64
    assert mixed.item() == signed(splitmix((state ^ value) & WORD))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1 << 31), st.integers(-1, 1000), int64, st.integers(0, 1 << 40))
def test_bits_are_a_chain_of_mixes(seed, epoch, record, counter):
    bits = Keyed(seed, epoch).bits("noise", torch.tensor([record]), torch.tensor([counter]), 3)[0].tolist()
    state = keyed.word(seed, epoch, "noise") & WORD
    for value in (record, counter):
        state = splitmix(state ^ (value & WORD))
    assert bits == [signed(splitmix(state ^ index)) for index in range(3)]


FROZEN_WORD = 7453360832820230922
FROZEN_BITS = [[5058837454932265748, -6579182917807496655], [-8293525766434811529, -21175237987673920]]
FROZEN_NORMAL = [
    [-2.196127490764853, -0.0064445064475039185, -0.3042770507082257],
    [0.6754872974399939, -0.13793509973743387, -0.12103909461612146],
]


def test_frozen_values():
    """A change of these changes every noise, mask and order: runs would no longer resume to the same."""
    assert keyed.word("qm9-000001") == FROZEN_WORD
    records, counters = torch.tensor([keyed.word("a"), keyed.word("b")]), torch.tensor([0, 5])
    assert Keyed(0, 0).bits("noise", records, counters, 2).tolist() == FROZEN_BITS
    normal = Keyed(7, 3).normal("noise", records, counters, 3, torch.float64)
    torch.testing.assert_close(normal, torch.tensor(FROZEN_NORMAL, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_words_are_64_bit_and_differ():
    words = {keyed.word("record", i) for i in range(1000)} | {keyed.word(i) for i in range(1000)}
    assert len(words) == 2000
    assert all(-(1 << 63) <= word < 1 << 63 for word in words)
    assert keyed.word("a", "bc") != keyed.word("ab", "c")
    assert keyed.word(1, 23) != keyed.word(12, 3)


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(8)), st.integers(1, 8), st.sampled_from(["bits", "uniform", "normal"]))
def test_a_record_has_its_numbers_in_any_company(order, size, method):
    records = torch.tensor([keyed.word(f"key-{i}") for i in range(8)])
    counters = torch.arange(8) % 3
    draw = getattr(Keyed(5, 2), method)
    together, chosen = draw("noise", records, counters, 4), torch.tensor(order[:size])
    assert torch.equal(draw("noise", records[chosen], counters[chosen], 4), together[chosen])


@pytest.mark.parametrize("method", ["bits", "uniform"])
def test_first_numbers_do_not_depend_on_how_many_are_drawn(method):
    records, counters = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    draw = getattr(Keyed(0, 0), method)
    assert torch.equal(draw("mask", records, counters, 7)[:, :3], draw("mask", records, counters, 3))


def test_everything_in_the_key_matters():
    record, counter = torch.tensor([11]), torch.tensor([4])
    draws = [
        Keyed(0, 0).bits("noise", record, counter, 1),
        Keyed(1, 0).bits("noise", record, counter, 1),
        Keyed(0, 1).bits("noise", record, counter, 1),
        Keyed(0, 0).bits("mask", record, counter, 1),
        Keyed(0, 0).bits("noise", record + 1, counter, 1),
        Keyed(0, 0).bits("noise", record, counter + 1, 1),
        Keyed(0, 0).bits("noise", counter, record, 1),
    ]
    assert len({draw.item() for draw in draws}) == len(draws)


# 40 000 numbers: standard errors below are those of so many, and the bounds are five of them.
ROWS, WIDTH = 2000, 20
COUNT = ROWS * WIDTH


@pytest.mark.parametrize("keyed_by", ["records", "counters"])
def test_moments_of_uniform(keyed_by):
    row, zero = torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64)
    records, counters = (row, zero) if keyed_by == "records" else (zero, row)
    u = Keyed(0, 0).uniform("mask", records, counters, WIDTH, torch.float64)
    assert 0 < u.min()
    assert u.max() < 1
    for power in range(1, 5):
        spread = math.sqrt((1 / (2 * power + 1) - 1 / (power + 1) ** 2) / COUNT)
        assert (u**power).mean().item() == pytest.approx(1 / (power + 1), abs=5 * spread)
    uncorrelated(u)


@pytest.mark.parametrize("keyed_by", ["records", "counters"])
def test_moments_of_normal(keyed_by):
    row, zero = torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64)
    records, counters = (row, zero) if keyed_by == "records" else (zero, row)
    x = Keyed(0, 0).normal("noise", records, counters, WIDTH, torch.float64)
    # E x^k and Var x^k = E x^2k − (E x^k)^2 of a standard normal.
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert (x**power).mean().item() == pytest.approx(expected, abs=5 * math.sqrt(variance / COUNT))
    uncorrelated(x)


def uncorrelated(x):
    """Neither columns nor neighbouring rows of [ROWS, WIDTH] have to do with each other."""
    z = (x - x.mean()) / x.std()
    between_columns = (z.T @ z / ROWS - torch.eye(WIDTH)).fill_diagonal_(0).abs().max()
    assert between_columns < 5.5 / math.sqrt(ROWS)
    assert (z[1:] * z[:-1]).mean().abs() < 5 / math.sqrt(COUNT)


def test_types_and_shapes():
    records = counters = torch.arange(4)
    for method in ("uniform", "normal"):
        draw = getattr(Keyed(0, 0), method)
        assert draw("noise", records, counters, 3).dtype == torch.float32
        fine = draw("noise", records, counters, 3, torch.float64)
        assert fine.dtype == torch.float64
        torch.testing.assert_close(draw("noise", records, counters, 3), fine.float())
        assert draw("noise", records[:0], counters[:0], 3).shape == (0, 3)
    single = Keyed(0, 0).uniform("mask", torch.arange(1000), torch.zeros(1000, dtype=torch.int64), 100)
    assert 0 < single.min()
    assert single.max() < 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_bits():
    records, counters = torch.arange(100) * 12345678901, torch.arange(100)
    on_device = Keyed(3, 1).bits("noise", records.cuda(), counters.cuda(), 5)
    assert torch.equal(on_device.cpu(), Keyed(3, 1).bits("noise", records, counters, 5))
