"""The loop: what a step is, and what happens around it."""

import json
import math
import resource
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import Field

from mspt.data import keyed
from mspt.data.keyed import Keyed
from mspt.data.stream import Stream
from mspt.downstream import predictor, targets
from mspt.errors import UserError
from mspt.files import write
from mspt.objectives import Pretraining
from mspt.settings import Settings
from mspt.training import checkpoint, interruption, report
from mspt.training.engine import Engine, all_reduce, gather_objects, initialise
from mspt.training.evaluation import evaluate
from mspt.training.export import export_encoder, initial_weights, read_weights
from mspt.training.flops import Utilisation
from mspt.training.interruption import Preempted
from mspt.training.metrics import Metrics
from mspt.training.progress import Progress
from mspt.training.saving import Saver
from mspt.training.validation import (
    Validation,
    check_forces,
    check_labels,
    fit_statistics,
    lacks,
    measure,
    reported,
)
from mspt.training.watchdog import Watchdog


class TrainingSettings(Settings):
    """steps: global batches in all. deterministic: bit-equal results for the same world size, at some cost in speed.

    log_every: steps between log lines. max_skipped: so many steps in a row whose loss or gradient is not finite stop
    the run.
    """

    steps: int = Field(ge=1)
    deterministic: bool = False
    log_every: int = Field(10, ge=1)
    max_skipped: int = Field(10, ge=1)


# Seconds that the slowest rank may need until a watchdog runs.
START = 600


class _Asked(Exception):
    """A signal has reached some rank while all measure."""


# What is added up over steps: molecules and atoms of the global batches, seconds of this rank's clock.
COUNTS = ("records", "atoms", "seconds", "waited")


class Trainer:
    """One run: config is the resolved configuration, its YAML text goes into the run folder."""

    def __init__(self, config, resolved):
        self.config = config
        self.dir = Path(config.run.dir)
        self.train_sets = config.data.open()
        self.heldout_set = config.data.open_part("heldout")
        timeout = config.run.hang_timeout
        # Later than the watchdog, which names the rank at fault where this breaks off with a traceback.
        self.process = initialise(patience=timeout and 2 * timeout + START)
        self.device = self.process.device
        if config.training.deterministic:
            torch.use_deterministic_algorithms(True)
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        self.module = Pretraining(config.model, config.objectives)
        self.losses = dict.fromkeys(("loss", *self.module.terms), 0.0)  # added up since the last save
        self.finite = 0  # steps of them
        keep = config.checkpoint
        if keep.keep_best is not None and keep.metric not in self.losses:
            raise UserError(
                f"checkpoint.metric={keep.metric}: this run has no such value; take one of {', '.join(self.losses)}"
            )
        self.stream = Stream(
            self.train_sets, config.data, config.seed, self.process.rank, self.process.world_size, self.module.labels
        )
        if self.module.needs_bonds:
            for shardset in [*self.train_sets, *([self.heldout_set] if self.heldout_set else [])]:
                check_bonds(shardset)
        check_forces(self.module, self.train_sets)
        newest = checkpoint.latest(self.dir)
        if newest is None:
            if config.model.init:
                initial_weights(self.module, config.model.init)
            fit_statistics(self.module, self.train_sets, config.data)
        self.engine = Engine(
            self.module,
            config.engine,
            config.schedule,
            steps=config.training.steps,
            accumulation=config.data.lanes // self.process.world_size,
            takes_forces=self.module.takes_forces,
        )
        self.units = targets.units_of(self.train_sets[0])
        self.validation = Validation(config, self.module, self.engine, self.units, self.dir)
        for shardset in (self.validation.shardset, self.heldout_set):
            check_labels(self.module, shardset)
        # Not before here: a configuration that is refused leaves no run folder.
        self.watchdog = Watchdog(self.dir, self.process, config.run.hang_timeout)
        self.utilisation = Utilisation(config, self.process)
        self.done, self.position = 0, {"epoch": 0, "step": 0}
        # Over the whole run, whatever it is interrupted by; and since the last log line.
        self.counts = dict.fromkeys(COUNTS, 0.0)
        if newest is not None:
            state = checkpoint.load(self.engine, newest)
            self._check_same_order(state, newest)
            self.done, self.position, self.counts = state.step, state.position, state.extra["counts"]
            self.validation.state = state.extra.get("validation", self.validation.state)
        self.saver = Saver(
            self.engine,
            self.dir,
            self.done if newest is not None else None,
            published=lambda step: checkpoint.prune(
                self.dir, step, keep.keep_last, keep.keep_every, keep.keep_best, keep.metric
            ),
            progressed=lambda: self.watchdog.reached(self.done),
        )
        self.stopping = False  # a signal has reached some rank; the same on all
        self.written = False  # all ranks have finished their part of a save; the same on all
        self.window = dict.fromkeys(COUNTS, 0.0)
        self.skipped = 0
        leads = self.process.rank == 0
        if leads:
            write(self.dir / "config.yaml", resolved)
        self.metrics = Metrics(self.dir, enabled=leads, start=self.done)
        self.progress = Progress(config.training.steps, self.done, enabled=leads)
        if newest is not None:
            self.progress.note(f"resuming from {newest}: step {self.done}")

    def _order(self):
        """What fixes the order of the data and the labels; a state means something only where they are the same."""
        data = self.config.data
        learns = {f"objectives.{name}": objective.learns for name, objective in self.module.supervised.items()}
        return learns | {
            "seed": self.config.seed,
            "data.lanes": data.lanes,
            "data.window": data.window,
            "data.budget": data.budget.model_dump(mode="json"),
            "data.split": data.split and data.split.model_dump(mode="json"),
            "data.limit": data.limit,
            "the sets (their indices)": [shardset.manifest["index_sha256"] for shardset in self.train_sets],
            "the sets' weights": [part.weight for part in data.parts],
        }

    def _check_same_order(self, state, newest):
        """Raise UserError where this configuration would go on with other data or labels than the checkpoint's run."""
        for name, value in self._order().items():
            then = state.extra["order"].get(name, value)  # older checkpoints do not say all
            if then != value:
                raise UserError(
                    f"{newest}: was made with {name} = {then}, now it is {value}; set it back, or start a new run.dir "
                    f"with model.init={self.dir}"
                )

    def run(self):
        """Train to the last step or until validation stops it, then evaluate, export and sum up -> the summary."""
        total = self.config.training.steps
        try:
            if self.validation.outstanding(self.done):
                self._validate()
            while self.done < total and not self.validation.stopped:
                epoch, at = self.position["epoch"], self.position["step"]
                steps = self._most(self.stream.steps(epoch))
                self._epoch(epoch, at, min(steps, at + total - self.done), steps)
        except Exception:
            # Several ranks could not: the others may be waiting for this one elsewhere.
            if self.process.world_size == 1:
                self.saver.wait()
            raise
        self.progress.close()
        self.saver.wait()
        if self.saver.saved != self.done:
            self._save()
            self.saver.wait()
        summary = self._finish()
        self.watchdog.close()
        self.metrics.close()
        return summary

    def _epoch(self, epoch, start, stop, steps):
        """Steps start to stop of an epoch that has so many steps."""
        generator = Keyed(self.config.seed, epoch)
        # Closed whatever happens: its workers would keep a process waiting that ends.
        with closing(self.stream.batches(epoch, start, stop)) as batches:
            for index in range(start, stop):
                begin = time.perf_counter()
                micro_batches = next(batches)
                waited = time.perf_counter() - begin
                self.watchdog.reached(self.done + 1)
                values = self._step(micro_batches, generator) | {"epoch": epoch}
                last = index + 1 == steps
                self.position = {"epoch": epoch + 1, "step": 0} if last else {"epoch": epoch, "step": index + 1}
                self.done += 1
                self._account(values, time.perf_counter() - begin, waited)
                if self.saver.step is not None and self.written:
                    self.saver.advance()
                if self.validation.due(self.done):
                    self._validate()
                if self.done % self.config.checkpoint.every == 0:
                    self._save()
                if self.stopping:
                    self._stop()
                if self.validation.stopped:
                    return

    def _step(self, micro_batches, generator):
        """One update from this rank's micro-batches of a global batch -> what is logged of it."""
        data = self.config.data
        batches = [batch.to(self.device).broadened(data.line_shapes, data.spectra) for batch in micro_batches]
        self.utilisation.observe(batches[0])
        means = accumulate(self.engine, self.module, batches, generator)
        result = self.engine.step()
        self._check_finite(result, batches, means)
        counts = torch.tensor(
            [[len(b.keys), len(b.numbers), b.missing, keyed.mix(b.records, 0).sum().item()] for b in batches]
        )
        # Whether to stop, and whether a save gets on, is agreed on with what is added up anyway: it costs no step
        # anything.
        states = torch.tensor([int(interruption.asked()), int(not self.saver.finished)])
        counts = torch.cat([counts.sum(0), states]).to(self.device)
        all_reduce(counts)
        molecules, atoms, missing, digest, asked, writing = counts.tolist()
        self.stopping, self.written = asked > 0, writing == 0
        return means | {
            "loss": sum(factor * means[term] for term, factor in self.module.terms.items()),
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "molecules": molecules,
            "atoms": atoms,
            "missing": missing,
            # Which records the step saw, in one number that a float can hold.
            "records_digest": digest % (1 << 52),
        }

    def _check_finite(self, result, batches, means):
        """Report a step that was skipped because it was not finite; stop the run at the configured number in a row."""
        self.skipped = self.skipped + 1 if result.skipped else 0
        if not result.skipped:
            return
        keys = [key for batch in batches for key in batch.keys]
        path = self.dir / f"not-finite-step-{self.done + 1}-rank-{self.process.rank}.json"
        row = {"step": self.done + 1, "terms": {term: str(mean) for term, mean in means.items()}, "records": keys}
        write(path, json.dumps(row) + "\n")
        self.progress.note(
            f"step {self.done + 1}: loss or gradient not finite, update skipped ({self.skipped} in a row); "
            f"the records are in {path}"
        )
        if self.skipped >= self.config.training.max_skipped:
            self.saver.wait()  # all ranks are here
            raise UserError(
                f"{self.skipped} steps in a row were not finite; records in {self.dir}/not-finite-step-*.json; "
                "lower schedule.peak or set engine.clip"
            )

    def _account(self, values, seconds, waited):
        """Add a step up, and log where a log line is due."""
        step = {"records": values["molecules"], "atoms": values["atoms"], "seconds": seconds, "waited": waited}
        for name, value in step.items():
            self.counts[name] += value
            self.window[name] += value
        if math.isfinite(values["loss"]):
            self.finite += 1
            for name in self.losses:
                self.losses[name] += values[name]
        if self.done % self.config.training.log_every and self.done != self.config.training.steps:
            return
        spent = self.window["seconds"]
        values |= {
            "molecules_per_second": self.window["records"] / spent,
            "atoms_per_second": self.window["atoms"] / spent,
            "data_wait": self.window["waited"] / spent,
            "memory_gib": memory_gib(self.device),
        }
        mfu = self.utilisation.share(self.window["records"], self.window["atoms"], spent)
        if mfu is not None:
            values["mfu"] = mfu
        self.window = dict.fromkeys(COUNTS, 0.0)
        self.progress.report(self.done, values)
        self.metrics.scalars(self.done, values)

    def _validate(self):
        """Measure on the validation set, and say what came out."""

        def between():
            self.watchdog.reached(self.done)
            if self._most(int(interruption.asked())):
                raise _Asked

        try:
            errors = self.validation.run(self.done, self.device, between)
        except _Asked:
            self._stop()
        self.metrics.scalars(self.done, {f"validation_{name}": error.mae for name, error in errors.items()})
        best = self.validation.state["step"]
        said = "the best so far" if best == self.done else f"best at step {best}"
        self.progress.note(f"step {self.done}: validation {report.errors(reported(errors, self.units))}  ({said})")
        if self.validation.stopped:
            self.progress.note(f"no better one in {self.config.evaluation.patience} measurements: training ends here")

    def _save(self):
        """Begin a save of this step; training goes on while it is written."""
        self.watchdog.reached(self.done)
        before = self.saver.step
        waited = self.saver.begin(
            self.done,
            position=self.position,
            seed=self.config.seed,
            config=self.config.model_dump(mode="json"),
            extra={"counts": self.counts, "order": self._order(), "validation": self.validation.state},
            metrics={name: value / self.finite for name, value in self.losses.items() if self.finite},
        )
        self.losses, self.finite = dict.fromkeys(self.losses, 0.0), 0
        if before is not None:
            self.progress.note(
                f"step {self.done}: waited {waited:.1f} s until the checkpoint of step {before} was written; a larger "
                f"checkpoint.every than {self.config.checkpoint.every} would leave it more time"
            )

    def _stop(self):
        """Save, where what is left of the grace allows it, and raise Preempted; all ranks come here together."""
        self.saver.wait()
        if self.saver.saved != self.done:
            grace, saved = self.config.run.grace, self.saver.saved
            seconds = self.saver.seconds  # before a save there is nothing to go by
            if self._most(seconds - interruption.left(grace)) > 0:
                if saved is None:
                    self._end(f"not saved at step {self.done}: run.grace={grace:g} is over; there is no checkpoint yet")
                self._end(
                    f"not saved at step {self.done}: the last save took {seconds:.1f} s, which is more than "
                    f"is left of run.grace={grace:g}; the checkpoint of step {saved} stays"
                )
            self._save()
            self.saver.wait()
        self._end(f"saved at step {self.done}")

    def _stop_if_asked(self):
        """Between steps, where all is saved already: raise Preempted on all ranks if a signal has reached any."""
        self.watchdog.reached(self.done)
        if self._most(int(interruption.asked())):
            self._end(f"saved at step {self.done}, the evaluation begins anew")

    def _end(self, text):
        self.watchdog.close()
        self.progress.close()
        self.metrics.close()
        raise Preempted(f"{text}; the same command goes on")

    def _finish(self):
        """Evaluate, export, draw and sum up -> the summary on rank 0."""
        config, evaluation = self.config, None
        averaged = config.engine.ema_decay is not None
        supervised = self.module.supervised
        if self.heldout_set is not None and len(supervised) < len(self.module.objectives):
            self.progress.note("evaluating on the held-out set")
            # What is measured is what is exported.
            with self.engine.ema_weights() if averaged else nullcontext():
                evaluation = evaluate(
                    self.engine,
                    self.module,
                    self.heldout_set,
                    self.train_sets,
                    config.data,
                    config.seed,
                    self.device,
                    self._stop_if_asked,
                )
        weights = self.engine.weights(ema=averaged)
        errors = self._test() if supervised else None
        if self.process.rank != 0:
            return None
        best = read_weights(self.dir / predictor.FOLDER) if supervised else weights
        export_encoder(best, config.model.encoder, self.dir / "encoder")
        train = {"steps": self.done, "parameters": sum(weight.numel() for weight in weights.values())}
        summary = report.summarise(config, train | self.counts, evaluation, self.process)
        if supervised:
            summary |= {"errors": errors, "validation": self.validation.state}
        write(self.dir / "summary.json", json.dumps(summary, indent=2) + "\n")
        for name, path in report.draw(self.dir, evaluation).items():
            self.metrics.picture(self.done, name, path)
        return summary

    def _test(self):
        """Errors of the best model on the held-out set, as reported; None where there is no such set."""
        if self.validation.state["best"] is None:
            self.validation.keep()
        if self.heldout_set is None:
            return None
        gather_objects(None)  # the model is written
        module = predictor.load(self.dir).module.to(self.device)
        errors = measure(module.predict, module, self.heldout_set, self.config.data, self.device, self._stop_if_asked)
        return reported(errors, self.units)

    def _most(self, number):
        """The largest of the ranks' numbers."""
        largest = torch.tensor(number, device=self.device)
        all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.item()


def accumulate(engine, module, batches, generator):
    """Add up the gradient of a global batch from this rank's micro-batches of it -> term -> its mean over the batch.

    engine wraps module, a Pretraining. The gradient is that of the whole batch taken at once, however it is cut.
    """
    weights = sum(module.weights(batch, generator) for batch in batches)
    all_reduce(weights)
    shares = [None] * len(batches)
    if module.two_passes:
        with torch.no_grad():
            shares = module.objectives["contrast"].shares([engine("embed", batch, generator) for batch in batches])
    sums = torch.zeros_like(weights)
    for batch, share in zip(batches, shares, strict=True):
        loss, own = engine("loss", batch, generator, weights, share)
        engine.backward(loss)
        sums += own
    all_reduce(sums)
    return dict(zip(module.terms, (sums / weights.clamp(min=1)).tolist(), strict=True))


def check_bonds(shardset):
    """Raise UserError where none of the first records of a ShardSet has its bonds."""
    if lacks(shardset, "bonds"):
        raise UserError(
            f"{shardset.folder}: its records have no bonds, which objectives.frad turns; build it from a format that "
            "has them (an SDF, qm9_raw, pcqm4mv2's SDF), or set objectives.coord instead"
        )


def memory_gib(device):
    """Peak memory of this process: on the device, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # ru_maxrss is in KiB on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def pretrain(config, resolved):
    """Run a configuration, or go on where its run folder stands; prints where the results are."""
    trainer = Trainer(config, resolved)
    summary = trainer.run()
    if summary is not None:
        print(report.sum_up(summary, trainer.dir), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
