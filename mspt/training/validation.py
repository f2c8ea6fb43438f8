"""Errors against labels: on the validation set while a model is fine-tuned, on the test set at its end."""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from pydantic import Field, model_validator
from torch import nn

from mspt.downstream import predictor
from mspt.downstream.targets import reporting
from mspt.errors import UserError
from mspt.objectives.forces import KCAL_MOL
from mspt.settings import Settings
from mspt.training.engine import all_reduce, gather_objects, rank_and_size
from mspt.training.evaluation import share

FIRST = 1000  # records that are looked at to know what a set has


class EvaluationSettings(Settings):
    """every: steps between measurements on the validation set; null: none. The model of the best one is kept. patience:
    so many in a row without a better one end the run; null: they do not.
    """

    every: int | None = Field(None, ge=1)
    patience: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _patience_needs_every(self):
        if self.patience and not self.every:
            raise ValueError("patience counts measurements; set every too")
        return self


@dataclass(frozen=True)
class Error:
    """Of one target over so many labels (forces count by component), in its unit: mean absolute, root mean square;
    baseline: mean absolute, by the statistics of the training part alone. unknown: labels left out, of molecules with
    an element that is in no label of the training part.
    """

    count: int
    mae: float
    rmse: float
    baseline: float
    unknown: int = 0


def reported(errors, units):
    """name -> Error as name -> dict of its parts, in the unit of published tables, and that unit.

    units: name -> unit of the labels. Energies that come with forces are in kcal/mol, as tables of MD17 are.
    """
    result = {}
    for name, error in errors.items():
        unit, factor, _ = reporting(name, units)
        if "forces" in errors and (name == "forces" or unit == "meV"):
            unit, factor = "kcal/mol/Å" if name == "forces" else "kcal/mol", KCAL_MOL
        scaled = {part: getattr(error, part) * factor for part in ("mae", "rmse", "baseline")}
        result[name] = {"count": error.count, **scaled, "unit": unit}
        if error.unknown:
            result[name]["unknown"] = error.unknown
    return result


@torch.no_grad()
def measure(predict, module, shardset, data, device, between=lambda: None):
    """Every rank takes its share of a set -> name -> Error, the same on all.

    predict: maps a batch to what module.predict does; module: a Pretraining. data: DataSettings. between: called before
    each batch, as often on every rank.
    """
    sums = {}
    for batch in share(shardset, data, device, labels=module.labels):
        between()
        baseline = module.baseline(batch)
        for name, values in predict(batch).items():
            total = sums.setdefault(name, torch.zeros(5, dtype=torch.float64, device=device))
            truth = batch.forces if name == "forces" else batch.targets.get(name)
            if truth is not None:
                known = truth.isfinite() & ~baseline[name].isinf()
                unknown = (truth.isfinite() & ~known).sum()
                error, simple = ((part - truth)[known].double().abs() for part in (values, baseline[name]))
                total += torch.stack([known.sum(), error.sum(), error.square().sum(), simple.sum(), unknown])
    errors = {}
    for name, total in sums.items():
        all_reduce(total)
        count, absolute, square, simple, unknown = total.tolist()
        if count == 0:
            raise UserError(
                f"{shardset.folder}: no record has {name}, which the model is to be measured by"
                + (", and only elements that the labels to train on have" if unknown else "")
            )
        errors[name] = Error(int(count), absolute / count, math.sqrt(square / count), simple / count, int(unknown))
    return errors


def lacks(shardset, name):
    """Whether the first records of a ShardSet are all without something, such as forces: a set has it for all or, with
    few exceptions, for none."""
    return all(getattr(record, name) is None for record in shardset.records(range(min(len(shardset), FIRST))))


def check_forces(module, shardsets):
    """Raise UserError where a Pretraining learns from forces and ShardSets have none."""
    if shardsets and module.labels[1] and all(lacks(shardset, "forces") for shardset in shardsets):
        raise UserError(
            f"{shardsets[0].folder}: no record has forces, which objectives.forces is about; build it from a format "
            "that has them (md17), or set objectives.property instead"
        )


def check_labels(module, shardset):
    """Raise UserError where a Pretraining is to be measured on a set (or None) that lacks one of its labels."""
    check_forces(module, [shardset] if shardset is not None else [])
    there = shardset.manifest["targets"] if shardset is not None else module.labels[0]
    for name in module.labels[0]:
        if name not in there:
            raise UserError(f"{shardset.folder}: no record has the target {name}; it has {', '.join(there) or 'none'}")


def fit_statistics(module, shardsets, settings):
    """Fit a Pretraining's statistics to what shardsets hold on one rank; all ranks call it and have them then.

    settings: DataSettings. Raises UserError on all ranks where a label or a spectrum to be learnt is nowhere.
    """
    parts, fault = nn.ModuleList(each for each in module.objectives.values() if hasattr(each, "fit")), None
    if not len(parts):
        return
    if rank_and_size()[0] == 0:
        try:
            for objective in parts:
                objective.fit(shardsets, settings)
        except UserError as error:
            fault = str(error)
    fault, buffers = gather_objects((fault, dict(parts.named_buffers())))[0]
    if fault:
        raise UserError(fault)
    for name, buffer in parts.named_buffers():
        buffer.copy_(buffers[name])


class Validation:
    """Measurements during a run, what is kept of the best, and when to stop. state: goes into checkpoints.

    Raises UserError where evaluation.every asks for what there is not.
    """

    def __init__(self, config, module, engine, units, run_dir):
        self.config, self.module, self.engine, self.units = config, module, engine, units
        self.out = run_dir / predictor.FOLDER
        self.state = {"best": None, "step": None, "since": 0, "measured": None}
        self.shardset = None
        if config.evaluation.every is None:
            return
        if not module.supervised:
            raise UserError("evaluation.every measures against labels; set objectives.property or objectives.forces")
        self.shardset = config.data.open_part("validation")
        if self.shardset is None:
            raise UserError("evaluation.every needs a validation set; set data.validation or data.split.validation")

    def due(self, step):
        return self.shardset is not None and step % self.config.evaluation.every == 0

    def outstanding(self, step):
        """Whether a run that ended after this step did so before it was measured."""
        return step > 0 and self.due(step) and self.state.get("measured", step) != step

    @property
    def stopped(self):
        """Whether patience has run out."""
        patience = self.config.evaluation.patience
        return patience is not None and self.state["since"] >= patience

    def run(self, step, device, between):
        """Measure after a step and keep the model if it is the best -> name -> Error. All ranks call it."""
        averaged = self.engine.ema is not None
        self.engine.eval()
        with self.engine.ema_weights() if averaged else nullcontext():
            errors = measure(
                lambda batch: self.engine("predict", batch),
                self.module,
                self.shardset,
                self.config.data,
                device,
                between,
            )
        self.engine.train()
        metric = sum(each.metric(errors) for each in self.module.supervised.values())
        best = self.state["best"]
        self.state = self.state | {"measured": step}
        if math.isfinite(metric) and (best is None or metric < best):
            self.state = self.state | {"best": metric, "step": step, "since": 0}
            self.keep()
        else:
            self.state = self.state | {"since": self.state["since"] + 1}
        return errors

    def keep(self):
        """Write the model as it is now; all ranks call it."""
        weights = self.engine.weights(ema=self.engine.ema is not None)
        if weights is not None:
            predictor.save(
                weights, self.module, self.config.model.encoder, self.config.objectives, self.units, self.out
            )
