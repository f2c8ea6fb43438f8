"""A fine-tuned model on its own: encoder, heads and statistics as one folder, and predictions from it.

Files of the folder:

    config.json         encoder, objectives (the supervised ones), units: name -> unit of what it predicts
    model.safetensors   their parameters and statistics, by the names that they have in the run
"""

import csv
import io
import json
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError

from mspt import files
from mspt.chemistry.elements import SYMBOLS
from mspt.data.opening import open_set, sequential
from mspt.data.packing import Budget
from mspt.errors import UserError
from mspt.models import encoders
from mspt.models.pretraining import NetworkSettings
from mspt.objectives import ObjectivesSettings, Pretraining

FOLDER = "model"  # in a run folder
ENCODER = "network.encoder."


class Predictor(NamedTuple):
    """module: a Pretraining with the supervised objectives alone. units: name -> unit, where the set said one."""

    module: Pretraining
    units: dict


def save(weights, module, encoder, objectives, units, out):
    """Write a Pretraining's encoder and supervised objectives as a folder, from its full state -> out.

    weights: full float32 state by name. encoder, objectives: their settings. Each file is replaced as a whole, and
    config.json is the same at every save of a run.
    """
    kept = (ENCODER, *(f"objectives.{name}." for name in module.supervised))
    own = {name: weight.contiguous() for name, weight in weights.items() if name.startswith(kept)}
    chosen = objectives.model_dump(mode="json", include=set(module.supervised))
    config = {"encoder": encoder.model_dump(mode="json"), "objectives": chosen, "units": units}
    files.write(Path(out) / "config.json", json.dumps(config, indent=2) + "\n")
    files.write(Path(out) / "model.safetensors", safetensors.torch.save(own))
    return Path(out)


def load(folder):
    """The Predictor of a run folder or of the folder that save() wrote, on the CPU.

    Raises UserError where it is not there or cannot be read.
    """
    folder = Path(folder)
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    config, model = folder / "config.json", folder / "model.safetensors"
    for file in (config, model):
        if not file.exists():
            raise UserError(f"{file}: is not there; give a run folder of mspt finetune, or the model/ in it")
    try:
        tree = json.loads(config.read_text())
        network = NetworkSettings(encoder=encoders.parse(tree["encoder"]))
        module = Pretraining(network, ObjectivesSettings.model_validate(tree["objectives"]))
        units = dict(tree["units"])
    except (KeyError, TypeError, ValueError, ValidationError, UserError) as error:
        raise UserError(f"{config}: is not a fine-tuned model's ({' '.join(str(error).split())})") from error
    try:
        module.load_state_dict(safetensors.torch.load_file(model))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(f"{model}: does not fit config.json ({' '.join(str(error).split())})") from error
    return Predictor(module.eval(), units)


@torch.no_grad()
def predict(folder, data, out, budget_atoms=8192):
    """Write what a model predicts of every molecule of a set as out -> how many, and name -> unit.

    folder: as load's. data: a shard set or its Zarr twin. out: a CSV of key and values, or, where its name ends with
    .xyz, extended XYZ with forces too if the model has them. Runs on the GPU if there is one. Raises UserError where
    one of them cannot be read, a molecule is over the budget or has an element that the model does not know.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor, molecules = load(folder), open_set(data)
    module, largest = predictor.module.to(device), molecules.manifest["largest"]
    if largest > budget_atoms:
        raise UserError(
            f"--budget-atoms is {budget_atoms}, but a molecule of {data} has {largest}; set it to that or more"
        )
    text, names, suffix = io.StringIO(), module.labels[0], Path(out).suffix
    if suffix not in (".csv", ".xyz"):
        raise UserError(f"--out {out}: predictions are written as .csv or .xyz; give such a name")
    as_frames = suffix == ".xyz"
    if not as_frames:
        csv.writer(text, lineterminator="\n").writerow(["key", *names])
    for batch in sequential(molecules, Budget(molecules=budget_atoms, atoms=budget_atoms)):
        _refuse_unknown(module, batch, data)
        predicted = {name: values.cpu() for name, values in module.predict(batch.to(device)).items()}
        (_frames if as_frames else _rows)(text, batch, names, predicted)
    files.write(out, text.getvalue())
    return len(molecules), {name: predictor.units.get(name, "unit not stated") for name in names}


def _refuse_unknown(module, batch, data):
    """Raise UserError where a molecule has an element of whose energy the model has learnt nothing."""
    for objective in module.supervised.values():
        if found := objective.statistics.unknown(batch):
            key, symbol = found
            raise UserError(
                f"{data}: {key} holds {symbol}, which is in none of the labelled molecules that the model was trained "
                "on, so that nothing is known of its energy; leave such molecules out, or train on labels that have it"
            )


def _rows(text, batch, names, predicted):
    columns = [predicted[name].tolist() for name in names]
    csv.writer(text, lineterminator="\n").writerows(zip(batch.keys, *columns, strict=True))


def _quoted(name):
    return name if name.replace("_", "").isalnum() else '"' + name.replace('"', "'") + '"'


def _frames(text, batch, names, predicted):
    """Extended XYZ, which ASE reads: positions in Å, forces in eV/Å."""
    per_atom = torch.cat([batch.positions, *([predicted["forces"]] if "forces" in predicted else [])], 1).tolist()
    properties = "species:S:1:pos:R:3" + (":forces:R:3" if "forces" in predicted else "")
    symbols, ptr = [SYMBOLS[z] for z in batch.numbers.tolist()], batch.ptr.tolist()
    for i, key in enumerate(batch.keys):
        values = " ".join(f"{_quoted(name)}={predicted[name][i].item()!r}" for name in names)
        text.write(f'{ptr[i + 1] - ptr[i]}\nProperties={properties} key="{key}" {values} pbc="F F F"\n')
        for symbol, row in zip(symbols[ptr[i] : ptr[i + 1]], per_atom[ptr[i] : ptr[i + 1]], strict=True):
            text.write(f"{symbol} {' '.join(f'{value:.8g}' for value in row)}\n")
