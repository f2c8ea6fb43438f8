"""The formulas of benchmarks/costs.py against what two real ranks send, and against each other."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import costs
import ranks
import scaling

FILE = "configs/quickstart.yaml"
MOLECULES, LANES = 4, 4
# One parameter is over DeepSpeed's limit of what stays whole at ZeRO 3, all others are under it.
SMALL = [
    *scaling.DATA,
    "data.train=shards/bundled/qm9-spectra/train",
    f"data.lanes={LANES}",
    f"data.budget.molecules={MOLECULES}",
    "model.encoder.layers=1",
    "model.specformer.channels=32",
]


# ZeRO 3 last: it leaves torch patched.
RUNS = [(0, "ranks"), (1, "global"), (2, "micro"), (3, "micro"), (3, "global")]


def overrides(stage, negatives):
    return [*SMALL, f"engine.zero_stage={stage}", f"objectives.contrast.negatives={negatives}"]


@pytest.fixture(scope="module")
def counted():
    """(ZeRO stage, negatives) -> what one of two ranks sends in a step."""
    found = {}
    with ranks.Ranks(2) as pair:
        for run in RUNS:
            pair.ask(ranks.build, FILE, overrides(*run))
            found[run] = pair.ask(ranks.traffic, 1)[0]
    return found


@pytest.mark.parametrize("run", RUNS)
def test_bytes_sent_are_those_of_the_formula(counted, run):
    stage, _ = run
    model, _ = scaling.described(FILE, overrides(*run))
    messages = costs.messages(model, stage, 2, micro_batches=LANES // 2, molecules=MOLECULES)
    expected = sum(costs.sent(message, 2) for message in messages)
    print(run, counted[run]["bytes"] / expected, counted[run]["calls"])
    # Beyond it: norms, weights of the loss, barriers.
    assert counted[run]["bytes"] == pytest.approx(expected, rel=0.02)


def test_sizes_are_what_they_are_called():
    for size, about in {"7 M": 7e6, "100 M": 1e8, "1 B": 1e9}.items():
        model, _ = scaling.described(scaling.STAGE_1[0], scaling.overridden(size))
        assert model.total == pytest.approx(about, rel=0.03)


@given(st.floats(1e-6, 1e-3), st.floats(1e8, 1e12), st.integers(2, 64))
def test_fit_finds_the_interconnect(alpha, rate, count):
    link = costs.Interconnect("made up", count, (alpha, alpha), (rate, rate))
    sizes = np.logspace(2, 10, 9)
    for collective in ("all_reduce", "all_gather", "reduce_scatter"):
        seconds = [link.seconds(costs.Message(collective, size, 1), count) for size in sizes]
        assert costs.fit(sizes, seconds, count, collective) == pytest.approx((alpha, rate), rel=1e-3)


@given(st.integers(0, 3), st.integers(0, 11), st.sampled_from(["fp32", "bf16"]))
def test_more_ranks_send_more_and_hold_no_more(stage, power, precision):
    model = costs.Model((10**7, 10**5, 10**3), layers=8, precision=precision)
    few, many = 2 * 2**power, 4 * 2**power
    held = [sum(size for size, _ in costs.memory(model, stage, count).values()) for count in (few, many)]
    assert held[1] <= held[0]
    seconds = [
        sum(costs.H100.seconds(message, count) for message in costs.messages(model, stage, count))
        for count in (1, few, many)
    ]
    assert 0 == seconds[0] < seconds[1] <= seconds[2]
