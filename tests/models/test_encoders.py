"""Choice of an encoder by the name in its settings, and what any encoder can serve."""

import pytest
import torch

from benchmarks import measure
from mspt.data.keyed import Keyed
from mspt.errors import UserError
from mspt.models import encoders
from mspt.models.pretraining import NetworkSettings
from mspt.models.specformer import SpecFormerSettings
from mspt.objectives import ObjectivesSettings, Pretraining
from mspt.training.export import ENCODER, export_encoder

SMALL = [settings(channels=32, layers=2) for settings, _ in encoders.ENCODERS.values()]
BY_PATH = ("lengths.weight", "kinds", "places")
WITHOUT_VECTORS = encoders.EGNNSettings(channels=16, layers=2, vectors=False)


def test_settings_and_weights_survive_the_round_trip_through_a_folder(tmp_path):
    for settings in SMALL:
        encoder = encoders.build(settings)
        assert type(encoder) is encoders.ENCODERS[settings.name][1]
        weights = {ENCODER + name: weight for name, weight in encoder.state_dict().items()}
        loaded = encoders.load(export_encoder(weights, settings, tmp_path / settings.name))
        assert loaded.settings == settings
        assert all(
            torch.equal(one, other) for one, other in zip(loaded.parameters(), encoder.parameters(), strict=True)
        )


@pytest.mark.parametrize("settings", [*SMALL, WITHOUT_VECTORS], ids=[*encoders.ENCODERS, "without vectors"])
def test_every_parameter_learns_from_the_objectives_that_an_encoder_can_serve(settings):
    """None is left without a gradient, which would stall other ranks, and the encoder's are not zero."""
    chosen = {"masked_patches": {}, "contrast": {"negatives": "micro"}} | (
        {"coord": {}} if settings.gives_vectors else {}
    )
    specformer = SpecFormerSettings(layers=1, channels=16, heads=2, feed_forward=16)
    torch.manual_seed(0)
    module = Pretraining(
        NetworkSettings(encoder=settings, specformer=specformer), ObjectivesSettings.model_validate(chosen)
    )
    batch, generator = measure.bundled(4), Keyed(0, 0)
    loss, _ = module.loss(batch, generator, module.weights(batch, generator))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(parameter.grad is not None for parameter in module.parameters())
    idle = {name for name, parameter in module.network.encoder.named_parameters() if not parameter.grad.any()}
    # The first layer of the equivariant transformer has no vectors to map yet; these molecules have no bonds.
    assert idle <= {"layers.0.vectors.weight", "degrees.weight"} | {f"by_path.{of}" for of in BY_PATH}


def test_coord_refuses_an_encoder_without_vectors():
    with pytest.raises(UserError, match="coord needs an encoder with vectors, and egnn .* torchmd_et, egnn, painn"):
        Pretraining(NetworkSettings(encoder=WITHOUT_VECTORS), ObjectivesSettings.model_validate({"coord": {}}))


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"name": "torchmd"}, "'torchmd_et'"),
        ({}, "name"),
        ({"name": "torchmd_et", "layer": 3}, "layer"),
        ({"name": "torchmd_et", "layers": 0}, "layers"),
    ],
)
def test_what_is_no_encoder_is_named(tree, expected):
    with pytest.raises(UserError, match=expected):
        encoders.parse(tree)
