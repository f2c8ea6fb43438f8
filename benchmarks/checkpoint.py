"""How long a save holds training up, beside DeepSpeed's own save of the same engine in the same run.

    python benchmarks/checkpoint.py [--json FILE] [--models published large] [--stages 1] [--processes 2] [--rounds 7]

Real ranks train a stage-2 model on bundled molecules: windows of the same steps without a save, with one that goes on
beside them, and with DeepSpeed's, in turn. For each side

- stall: seconds from the beginning of a save until training goes on, on the slowest rank, once its memory is there;
- cost: seconds that the window takes longer than the one without a save: the stall, and what the write takes from the
  steps beside it. On CPUs the threads that write share their cores with training; beside GPUs they have cores free.
- published: seconds until the checkpoint is there under its name, on the disk. DeepSpeed's save does not put it on the
  disk; what it leaves to the system is written between windows.
- resume: seconds from looking for the newest checkpoint, its checksums included, to the end of the first step.

All are medians over rounds. The ratios are DeepSpeed's by ours; stall_ratio_to_deepspeed of the first run is said once
more for all of the result, because the stall is what a save costs wherever a core is free to write.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import measure
import torch
import torch.distributed as dist
import torch.multiprocessing

from launch.local import environments
from mspt import config
from mspt.data.keyed import Keyed
from mspt.objectives import Pretraining
from mspt.training import checkpoint
from mspt.training.engine import Engine, EngineSettings, all_reduce, initialise
from mspt.training.saving import Saver
from mspt.training.trainer import accumulate

# (what differs from the published configuration, molecules a rank and step, steps of a window)
MODELS = {
    "published": ([], 8, 5),
    "large": (["model.encoder.channels=800"], 2, 4),
}
STATE = {"position": {}, "seed": 0, "config": {}, "extra": {}}


class Rank:
    """One rank's engine, and windows of steps on it: without a save, with ours, with DeepSpeed's."""

    def __init__(self, model, stage, folder):
        overrides, molecules, self.steps = MODELS[model]
        self.process, self.folder = initialise(), Path(folder)
        loaded = config.load(measure.ROOT / "configs/qm9s-molspectra.yaml", overrides)
        torch.manual_seed(0)
        self.module = Pretraining(loaded.model, loaded.objectives)
        self.engine = Engine(self.module, EngineSettings(zero_stage=stage), loaded.schedule, loaded.training.steps)
        self.batches = [measure.bundled(molecules, device=self.process.device)]
        self.saver = Saver(self.engine, folder / "mspt")
        self.deepspeed = self.folder / "deepspeed"
        self.saves, self.stalls, self.published, self.bytes = 0, {}, [], {}

    def step(self):
        """A step as the trainer takes it, with what it does for a save."""
        accumulate(self.engine, self.module, self.batches, Keyed(0, 0))
        self.engine.step()
        writing = torch.tensor([int(not self.saver.finished)], device=self.process.device)
        all_reduce(writing)
        if self.saver.step is not None and not writing.item():
            self.advance()

    def advance(self):
        if self.saver.advance() is not None:
            self.published.append(time.perf_counter() - self.began)

    def window(self):
        for _ in range(self.steps):
            self.step()

    def window_with_ours(self):
        self.saves += 1
        self.began = time.perf_counter()
        self.saver.begin(self.saves, **STATE)
        self.stalled("mspt")
        self.window()
        if self.saver.step is not None:  # it outlasts the window: what is left counts too
            self.saver.wait()
            self.published.append(time.perf_counter() - self.began)

    def window_with_deepspeed(self):
        self.began = time.perf_counter()
        self.engine._wrapped.save_checkpoint(str(self.deepspeed), tag=f"{self.saves}")
        self.stalled("deepspeed")
        self.window()

    def stalled(self, side):
        """Note the seconds that the slowest rank took to come here."""
        seconds = torch.tensor(time.perf_counter() - self.began, device=self.process.device)
        all_reduce(seconds, op=dist.ReduceOp.MAX)
        self.stalls.setdefault(side, []).append(seconds.item())

    def tidy(self):
        """Between windows: nothing is left to be written, and of each side the newest checkpoint is kept."""
        if self.process.rank == 0:
            checkpoint.prune(self.folder / "mspt", keep_last=1)
            for old in self.deepspeed.glob("[0-9]*"):
                if old.name != f"{self.saves}":
                    shutil.rmtree(old)
            os.sync()

    def resume_ours(self):
        checkpoint.load(self.engine, checkpoint.latest(self.folder / "mspt"))
        self.step()

    def resume_deepspeed(self):
        self.engine._wrapped.load_checkpoint(str(self.deepspeed), tag=f"{self.saves}")
        self.step()

    def measured(self, rounds):
        """What there is to say of this engine -> dict."""
        windows = {"without": self.window, "mspt": self.window_with_ours, "deepspeed": self.window_with_deepspeed}
        times = measure.interleaved(windows | {"tidy": self.tidy}, rounds, self.process.device)
        sizes = {
            "mspt": sum(path.stat().st_size for path in (self.folder / "mspt" / "checkpoints").rglob("*.*")),
            "deepspeed": sum(path.stat().st_size for path in self.deepspeed.rglob("*.pt")),
        }
        resumes = measure.interleaved(
            {"mspt": self.resume_ours, "deepspeed": self.resume_deepspeed}, rounds, self.process.device
        )
        result = {
            "parameters": sum(math.prod(shape) for shape in self.engine.shapes.values()),
            "steps_of_a_window": self.steps,
            "seconds_of_a_step": statistics.median(times["without"]) / self.steps,
        }
        for side in ("mspt", "deepspeed"):
            differences = [a - b for a, b in zip(times[side], times["without"], strict=True)]
            result[side] = {
                "stall_seconds": statistics.median(self.stalls[side][1:]),
                "cost_seconds": statistics.median(differences),
                "cost_seconds_by_round": differences,
                "bytes": sizes[side],
                "resume_seconds": statistics.median(resumes[side]),
            }
        result["mspt"]["published_seconds"] = statistics.median(self.published[1:])
        for name in ("stall", "cost", "resume"):
            ours, theirs = (result[side][f"{name}_seconds"] for side in ("mspt", "deepspeed"))
            result[f"{name}_ratio_to_deepspeed"] = theirs / ours
        return result


def run(rank, environment, model, stage, rounds, folder):
    """One of the ranks; the first writes what it has measured."""
    os.environ |= environment[rank]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    result = Rank(model, stage, folder).measured(rounds)
    if rank == 0:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        measure.write(folder / "result", {"machine": measure.machine(device), "result": result})
    dist.destroy_process_group()


def measured(model, stage, processes, rounds):
    """Run the ranks -> (machine, result)."""
    with tempfile.TemporaryDirectory() as name:
        arguments = (environments(processes), model, stage, rounds, Path(name))
        torch.multiprocessing.spawn(run, arguments, nprocs=processes)
        said = json.loads((Path(name) / "result").read_text())
    return said["machine"], said["result"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--stages", nargs="+", type=int, default=[1])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()

    runs = {}
    for model in options.models:
        for stage in options.stages:
            machine, found = measured(model, stage, options.processes, options.rounds)
            runs[f"{model}, ZeRO {stage}"] = found
            print(f"{model}, ZeRO {stage}: {found['parameters'] / 1e6:.1f} M, step {found['seconds_of_a_step']:.3f} s")
            for side in ("mspt", "deepspeed"):
                values = [f"{k} {v:.4g}" for k, v in found[side].items() if not isinstance(v, list)]
                print(f"  {side:10s}", "  ".join(values))
            print("  " + "  ".join(f"{key} {value:.2f}" for key, value in found.items() if "ratio" in key), flush=True)
            if options.json:  # after each: a large model may take longer than one waits
                first = next(iter(runs.values()))
                own = {"processes": options.processes, "rounds": options.rounds}
                own |= {"stall_ratio_to_deepspeed": first["stall_ratio_to_deepspeed"], "runs": runs}
                measure.write(options.json, machine | own)


if __name__ == "__main__":
    main()
