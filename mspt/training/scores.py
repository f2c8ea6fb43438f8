"""Errors of fine-tuned models on a set, run by run, and their spread over runs that differ in the seed."""

import statistics
from pathlib import Path

import torch
import yaml
from pydantic import ValidationError

from mspt.data.packing import Budget
from mspt.data.stream import DataSettings
from mspt.downstream import predictor
from mspt.errors import UserError
from mspt.training.report import left_out
from mspt.training.validation import measure, reported

# Where a set is given that no run's configuration knows.
BUDGET = Budget(molecules=8192, atoms=8192)


def score(folder, data=None):
    """Errors of a fine-tuned model: name -> count, mae, rmse, baseline and unit as reported.

    folder: a run folder, or a model out of one. data: a shard set; None: what the run's configuration holds out.
    Raises UserError where one of them cannot be read.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = predictor.load(folder)
    settings = (
        _settings(Path(folder)) if data is None else DataSettings(train=data, heldout=data, lanes=1, budget=BUDGET)
    )
    shardset = settings.open_part("heldout")
    if shardset is None:
        raise UserError(f"{folder}/config.yaml: nothing is held out (data.heldout, data.split); give --data SET")
    module = found.module.to(device)
    errors = measure(module.predict, module, shardset, settings, device)
    return reported(errors, found.units)


def spread(scores):
    """Over scores of several folders: name -> mean and deviation (of one run) of the mae, how many runs, unit."""
    result = {}
    for name in dict.fromkeys(name for score in scores.values() for name in score):
        own = [score[name] for score in scores.values() if name in score]
        values = [each["mae"] for each in own]
        if len(own) > 1:
            deviation = statistics.stdev(values)
            result[name] = {
                "mae": statistics.fmean(values), "deviation": deviation, "runs": len(own), "unit": own[0]["unit"]
            }  # fmt: skip
    return result


def table(scores):
    """Scores of folders, and their spread, as lines of text."""
    rows = [("", "", "MAE", "RMSE", "baseline", "labels")]
    for folder, score in scores.items():
        for name, each in score.items():
            numbers = [f"{each[part]:.4g} {each['unit']}" for part in ("mae", "rmse", "baseline")]
            rows.append((str(folder), name, *numbers, f"{each['count']}{left_out(each)}"))
    for name, each in spread(scores).items():
        value = f"{each['mae']:.4g} ± {each['deviation']:.2g} {each['unit']}"
        rows.append((f"mean of {each['runs']} runs", name, value, "", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _settings(folder):
    """The DataSettings of a run's resolved configuration."""
    path = folder / "config.yaml"
    try:
        return DataSettings.model_validate(yaml.safe_load(path.read_text())["data"])
    except OSError as error:
        raise UserError(f"{path}: is not there, so that no set is known to measure on; give --data SET") from error
    except (yaml.YAMLError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{path}: is not a run's configuration ({' '.join(str(error).split())})") from error
