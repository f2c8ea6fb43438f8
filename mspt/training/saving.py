"""A checkpoint written while training goes on.

begin() copies this rank's part of the state to the host; training waits for that alone. A thread then writes the copy.
Once all ranks have written theirs, a thread of rank 0 publishes the whole. These threads touch files only: they talk to
no other rank, because collectives of two threads of a rank may reach the others in another order. Instead the trainer
adds up after each step, in a sum that it makes anyway, how many ranks have not `finished`; when none is left, all call
advance(). Files alone could not say it: a shared file system may show them late, and a full disk not at all.

The copy is the file that is to be written, byte for byte: format of safetensors, whose own writer copies each tensor
once more and holds the interpreter's lock meanwhile. It takes the size of the rank's file of the host's memory for the
whole run: 12 bytes a parameter, 16 with a moving average, divided by the number of ranks at every ZeRO stage; beside a
GPU, where PyTorch pins it, rounded up to a power of two.
"""

import copy
import functools
import json
import math
import os
import platform
import shutil
import subprocess
import threading
import time
from importlib.metadata import version
from pathlib import Path

import torch
import xxhash

from mspt.errors import UserError
from mspt.files import write
from mspt.training.engine import all_reduce, gather_objects
from mspt.training.image import host_image

SCHEMA = 2
PARTIAL = ".partial"  # at the end of the name of a folder that is being written or removed
CHUNK = 1 << 24  # bytes that are written and hashed at a time
FLUSH = 1 << 28  # bytes after which they are put on the disk, so that a long write shows that it gets on
POLL = 1.0  # seconds between the ranks' questions to each other while they wait
THREAD = "checkpoint"  # name of the threads that write


class Saver:
    """Saves of a run, one at a time; what a checkpoint holds is said in checkpoint.py.

    saved: step of the newest one there. published(step): called on rank 0 after each, in the thread. progressed():
    called while the ranks wait and something is being written. All ranks make it and call its methods together; making
    it removes what a killed run has left half-written.
    """

    def __init__(self, engine, run_dir, saved=None, *, published=lambda step: None, progressed=lambda: None):
        self.engine, self.process, self.saved = engine, engine.process, saved
        self.folder = Path(run_dir) / "checkpoints"
        self.published, self.progressed = published, progressed
        self.step = None  # of the checkpoint that is being saved
        self.seconds = 0.0  # that the last one took this rank, what it waited for others left out
        self._spent, self._written = 0.0, 0  # seconds of this save, bytes of all saves
        self._thread = self._result = self._error = None
        self._image, self._places = host_image(self._tensors(), engine.process.device)
        if self.process.rank == 0:
            self._start(self._remove_leftovers)
        self._agree()

    @property
    def finished(self):
        """Whether this rank has nothing left to do before advance(); True where nothing is being saved."""
        return self._thread is None or not self._thread.is_alive()

    def begin(self, step, *, position, seed, config, extra, metrics=None):
        """Copy the state and begin to write RUN/checkpoints/step-… -> seconds waited for the save before this one.

        step: steps done. position, config and extra: dicts as JSON holds them. metrics: name -> number to choose the
        best checkpoints by. Raises UserError where the save before has failed.
        """
        begin = time.monotonic()
        waited = 0.0
        if self.step is not None:
            self.wait()
            waited = time.monotonic() - begin
        engine = self.engine
        meta = {
            "schema": SCHEMA,
            "step": step,
            "updates": engine.updates,
            "position": position,
            "seed": seed,
            "config": config,
            "extra": extra,
            "metrics": {name: value for name, value in (metrics or {}).items() if math.isfinite(value)},
            "world_size": self.process.world_size,
            "zero_stage": engine.stage,
            "precision": engine.settings.precision,
            "ema": engine.ema is not None,
            "parameters": {name: list(shape) for name, shape in engine.shapes.items()},
        }
        self._meta = copy.deepcopy(meta)  # the caller goes on counting
        self._copy()
        self.step, self._spent, self._publishing = step, time.monotonic() - begin - waited, False
        self._start(self._write)
        return waited

    def advance(self):
        """Take the next part of the save, once all ranks have finished -> the checkpoint's path if it was the last.

        Raises UserError on every rank where any of them could not write; older checkpoints are untouched then.
        """
        final = self._final()
        step, self.step = self.step, None  # a save that has failed is over
        parts = self._agree(final)
        if self._publishing:
            self.saved, self.seconds = step, self._spent
            return final
        self.step, self._publishing = step, True
        if self.process.rank == 0:
            self._start(lambda: self._publish(final, parts))
        return None

    def wait(self):
        """Return once the checkpoint that is being saved, if any, is published; raises as advance() does."""
        before = None
        while self.step is not None:
            if self._thread is not None:
                self._thread.join(POLL)
            state = torch.tensor([int(not self.finished), self._written], device=self.process.device)
            all_reduce(state)
            busy, written = state.tolist()
            if written != before:
                self.progressed()
            before = written
            if not busy:
                self.advance()

    def _final(self):
        return self.folder / f"step-{self.step:08d}"

    def _tensors(self):
        """What this rank alone holds: key in its file -> tensor on the device."""
        engine, rank = self.engine, self.process.rank
        own = engine.fragments
        if engine.stage == 0:  # every rank holds everything: each writes its share
            own = [fragment.share(rank, self.process.world_size) for fragment in own]
        tensors = {}
        for fragment in own:
            if fragment.length:
                for kind, elements in engine.fragment_state(fragment).items():
                    tensors[f"{kind}/{fragment.name}@{fragment.start}"] = elements
        if rank == 0:
            tensors |= {f"buffer/{name}": buffer for name, buffer in engine.buffers().items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if self.process.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        return tensors

    @torch.no_grad()
    def _copy(self):
        for key, tensor in self._tensors().items():
            self._places[key].copy_(tensor, non_blocking=True)
        if self.process.device.type == "cuda":
            torch.cuda.synchronize(self.process.device)

    def _start(self, action):
        """Do action in a thread; _agree() has what became of it."""

        def work():
            begin = time.monotonic()
            try:
                self._result = action()
            except Exception as error:  # handed to all ranks by _agree()
                self._error = error
            self._spent += time.monotonic() - begin

        # A daemon: a run that has failed does not stay for a write that nobody will publish.
        self._thread = threading.Thread(target=work, name=THREAD, daemon=True)
        self._thread.start()

    def _agree(self, final=None):
        """Once all ranks' threads are done -> their results by rank; raises where any has failed."""
        if self._thread is not None:
            self._thread.join()
        result, error = self._result, self._error
        self._thread = self._result = self._error = None
        outcomes = gather_objects((result, None if error is None else str(error) or repr(error)))
        if error is not None and not isinstance(error, OSError):
            raise error
        for rank, (_, fault) in enumerate(outcomes):
            if fault:
                raise UserError(
                    f"{final or self.folder}: not saved, rank {rank} says: {fault}; older checkpoints are untouched: "
                    "make room, then start the same command again"
                )
        return [result for result, _ in outcomes]

    def _remove_leftovers(self):
        for leftover in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover)

    def _write(self):
        """Write the copy -> (file name, bytes, checksum)."""
        final = self._final()
        aside = final.with_name(final.name + PARTIAL)
        aside.mkdir(parents=True, exist_ok=True)
        path, digest, unflushed = aside / f"rank-{self.process.rank:05d}.safetensors", xxhash.xxh3_128(), 0
        image = memoryview(self._image.numpy())
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for start in range(0, len(image), CHUNK):
                chunk = image[start : start + CHUNK]
                digest.update(chunk)
                while chunk:
                    count = os.write(descriptor, chunk)
                    chunk = chunk[count:]
                    self._written += count
                    unflushed += count
                if unflushed >= FLUSH:
                    os.fsync(descriptor)
                    unflushed = 0
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return path.name, len(image), digest.hexdigest()

    def _publish(self, final, parts):
        aside, replaced = (final.with_name(final.name + end) for end in (PARTIAL, f".replaced{PARTIAL}"))
        files = {name: {"bytes": size, "xxh3_128": digest} for name, size, digest in parts}
        meta = self._meta | {"versions": _versions(), "git_commit": _git_commit(), "files": files}
        write(aside / "meta.json", json.dumps(meta, indent=1) + "\n")
        _flush(aside)
        if final.exists():  # damaged: latest() went back to an older one and the run came here again
            final.rename(replaced)
        aside.rename(final)
        _flush(final.parent)
        if replaced.exists():
            shutil.rmtree(replaced)
        self.published(meta["step"])


def checksum(path):
    """XXH3 of a file, 128 bits: it finds damage, as SHA-256 does, in a tenth of its time."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path):
    """Have the system put a folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions():
    packages = ("mspt", "torch", "deepspeed", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


@functools.cache
def _git_commit():
    """The commit of the source that runs, or None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
