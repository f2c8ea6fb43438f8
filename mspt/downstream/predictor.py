"""A fine-tuned model on its own: encoder, heads and statistics as one folder, and predictions from it.

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
    """Write a CSV of key and predicted values of every molecule of a set as out -> how many, and the units.

    folder: as load's. data: a shard set or its Zarr twin. Runs on the GPU if there is one. Raises UserError where one
    of them cannot be read or a molecule is over the budget.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor, molecules = load(folder), open_set(data)
    module, largest = predictor.module.to(device), molecules.manifest["largest"]
    if largest > budget_atoms:
        raise UserError(
            f"--budget-atoms is {budget_atoms}, but a molecule of {data} has {largest}; set it to that or more"
        )
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names = module.labels[0]
    table.writerow(["key", *names])
    for batch in sequential(molecules, Budget(molecules=budget_atoms, atoms=budget_atoms)):
        predicted = module.predict(batch.to(device))
        columns = [predicted[name].tolist() for name in names]
        table.writerows([key, *values] for key, *values in zip(batch.keys, *columns, strict=True))
    files.write(out, text.getvalue())
    return len(molecules), {name: predictor.units.get(name, "unit not stated") for name in names}
