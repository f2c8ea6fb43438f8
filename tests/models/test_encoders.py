"""Choice of an encoder by the name in its settings."""

import pytest

from mspt.errors import UserError
from mspt.models import encoders


def test_settings_survive_the_round_trip_through_a_file():
    for settings_class, encoder_class in encoders.ENCODERS.values():
        settings = settings_class(layers=1)
        assert encoders.parse(settings.model_dump(mode="json")) == settings
        assert isinstance(encoders.build(settings), encoder_class)


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
