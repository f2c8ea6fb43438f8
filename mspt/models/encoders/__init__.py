"""3D encoders, one file a published model.

An encoder maps (numbers [n], positions [n, 3] Å, ptr [m + 1]) to scalars [n, F] and vectors [n, 3, F] or None; it
knows nothing of spectra, objectives or training. A new one is a file with a settings class and a module, and a line
in ENCODERS.
"""

import operator
from functools import reduce
from typing import Annotated

from pydantic import TypeAdapter, ValidationError
from pydantic_core import core_schema

from mspt.errors import UserError
from mspt.models.encoders.torchmd_et import TorchMDET, TorchMDETSettings

ENCODERS = {"torchmd_et": (TorchMDETSettings, TorchMDET)}


class _ByName:
    """The settings class is chosen by `name`, be there one encoder or many (pydantic's own way needs at least two)."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source, handler):
        choices = {name: handler.generate_schema(settings) for name, (settings, _) in ENCODERS.items()}
        return core_schema.tagged_union_schema(choices, discriminator="name")


EncoderSettings = Annotated[reduce(operator.or_, (settings for settings, _ in ENCODERS.values())), _ByName]


def build(settings):
    """The encoder that settings describe."""
    return ENCODERS[settings.name][1](settings)


def parse(tree):
    """Settings from a dict such as an exported config.json holds. Raises UserError for what is not an encoder's."""
    try:
        return TypeAdapter(EncoderSettings).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"encoder settings: {key or 'name'}: {first['msg']} (got {first['input']!r})") from error
