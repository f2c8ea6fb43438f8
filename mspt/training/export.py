"""The encoder out of a run or out of TorchMD-Net's checkpoint, and weights of one run into another."""

import json
import pickle
from pathlib import Path

import safetensors.torch
import torch

from mspt.downstream.predictor import ENCODER
from mspt.errors import UserError
from mspt.files import write
from mspt.models import encoders
from mspt.models.encoders import torchmd_net
from mspt.training import checkpoint, loading


def export_encoder(weights, settings, out):
    """Write the encoder's part of a full state as out/model.safetensors with out/config.json -> out.

    weights: full float32 state by parameter name. settings: the encoder's.
    """
    encoder = {
        name.removeprefix(ENCODER): weight.contiguous() for name, weight in weights.items() if name.startswith(ENCODER)
    }
    write(Path(out) / "config.json", json.dumps(settings.model_dump(mode="json"), indent=2) + "\n")
    write(Path(out) / "model.safetensors", safetensors.torch.save(encoder))
    return Path(out)


def export_run(run, out):
    """Export the encoder of a run folder's newest checkpoint -> out.

    Raises UserError where the folder has no checkpoint.
    """
    newest = loading.newest(run)
    config = checkpoint.read_meta(newest)["config"]
    return export_encoder(checkpoint.averaged(newest), encoders.parse(config["model"]["encoder"]), out)


def import_torchmd_net(path, out):
    """Write the encoder of a checkpoint of TorchMD-Net (Lightning's .ckpt, or a state dict) as an exported one -> out.

    Heads, neighbours and vector cut-off come from its hyper_parameters, else are the published 8, 32 and off. The file
    is read without running code from it. Raises UserError where it cannot be, or where the model is another.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, LookupError, ValueError) as error:
        raise UserError(f"{path}: cannot read the checkpoint ({error}); give a .ckpt or a state dict") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than tensors and plain values, which is not read: it could run code; save its "
            'torch.load(...)["state_dict"] with torch.save where you trust it, and give that'
        ) from error
    made = held.get("hyper_parameters", {}) if isinstance(held, dict) else None
    state = held.get("state_dict", held) if isinstance(held, dict) else None
    if not isinstance(made, dict) or not isinstance(state, dict):
        raise UserError(f"{path}: is no checkpoint of TorchMD-Net; give a .ckpt or a state dict")
    try:
        settings, weights = torchmd_net.convert(
            state,
            heads=made.get("num_heads", 8),
            max_neighbours=made.get("max_num_neighbors", 32),
            vector_cutoff=made.get("vector_cutoff", False),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return export_encoder({ENCODER + name: weight for name, weight in weights.items()}, settings, out)


def initial_weights(module, source):
    """Start module (a Pretraining) from source: a run folder, a checkpoint, an exported encoder or fine-tuned model.

    The encoder must be there whole; objectives that both sides have go on with theirs, all else keeps its fresh
    weights. Raises UserError where source is none of these, or its encoder is another.
    """
    weights, own = read_weights(source), module.state_dict()
    for name, tensor in own.items():
        if name.startswith(ENCODER):
            found = tuple(weights[name].shape) if name in weights else "missing"
            if found != tuple(tensor.shape):
                raise UserError(
                    f"model.init={source}: {name} is {found} there and {tuple(tensor.shape)} here; "
                    "set model.encoder as in that run"
                )
    module.load_state_dict(
        {name: weights[name] for name in own if name in weights and weights[name].shape == own[name].shape},
        strict=False,
    )


def read_weights(source):
    """Weights by the names that they have in a run, from any of the sources of initial_weights."""
    source = Path(source)
    if (source / "model.safetensors").exists():
        try:
            weights = safetensors.torch.load_file(source / "model.safetensors")
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{source / 'model.safetensors'}: cannot be read ({error}); export it again") from error
        if any(name.startswith(ENCODER) for name in weights):  # a fine-tuned model
            return weights
        return {ENCODER + name: weight for name, weight in weights.items()}
    newest = source if (source / "meta.json").exists() else checkpoint.latest(source)
    if newest is None:
        raise UserError(f"model.init={source}: no checkpoint and no model.safetensors there; run stage 1 first")
    return checkpoint.averaged(newest)
