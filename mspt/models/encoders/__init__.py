"""3D encoders, one file a published model.

An encoder maps (numbers [n], positions [n, 3] Å, ptr [m + 1]) to scalars [n, F] and vectors [n, 3, F] or None; it
knows nothing of spectra, objectives or training. One whose class says sees_bonds = True takes bonds (a batch's Bonds
or None) and modes (int64 [m] or None: which molecules are seen by what) beside these, and its settings draw modes. A
new one is a file with a settings class and a module, and a line in ENCODERS.
"""

import json
import operator
from functools import reduce
from pathlib import Path
from typing import Annotated

import safetensors
import safetensors.torch
from pydantic import TypeAdapter, ValidationError
from pydantic_core import core_schema

from mspt.errors import UserError
from mspt.models.encoders.egnn import EGNN, EGNNSettings
from mspt.models.encoders.painn import PaiNN, PaiNNSettings
from mspt.models.encoders.spherenet import SphereNet, SphereNetSettings
from mspt.models.encoders.torchmd_et import TorchMDET, TorchMDETSettings
from mspt.models.encoders.transformer_m import TransformerM, TransformerMSettings

ENCODERS = {
    "torchmd_et": (TorchMDETSettings, TorchMDET),
    "egnn": (EGNNSettings, EGNN),
    "painn": (PaiNNSettings, PaiNN),
    "spherenet": (SphereNetSettings, SphereNet),
    "transformer_m": (TransformerMSettings, TransformerM),
}


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


def beside(encoder, bonds, modes=None):
    """What an encoder takes beside numbers, positions and ptr, as keywords."""
    return {"bonds": bonds, "modes": modes} if getattr(encoder, "sees_bonds", False) else {}


def parse(tree):
    """Settings from a dict such as an exported config.json holds. Raises UserError for what is not an encoder's."""
    try:
        return TypeAdapter(EncoderSettings).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"encoder settings: {key or 'name'}: {first['msg']} (got {first['input']!r})") from error


def load(folder):
    """An exported encoder, with its weights, on the CPU. folder: holds model.safetensors and config.json.

    Raises UserError where one of them is not there or cannot be read, or where they are of different encoders.
    """
    config, model = Path(folder) / "config.json", Path(folder) / "model.safetensors"
    for file in (config, model):
        if not file.exists():
            raise UserError(f"{file}: is not there; write an encoder's folder with mspt checkpoint export RUN OUT")
    tree = None
    try:
        tree = json.loads(config.read_text())
        encoder = build(parse(tree))
    except (UserError, ValueError) as error:
        if isinstance(tree, dict) and "objectives" in tree:
            raise UserError(f"{config}: is a fine-tuned model's; give the folder encoder/ of its run") from error
        raise UserError(f"{config}: {error}; export the encoder again") from error
    try:
        encoder.load_state_dict(safetensors.torch.load_file(model))
    except (RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{model}: does not fit config.json ({reason}); export the encoder again") from error
    return encoder
