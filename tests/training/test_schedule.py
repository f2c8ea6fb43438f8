"""Learning rates: the published schedule at its corners, and properties that every schedule has."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mspt.training.schedule import ScheduleSettings, learning_rate

PUBLISHED = ScheduleSettings(kind="cosine", warmup=10_000, peak=4e-4, final=1e-7)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 4e-8), (4999, 2e-4), (9999, 4e-4), (10_000, 4e-4), (399_999, 1e-7)],
)
def test_published_schedule(step, expected):
    assert learning_rate(PUBLISHED, step, 400_000) == pytest.approx(expected, rel=1e-9)


def test_halfway_between_peak_and_final():
    for kind in ("linear", "cosine"):
        schedule = ScheduleSettings(kind=kind, warmup=10, peak=1.0, final=0.5)
        assert learning_rate(schedule, 60, 111) == pytest.approx(0.75)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 20), st.integers(1, 60), st.floats(0, 1e-3))
def test_rises_then_never_rises_again_and_stays_in_range(kind, warmup, steps, final):
    schedule = ScheduleSettings(kind=kind, warmup=warmup, peak=1e-3, final=final)
    rates = [learning_rate(schedule, step, steps) for step in range(steps)]
    rise, fall = rates[:warmup], rates[warmup:]
    assert all(a < b for a, b in zip(rise, rise[1:], strict=False))
    assert all(a >= b for a, b in zip(fall, fall[1:], strict=False))
    assert all(0 < rate <= 1e-3 * (1 + 1e-12) for rate in rates[:-1])
    if len(fall) > 1:
        assert rates[-1] == pytest.approx(1e-3 if kind == "constant" else final)
