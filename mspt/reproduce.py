"""The tables of a paper, row by row: what each system is trained on and fine-tuned to, run here, and printed
beside what was published.

configs/TABLE.yaml is a Table: its rows and the published numbers. configs/TABLE/ROW.yaml is a Row: the stages of its
pre-training and its fine-tuning, each a configuration of configs/ with keys set to other values.
configs/scales/SCALE.yaml is a Scale: which keys have yet other values, to run it on smaller machines.

Every run has its own folder under OUT, named by what makes it, its configuration and its data: rows that share a stage
share its run, a run that is done is not run again unless its data has changed, and one that was killed goes on.
"""

import copy
import fcntl
import functools
import hashlib
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from mspt import config
from mspt.data.shardset import MANIFEST
from mspt.errors import UserError
from mspt.files import write
from mspt.settings import Settings
from mspt.training.engine import LAUNCHED_WITH

# Where configurations look for their data; `--data` stands in for it.
DATA = "data"
SETS = ("train", "validation", "heldout")


class Stage(Settings):
    """config: from the row's folder. set: dotted keys and their values. kind: what a scale calls the stage."""

    config: str
    kind: str = "property"
    set: dict[str, Any] = Field(default_factory=dict)


class Row(Settings):
    """name: as the paper has it. stages: of pre-training, each from the encoder before. set: keys of every stage."""

    name: str
    stages: tuple[Stage, ...] = ()
    finetune: Stage
    set: dict[str, Any] = Field(default_factory=dict)


class Part(Settings):
    """What of a table is run. targets: which (null: all). labels: how many to fine-tune on -> keys that depend on it;
    none: as the configuration says.
    """

    targets: tuple[str, ...] | None = None
    labels: dict[int, dict[str, Any]] = Field(default_factory=dict)


class Scale(Settings):
    """How a table is run. runs: kind of fine-tuning -> the part of its tables; a kind that is not there is run whole.
    seeds: of fine-tuning; pre-training is run once. set: kind of stage -> keys. encoders: name -> settings that are
    other than the row's.
    """

    runs: dict[str, Part] = Field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    set: dict[str, dict[str, Any]] = Field(default_factory=dict)
    encoders: dict[str, dict[str, Any]] = Field(default_factory=dict)


class Table(Settings):
    """title; targets; rows: files of its folder, in order. published: row -> target -> number. key: which key of a
    configuration a target is the value of; null: every run has all targets.
    """

    title: str
    key: str | None = "objectives.property.target"
    targets: tuple[str, ...] = Field(min_length=1)
    rows: tuple[str, ...] = Field(min_length=1)
    published: dict[str, dict[str, float]] = Field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A training run: a configuration with overrides, in a folder that they name. after: what it starts with."""

    config: Path
    overrides: tuple[str, ...]
    folder: Path
    after: "Run | None" = None

    @property
    def done(self):
        return (self.folder / "summary.json").exists()

    def command(self, processes):
        """The command that runs it, as so many ranks."""
        alone = [sys.executable, "-m", "mspt.cli"]
        ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        start = alone if processes == 1 else [*ranks, "-m", "mspt.cli"]
        return [*start, "pretrain", "--config", str(self.config), *self.overrides, f"run.dir={self.folder}"]


@dataclass(frozen=True)
class Cell:
    """One number of the table that is run: a row's error of a target after so many labels (None: the full number)."""

    row: str
    target: str
    labels: int | None
    seed: int
    run: Run


def read(kind, path):
    """A Table or Row from its file. Raises UserError where it cannot be read or does not fit."""
    try:
        return kind.model_validate(yaml.safe_load(Path(path).read_text()))
    except (OSError, UnicodeDecodeError) as error:
        known = {
            Scale: "give a scale of configs/scales, such as small",
            Table: "give a table of configs/, such as table1",
            Row: "the table's rows names it: write it, or take it out there",
        }
        raise UserError(f"{path}: cannot be read ({error}); {known[kind]}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {key or 'the file'}: {first['msg']} (got {first['input']!r})") from error


class Plan:
    """The runs of a table at a scale.

    table: configs/TABLE.yaml. scale: a file of configs/scales/, without its ending. data: folder of the shard sets.
    out: folder of the runs. only: what to take of rows, targets, labels and seeds (name -> values; what is not named is
    taken whole).

    Raises UserError where the table, a row or a configuration does not fit, or only names what there is not.
    """

    def __init__(self, table, scale, data, out, only):
        self.path, self.data, self.out = Path(table), Path(data), Path(out)
        # Hundreds of runs are made from a few files and learn from a few sets, whose manifests may be long.
        self._tree, self._identity = functools.cache(config.read), functools.cache(identity)
        self.table = read(Table, self.path)
        self.scale = read(Scale, self.path.parent / "scales" / f"{scale}.yaml")
        kind = read(Row, self._row_file(self.table.rows[0])).finetune.kind
        self.part = self.scale.runs.get(kind, Part())
        targets = tuple(t for t in self.table.targets if self.part.targets is None or t in self.part.targets)
        self.rows = self._chosen("rows", self.table.rows, only)
        self.targets = self._chosen("targets", targets, only)
        self.labels = self._chosen("labels", tuple(self.part.labels) or (None,), only)
        self.seeds = self._chosen("seeds", self.scale.seeds, only)
        self.names = {name: read(Row, self._row_file(name)).name for name in self.table.rows}
        self.cells = [cell for row in self.rows for cell in self._cells(row)]
        self._made_of, self._partly = (table, scale, data, out), any(only.values())

    @functools.cached_property
    def whole(self):
        """The Plan of all of the table: what is said of it is said of all, whichever part is run."""
        return Plan(*self._made_of, {}) if self._partly else self

    def _row_file(self, name):
        return self.path.with_suffix("") / f"{name}.yaml"

    def _chosen(self, name, there, only):
        wanted = only.get(name)
        for value in wanted or ():
            if value not in there:
                raise UserError(f"--{name}: {value} is not in this table; it has {', '.join(map(str, there))}")
        return tuple(value for value in there if not wanted or value in wanted)

    def _cells(self, name):
        row = read(Row, self._row_file(name))
        before = None
        for stage in row.stages:
            before = self._run(row, stage, {}, before, "pretrained")
        for target in self.targets:
            for labels in self.labels:
                own = {} if labels is None else {"data.limit": labels} | self.part.labels[labels]
                if self.table.key:
                    own = own | {self.table.key: target}
                for seed in self.seeds:
                    keys = own | {"seed": seed}
                    yield Cell(name, target, labels, seed, self._run(row, row.finetune, keys, before, "finetuned"))

    def _run(self, row, stage, own, before, family):
        """A stage as a Run whose folder is named by everything that makes it."""
        path = Path(os.path.normpath(self.path.with_suffix("") / stage.config))
        keys = row.set | stage.set
        left_out = tuple(f"{key}." for key, value in keys.items() if value is None)
        # What a row leaves out, a scale's keys for a part of it do not bring back.
        scaled = self.scale.set.get(stage.kind, {})
        keys |= {key: value for key, value in scaled.items() if not key.startswith(left_out)} | own
        loaded = self._load(path, keys)
        if family == "finetuned" and loaded.data.heldout is None and loaded.data.split is None:
            raise UserError(f"{path}: holds nothing out to measure on; set data.heldout or data.split")
        for name, value in self.scale.encoders.get(loaded.model.encoder.name, {}).items():
            keys[f"model.encoder.{name}"] = value
        for name in SETS:
            folder = getattr(loaded.data, name)
            if folder and Path(folder).parts[0] == DATA:
                keys[f"data.{name}"] = str(self.data.joinpath(*Path(folder).parts[1:]))
        keys["model.init"] = None if before is None else str(before.folder)
        resolved = self._load(path, keys).model_dump(mode="json")
        del resolved["run"]
        resolved["sets"] = [self._identity(folder) for name in SETS if (folder := resolved["data"][name])]
        # Wherever the data and the other runs lie, and however that is written, it is the same run.
        resolved["model"]["init"] = before and before.folder.name
        for name in SETS:
            folder = resolved["data"][name]
            if folder and Path(folder).is_relative_to(self.data):
                resolved["data"][name] = str(Path(folder).relative_to(self.data))
        digest = hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:10]
        overrides = tuple(_override(*item) for item in keys.items())
        return Run(path, overrides, self.out / family / f"{path.stem}-{digest}", before)

    def _load(self, path, keys):
        """config.load with keys and values in place of overrides."""
        tree = copy.deepcopy(self._tree(path))
        for item in copy.deepcopy(keys).items():
            config.put(tree, *item)
        return config.parse(tree, path)

    @property
    def runs(self):
        """All runs, each once, in an order in which each comes after the one that it starts from."""
        found = {}
        for cell in self.cells:
            chain, run = [], cell.run
            while run is not None:
                chain.append(run)
                run = run.after
            found |= {run.folder: run for run in reversed(chain)}
        return list(found.values())

    def perform(self, jobs, processes, say=print):
        """Do the runs that are not done, so many at a time, each as so many ranks -> those that failed.

        What others start from comes first, as they wait for it. What starts from a run that failed is not tried.
        """
        if processes > 1:
            self._check_ranks(processes)
        begun_from = {run.after.folder for run in self.runs if run.after is not None}
        waiting = sorted((run for run in self.runs if not run.done), key=lambda run: run.folder not in begun_from)
        failed, running, ended, total = {}, {}, 0, len(waiting)
        with ThreadPoolExecutor(jobs) as pool, _abandoned(pool):
            while waiting or running:
                blocked = [run for run in waiting if run.after is not None and run.after.folder in failed]
                failed |= {run.folder: "the stage before it failed" for run in blocked}
                ready = [run for run in waiting if run.after is None or run.after.done]
                waiting = [run for run in waiting if run not in ready and run not in blocked]
                running |= {pool.submit(self._perform, run, jobs, processes): run for run in ready}
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run, code, ended = running.pop(future), future.result(), ended + 1
                    if code or not run.done:
                        failed[run.folder] = f"ended with {code}; see {run.folder}.log"
                    say(f"{ended}/{total} {run.folder.name} {failed.get(run.folder, 'done')}")
        return failed

    def _check_ranks(self, processes):
        for run in self.runs:
            try:
                config.load(run.config, run.overrides).data.check_ranks(processes)
            except UserError as error:
                raise UserError(
                    f"--processes {processes}: {run.config}: {error}; a scale of your own (configs/scales) may set it"
                ) from error

    def check_found(self):
        """Raise UserError where there are runs, but none that this table names: they are of other data."""
        if not self.results() and any(self.out.glob("finetuned/*/summary.json")):
            raise UserError(
                f"{self.out}: has runs, but none of this table's configurations on the sets in --data {self.data}; "
                "give the folder of the sets that they were run on"
            )

    def _perform(self, run, jobs, processes):
        """Run it, what it says into FOLDER.log -> its exit code."""
        threads = max(1, (os.cpu_count() or 1) // (jobs * processes))
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        with Path(f"{run.folder}.log").open("ab") as log:
            # What rows of other parts and tables share may be under way there: it is waited for, not run beside itself.
            fcntl.flock(log, fcntl.LOCK_EX)
            if run.done:
                return 0
            # Without what says that this process is a rank of some run: its runs are runs of their own.
            own = {name: value for name, value in os.environ.items() if name not in (*LAUNCHED_WITH, "LOCAL_RANK")}
            environment = {"OMP_NUM_THREADS": str(threads)} | own
            return subprocess.run(run.command(processes), stdout=log, stderr=log, env=environment).returncode

    def results(self):
        """row -> labels -> target -> {mae: one a seed that is done, unit, count}, of the whole table."""
        found = {}
        for cell in self.whole.cells:
            if cell.run.done:
                errors = json.loads((cell.run.folder / "summary.json").read_text())["errors"][cell.target]
                place = found.setdefault(cell.row, {}).setdefault(cell.labels, {}).setdefault(
                    cell.target, {"mae": [], "unit": errors["unit"], "count": errors["count"]}
                )  # fmt: skip
                place["mae"].append(errors["mae"])
        return found

    def text(self):
        """All rows, for the chosen targets and labels: what came out here, its deviation, and what was published."""
        results = self.results()
        units = {t: each["unit"] for of in results.values() for by in of.values() for t, each in by.items()}
        lines = [self.table.title]
        for labels in self.labels:
            head = ["", *(f"{target} / {units[target]}" if target in units else target for target in self.targets)]
            body = [head]
            for row in self.table.rows:
                own = results.get(row, {}).get(labels, {})
                body.append([self.names[row], *(_number(own.get(target)) for target in self.targets)])
                published = self.table.published.get(row, {})
                body.append(["  published", *(f"{published[t]:g}" if t in published else "" for t in self.targets)])
            widths = [max(len(line[column]) for line in body) for column in range(len(head))]
            lines += ["", "all labels" if labels is None else f"{labels} labels"]
            lines += ["  ".join(map(str.ljust, line, widths)).rstrip() for line in body]
        return "\n".join(lines)

    def save(self):
        """Write all results as OUT/TABLE.json -> its path. Parts of a table that run side by side take turns."""
        path = self.out / f"{self.path.stem}.json"
        rows = {
            row: {"all" if labels is None else str(labels): by for labels, by in of.items()}
            for row, of in self.results().items()
        }
        text = json.dumps({"title": self.table.title, "published": self.table.published, "rows": rows}, indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            write(path, text)
        return path


@contextmanager
def _abandoned(pool):
    """Where it ends by an error or an interruption, what is not begun is not begun any more."""
    try:
        yield
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def identity(folder):
    """What tells a shard set from others, as it says itself; None where none can be read there, such as one yet to be
    built, behind a URL, or of another kind.
    """
    try:
        return json.loads(Path(folder, MANIFEST).read_text()).get("index_sha256")
    except (OSError, ValueError, AttributeError):
        return None


def _number(found):
    if found is None:
        return "not run"
    mean = statistics.fmean(found["mae"])
    spread = f" ± {statistics.stdev(found['mae']):.2g}" if len(found["mae"]) > 1 else ""
    return f"{mean:.4g}{spread}"


def _override(key, value):
    """As the command line takes it; JSON is YAML, but for the pairs of escapes it has for what is beyond U+FFFF."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"
