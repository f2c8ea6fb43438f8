"""Training goes the same way whichever kernels run it."""

from pathlib import Path

import torch

from mspt import config, kernels
from mspt.data.keyed import Keyed
from mspt.data.shardset import ShardSet
from mspt.data.stream import sequential
from mspt.objectives import Pretraining
from mspt.training.schedule import learning_rate

ROOT = Path(__file__).parents[2]
SMALL = [
    "model.encoder.layers=2",
    "model.encoder.channels=16",
    "model.encoder.heads=2",
    "model.encoder.radial_functions=8",
    "model.specformer.channels=16",
    "model.specformer.heads=2",
    "model.specformer.feed_forward=32",
    "data.budget={molecules: 8, atoms: 200}",
    "schedule.peak=2.0e-4",  # losses part exponentially from any rounding, the sooner the higher the rate
]
STEPS = 200


def losses(implementation):
    """The joint loss of every step of the quickstart at a small size, on real molecules and spectra."""
    loaded = config.load(ROOT / "configs/quickstart.yaml", SMALL)
    shards = ShardSet.open(ROOT / "shards/bundled/qm9-spectra/heldout")
    batches = [batch.broadened(loaded.data.line_shapes) for batch in sequential(shards, loaded.data.budget)]
    torch.manual_seed(0)
    module = Pretraining(loaded.model, loaded.objectives)
    optimiser = torch.optim.AdamW(module.parameters(), weight_decay=0.0)
    curve = []
    with kernels.use(implementation):
        for step in range(STEPS):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(loaded.schedule, step, STEPS)
            batch, generator = batches[step % len(batches)], Keyed(0, step)
            loss, _ = module("loss", batch, generator, module.weights(batch, generator))
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), loaded.engine.clip)
            optimiser.step()
            curve.append(loss.item())
    return torch.tensor(curve, dtype=torch.float64)


def test_the_loss_curve_is_that_of_the_reference():
    fast, reference = losses("cpu"), losses("reference")
    assert ((fast - reference).abs() / reference).max() < 1e-4
    assert reference[-1] < 0.8 * reference[0]  # a curve, not a line
