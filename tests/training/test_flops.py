"""The counted operations against those that PyTorch counts as they run."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure, published
from mspt import kernels, objectives
from mspt.data.batch import MoleculeBatch
from mspt.data.keyed import Keyed
from mspt.models.encoders.egnn import EGNNSettings
from mspt.models.encoders.painn import PaiNNSettings
from mspt.models.encoders.torchmd_et import TINY, TorchMDETSettings
from mspt.models.encoders.transformer_m import TransformerMSettings
from mspt.models.pretraining import NetworkSettings
from mspt.models.specformer import SpecFormerSettings
from mspt.objectives.coord import CoordSettings
from mspt.training import flops
from tests.data.molecules import plain


class Anywhere:
    """In place of the counter's record of which module runs, which does not bear a gradient taken within a forward."""

    def __init__(self):
        self.parents = {"Global"}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def counted(function):
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Anywhere()
    with counter:
        function()
    return counter.get_total_flops()


def counted_step(module, batch, generator):
    """Of a step by the reference kernels, whose products of matrices are seen."""
    totals = module.weights(batch, generator)
    with kernels.use("reference"):
        return counted(lambda: module.loss(batch, generator, totals)[0].backward())


def test_transformer_m():
    """Molecules of one size, so that nothing is padding; the token, a nineteenth of the atoms here, is not counted."""
    settings = TransformerMSettings(layers=3, channels=256, feed_forward=256)
    model, chosen = NetworkSettings(encoder=settings), objectives.ObjectivesSettings(coord=CoordSettings())
    module, generator = objectives.Pretraining(model, chosen), Keyed(0, 0)
    batch = MoleculeBatch.from_records(plain([18] * 8))
    totals = module.weights(batch, generator)
    result = counted(lambda: module.loss(batch, generator, totals)[0].backward())
    expected = flops.training_step(model, chosen, 8, len(batch.numbers), flops.edges(batch, settings))
    assert result == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize(
    ("settings", "besides"),
    [
        (EGNNSettings(layers=3), (3 * 3 + 3) * 128),
        (EGNNSettings(layers=3, cutoff=3.0), (3 * 3 + 3) * 128),
        (PaiNNSettings(), (10 * 3 - 3) * 128 + 20 * 3 * 3 * 128 // 2 // 3),
    ],
    ids=["egnn", "egnn within a cut-off", "painn"],
)
def test_encoder_and_head(settings, besides):
    """Products of matrices alone, and their growth with the batch.

    besides: what is counted an edge that is no product of matrices. PaiNN's filters need no gradient of their input, a
    third of what is counted.
    """
    model, chosen = NetworkSettings(encoder=settings), objectives.ObjectivesSettings(coord=CoordSettings())
    module, generator = objectives.Pretraining(model, chosen), Keyed(0, 0)
    results, expected = [], []
    for molecules in (8, 24):
        batch = measure.bundled(molecules)
        results.append(counted_step(module, batch, generator))
        edges = flops.edges(batch, settings)
        total = flops.training_step(model, chosen, molecules, len(batch.numbers), edges)
        expected.append(total - 6 * edges * besides)
    assert results[1] - results[0] == pytest.approx(expected[1] - expected[0], rel=0.03)


@pytest.mark.parametrize("denoising", objectives.DENOISING)
def test_denoising(denoising):
    """Products of matrices alone, and their growth with the batch: a table of gates is the same for any."""
    settings = TorchMDETSettings(layers=3, norm="none")
    model = NetworkSettings(encoder=settings)
    chosen = objectives.ObjectivesSettings.model_validate({denoising: {}})
    module, generator = objectives.Pretraining(model, chosen), Keyed(0, 0)
    results, sizes = [], []
    for molecules in (8, 24):
        batch = measure.bundled(molecules)
        results.append(counted_step(module, batch, generator))
        sizes.append((molecules, len(batch.numbers)))
    expected = [flops.training_step(model, chosen, *size, edges=0) for size in sizes]
    assert results[1] - results[0] == pytest.approx(expected[1] - expected[0], rel=0.06)


def test_specformer():
    """Against the published way, which keeps the scores and so makes each layer's product once."""
    model = published.SpecFormer(width=256)
    batch = measure.bundled(4)
    patches = model.patches(batch.spectra)

    def step():
        predicted, readout = model(patches)
        (readout.sum() + sum(part.sum() for part in predicted.values())).backward()

    expected = 2 * 3 * 4 * flops.specformer(SpecFormerSettings(), 256)
    assert counted(step) == pytest.approx(expected, rel=0.03)


def test_utilisation():
    """Of a step that would take exactly the time of its products, 1; of one of an encoder that is not known, None."""
    model, chosen = NetworkSettings(encoder=TINY), objectives.ObjectivesSettings(coord=CoordSettings())
    engine, process = SimpleNamespace(precision="fp32"), SimpleNamespace(world_size=2, device=torch.device("cpu"))
    utilisation = flops.Utilisation(SimpleNamespace(model=model, objectives=chosen, engine=engine), process)
    utilisation.observe(MoleculeBatch.empty())
    assert utilisation.share(4, 40, 1.0) is None
    batch = measure.bundled(4)
    utilisation.observe(batch)
    edges = utilisation.edges_per_atom * 40
    assert 4 < utilisation.edges_per_atom < 32
    seconds = flops.training_step(model, chosen, 4, 40, edges) / utilisation.rate
    assert utilisation.share(4, 40, seconds) == pytest.approx(1)
    utilisation = flops.Utilisation(
        SimpleNamespace(model=SimpleNamespace(encoder=SimpleNamespace(name="other")), objectives=chosen, engine=engine),
        process,
    )
    utilisation.observe(batch)
    assert utilisation.share(4, 40, 1.0) is None


def test_matmul_rate_leaves_the_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert flops.matmul_rate("cpu", torch.float32) > 1e8
    assert torch.equal(torch.get_rng_state(), before)


def test_heads_of_predicted_spectra():
    """What they add to a step, all of it products of matrices."""
    model = NetworkSettings(encoder=TINY)
    chosen = objectives.ObjectivesSettings.model_validate({"spectrum_prediction": {"hidden": 32, "spectra": ["ir"]}})
    head = objectives.Pretraining(model, chosen).objectives["spectrum_prediction"].heads["ir"]
    molecules = torch.randn(6, TINY.channels, requires_grad=True)
    expected = 2 * 3 * 6 * flops.spectrum_heads(chosen.spectrum_prediction, TINY.channels)
    assert counted(lambda: head(molecules).sum().backward()) == expected
