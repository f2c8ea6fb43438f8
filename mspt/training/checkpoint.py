"""Checkpoints: sharded, published by one rename, and readable at any ZeRO stage and world size.

RUN/checkpoints/step-00000123/ holds meta.json and one rank-00000.safetensors per rank that wrote. A rank's file holds
one-dimensional runs of elements, each called KIND/PARAMETER@START: elements of the flattened parameter from START on,
in full precision. KIND is weight, exp_avg, exp_avg_sq (AdamW's moments) or ema. Together the files hold every element
once. Beside them: buffer/NAME (rank 0) and random/DEVICE, the states of the rank's random number generators.
"""

import json
import logging
import re
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open

from mspt.errors import UserError
from mspt.settings import Settings
from mspt.training.engine import gather_objects, rank_and_size
from mspt.training.saving import PARTIAL, SCHEMA, Saver, checksum

log = logging.getLogger(__name__)


class CheckpointSettings(Settings):
    """every: steps between checkpoints. keep_last: so many newest stay; keep_every: and each at a multiple of it;
    keep_best: and so many whose metric is lowest.

    metric: loss, or a term of it as the log names them; a checkpoint's value is the mean over the steps since the save
    before it.
    """

    every: int = Field(1000, ge=1)
    keep_last: int = Field(3, ge=1)
    keep_every: int | None = Field(None, ge=1)
    keep_best: int | None = Field(None, ge=1)
    metric: str = "loss"


class OtherSchema(UserError):
    """A checkpoint of another version."""


@dataclass(frozen=True)
class Restored:
    """What a checkpoint says beside the engine's state: steps done, position in the data, what save() was given."""

    step: int
    position: dict
    seed: int
    config: dict
    extra: dict


def save(engine, run_dir, step, **state):
    """Write RUN/checkpoints/step-… from all ranks in parallel and publish it -> its path. All ranks call it.

    step: steps done. state: as Saver.begin() takes it; a run keeps a Saver and does not wait. Raises UserError on every
    rank where any of them cannot write; older checkpoints are untouched then.
    """
    saver = Saver(engine, run_dir)
    saver.begin(step, **state)
    saver.wait()
    return _folder(run_dir) / f"step-{step:08d}"


def latest(run_dir):
    """Path of the newest whole checkpoint of a run folder; None where there is none. All ranks of a run call it.

    A checkpoint with a file missing, of the wrong size or of the wrong checksum is passed over, with a warning. Raises
    UserError where there are checkpoints but none is whole.
    """
    rank, world_size = rank_and_size()
    # One rank looks, so that all agree on what is there whatever a shared file system shows them.
    candidates = gather_objects(_published(run_dir) if rank == 0 else None)[0]
    for directory in reversed(candidates):
        _check_schema(directory)
        fault = next(filter(None, gather_objects(_fault(directory, rank, world_size))), None)
        if fault is None:
            return directory
        if rank == 0:
            log.warning("DAMAGED CHECKPOINT, going back to the one before it: %s", fault)
    if candidates:
        raise UserError(
            f"{_folder(run_dir)}: none of {len(candidates)} checkpoints is whole ({fault}); restore one, "
            "or remove the folder to start anew"
        )
    return None


def load(engine, directory):
    """Bring engine to the state of a checkpoint, whatever stage and world size wrote it -> Restored. All ranks call it.

    Each rank reads the elements it holds. A moving average that the checkpoint lacks starts from its weights. Raises
    UserError where the checkpoint is of another model or damaged.
    """
    directory = Path(directory)
    meta = read_meta(directory)
    _check_model(directory, meta, engine.shapes)
    reader = _Reader(directory, meta)
    for fragment in engine.fragments:
        for kind, elements in engine.fragment_state(fragment).items():
            source = "weight" if kind == "ema" and not meta["ema"] else kind
            reader.read(source, fragment.name, fragment.start, elements)
    for name, buffer in engine.buffers().items():
        buffer.copy_(reader.whole("buffer", name))
    if meta["world_size"] == engine.process.world_size:
        reader.restore_random(engine.process.rank)
    engine.updates, engine.done = meta["updates"], meta["step"]
    engine.refresh()
    return Restored(meta["step"], meta["position"], meta["seed"], meta["config"], meta["extra"])


def averaged(directory):
    """Full state of the module on the CPU, with the moving average of the weights where the run kept one: what is
    exported and measured of a run, and what another starts from.

    Raises UserError where the checkpoint is damaged.
    """
    return read_weights(directory, ema=read_meta(directory)["ema"])


def read_weights(directory, ema=False):
    """Full state of the module on the CPU, weights or their moving average, from the files alone.

    Raises UserError where the checkpoint is damaged or keeps no moving average.
    """
    directory = Path(directory)
    fault = _fault(directory, 0, 1)
    if fault:
        raise UserError(f"{fault}; restore the file, or give another checkpoint")
    meta = read_meta(directory)
    if ema and not meta["ema"]:
        raise UserError(f"{directory}: no moving average in this checkpoint (engine.ema_decay); take its weights")
    reader = _Reader(directory, meta)
    state = {}
    for name, shape in meta["parameters"].items():
        kind = "ema" if ema else "weight"
        state[name] = torch.empty(shape, dtype=reader.dtype(kind, name))
        reader.read(kind, name, 0, state[name].view(-1))
    return state | {name: reader.whole("buffer", name) for kind, name in reader.pieces if kind == "buffer"}


def prune(run_dir, newest, keep_last, keep_every=None, keep_best=None, metric="loss"):
    """Remove all checkpoints that nothing keeps; one rank calls it.

    Kept are the newest keep_last, those at multiples of keep_every steps, and the keep_best with the lowest metric (of
    equals the newest). One that cannot be removed is left, with a warning. newest: the step of the one just saved; what
    is there of later steps latest() has found damaged: it counts for nothing, and is replaced when the run comes there.
    """
    there = [directory for directory in _published(run_dir) if _step(directory) <= newest]
    values = {directory: _metric(directory, metric) for directory in there} if keep_best else {}
    measured = [directory for directory in reversed(there) if values.get(directory) is not None]
    best = sorted(measured, key=values.get)[:keep_best] if keep_best else []
    for directory in there[:-keep_last]:
        if directory not in best and (keep_every is None or _step(directory) % keep_every):
            try:
                # First out of its name: a half-removed one must not look like a damaged one.
                shutil.rmtree(directory.rename(directory.with_name(directory.name + PARTIAL)))
            except OSError as error:
                log.warning("%s: an old checkpoint that could not be removed: %s", directory, error)


class _Reader:
    """Elements of parameters from the files of a checkpoint, wherever they lie."""

    def __init__(self, directory, meta):
        self.directory = directory
        self.files = {name: self._open(directory / name) for name in meta["files"]}
        self.pieces = defaultdict(list)  # (kind, name) -> [(start, length, key, file)]
        for file in self.files.values():
            for key in file.keys():
                kind, _, name = key.partition("/")
                name, _, start = name.rpartition("@") if kind not in ("buffer", "random") else (name, "", 0)
                if kind != "random":
                    shape = file.get_slice(key).get_shape()
                    self.pieces[kind, name].append((int(start), shape[0] if shape else 1, key, file))

    @staticmethod
    def _open(path):
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: {error}; this checkpoint is damaged, use the one before it") from error

    def read(self, kind, name, start, out):
        """Fill out [length] with the elements from start on of a parameter's kind."""
        found, end = 0, start + len(out)
        for piece, length, key, file in self.pieces[kind, name]:
            begin, stop = max(start, piece), min(end, piece + length)
            if begin < stop:
                out[begin - start : stop - start] = file.get_slice(key)[begin - piece : stop - piece]
                found += stop - begin
        if found != len(out):
            raise UserError(f"{self.directory}: {len(out) - found} elements of {kind} of {name} are not there; damaged")

    def whole(self, kind, name):
        """A tensor that one rank wrote whole."""
        if (kind, name) not in self.pieces:
            raise UserError(f"{self.directory}: no {kind} {name}; this checkpoint is of another model")
        _, _, key, file = self.pieces[kind, name][0]
        return file.get_tensor(key)

    def dtype(self, kind, name):
        _, _, key, file = self.pieces[kind, name][0]
        return file.get_slice(key)[:0].dtype

    def restore_random(self, rank):
        file = self.files[f"rank-{rank:05d}.safetensors"]
        torch.set_rng_state(file.get_tensor("random/cpu"))
        if torch.cuda.is_available() and "random/cuda" in file.keys():
            torch.cuda.set_rng_state(file.get_tensor("random/cuda"))


def _metric(directory, name):
    """The number of that name that was saved with a checkpoint; None where there is none."""
    try:
        return read_meta(directory)["metrics"].get(name)
    except UserError:
        return None  # damaged; it stays or goes by its step


def _folder(run_dir):
    return Path(run_dir) / "checkpoints"


def _published(run_dir):
    """Folders of checkpoints under their final names, oldest first."""
    folder = _folder(run_dir)
    found = folder.iterdir() if folder.is_dir() else []
    return sorted((path for path in found if re.fullmatch(r"step-\d+", path.name)), key=_step)


def _step(directory):
    return int(directory.name.removeprefix("step-"))


def _fault(directory, rank, world_size):
    """What is wrong with a checkpoint, or None; the ranks share out the files whose checksums they compute."""
    try:
        files = read_meta(directory)["files"]
    except UserError as error:
        return str(error)
    for index, (name, expected) in enumerate(files.items()):
        path = directory / name
        try:
            size = path.stat().st_size if path.exists() else None
            if size != expected["bytes"]:
                found = "missing" if size is None else f"{size} bytes"
                return f"{path}: {found}, should have {expected['bytes']} bytes"
            if index % world_size == rank and checksum(path) != expected["xxh3_128"]:
                return f"{path}: its content is not what was written (XXH3 differs)"
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"
    return None


def read_meta(directory):
    """What meta.json of a checkpoint holds. Raises UserError where it cannot be read, or is of another schema."""
    path = Path(directory) / "meta.json"
    try:
        meta = json.loads(path.read_text())
        schema = meta["schema"]
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; give the folder of a checkpoint (RUN/checkpoints/step-…)") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error!r}); this checkpoint is damaged") from error
    if schema != SCHEMA:
        raise OtherSchema(
            f"{path}: schema {schema}, this version of mspt reads {SCHEMA}; use the version that wrote it"
        )
    return meta


def _check_schema(directory):
    """Raise UserError on all ranks where a checkpoint is of another version: it is not damaged."""
    fault = None
    if rank_and_size()[0] == 0:
        try:
            read_meta(directory)
        except OtherSchema as error:
            fault = str(error)
        except UserError:
            pass  # damaged: what to do then is latest's to say
    fault = gather_objects(fault)[0]
    if fault:
        raise UserError(fault)


def _check_model(directory, meta, shapes):
    there = {name: tuple(shape) for name, shape in meta["parameters"].items()}
    for name in [*shapes, *there]:
        if there.get(name) != shapes.get(name):
            say = [f"has shape {list(s[name])}" if name in s else "is missing" for s in (there, shapes)]
            raise UserError(
                f"{directory}: checkpoint of another model: parameter {name} {say[0]} there and {say[1]} here; "
                "set model as in its meta.json, or take another run.dir"
            )
