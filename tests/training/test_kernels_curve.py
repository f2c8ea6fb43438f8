"""Training goes the same way whichever kernels run it."""

import sys
from pathlib import Path

from mspt import config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from curve import losses  # noqa: E402

SMALL = [
    "data.train=shards/bundled/qm9-spectra/heldout",
    "data.budget={molecules: 8, atoms: 200}",
    "model.encoder.layers=2",
    "model.encoder.channels=16",
    "model.encoder.heads=2",
    "model.encoder.radial_functions=8",
    "model.specformer.channels=16",
    "model.specformer.heads=2",
    "model.specformer.feed_forward=32",
    # Curves part exponentially from any rounding, the sooner the higher the rate.
    "schedule.peak=2.0e-4",
]


def test_the_loss_curve_is_that_of_the_reference():
    loaded = config.load(ROOT / "configs/quickstart.yaml", SMALL)
    fast, reference = (losses(loaded, kernels, steps=200) for kernels in ("cpu", "reference"))
    assert ((fast - reference).abs() / reference).max() < 1e-4
    assert reference[-10:].mean() < 0.6 * reference[0]  # a curve, not a line
