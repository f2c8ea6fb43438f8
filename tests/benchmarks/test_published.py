"""The baseline of the benchmarks computes what the framework computes: same weights, noise and masks, same loss."""

import torch

from benchmarks import measure, published
from mspt import objectives
from mspt.data.keyed import Keyed
from mspt.models.encoders.torchmd_net import convert
from mspt.models.pretraining import NetworkSettings
from mspt.models.specformer import SpecFormerSettings


def weights(baseline):
    """The baseline's weights under our names."""
    encoder = convert(baseline.encoder.state_dict(), heads=4)[1]
    state = {f"network.encoder.{name}": value for name, value in encoder.items()}
    state |= {f"objectives.coord.head.{name}": value for name, value in baseline.head.state_dict().items()}
    spectra = baseline.specformer.state_dict()
    for index in range(len(baseline.specformer.layers)):
        for kind in ("weight", "bias"):
            parts = [spectra.pop(f"layers.{index}.{name}.{kind}") for name in ("q", "k", "v")]
            spectra[f"layers.{index}.qkv.{kind}"] = torch.cat(parts)
    return state | {f"network.specformer.{name}": value for name, value in spectra.items()}


def test_same_loss_as_the_framework():
    torch.manual_seed(0)
    baseline = published.Pretraining(channels=32, layers=2, heads=4, functions=16)
    with torch.no_grad():
        for parameter in baseline.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    settings = convert(baseline.encoder.state_dict(), heads=4)[0]
    ours = objectives.Pretraining(
        NetworkSettings(encoder=settings, specformer=SpecFormerSettings(norm="batch")),
        objectives.ObjectivesSettings(
            coord={}, masked_patches={}, contrast={"negatives": "micro", "directions": "molecule_to_spectrum"}
        ),
    )
    ours.load_state_dict(weights(baseline))

    batch, generator = measure.bundled(6), Keyed(0, 0)
    noise = ours.objectives["coord"].noise(batch, generator)
    masks = ours.objectives["masked_patches"].masks(batch, generator)
    totals = ours.weights(batch, generator)
    loss, sums = ours.loss(batch, generator, totals)
    with torch.no_grad():
        terms = baseline.terms(batch, noise, masks)
    for name, ours_mean in zip(ours.terms, (sums / totals).tolist(), strict=True):
        assert abs(ours_mean / float(terms[name]) - 1) < 1e-4, name
    assert abs(float(loss.detach()) / float(sum(terms.values())) - 1) < 1e-4
