"""Submit a run to SLURM, several after each other or side by side, or the building of shards.

    python launch/slurm.py --config configs/qm9s-molspectra.yaml --nodes 4 --gpus-per-node 8 data.lanes=32

A job that is pre-empted, runs into its time limit, or loses a node or a rank is queued again and goes on where its run
folder stands (launch/job.sh). One that has ended goes on when the same command is given again.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError

from launch.local import pretrain
from mspt import config
from mspt.commands.arguments import at_least
from mspt.errors import UserError
from shards.cli import build_parser as shards_parser

JOB = Path(__file__).with_name("job.sh")
# Options that SLURM gets as they are.
PASSED_ON = (
    *("nodes", "gpus_per_node", "cpus_per_task", "mem", "partition"),
    *("account", "qos", "constraint", "time", "job_name"),
)
FORGOTTEN = "is no longer known to SLURM; see its log"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", FORGOTTEN)


@dataclass(frozen=True)
class Task:
    """One job. makes: the folder that its command makes or goes on with."""

    command: list[str]
    makes: Path


def stages(options):
    """What is to run, as stages that wait for the one before; a stage is a list of Tasks side by side."""
    if options.shards:
        return _shards(shlex.split(options.shards), options.array_tasks)
    if options.array:
        return [_array(options)]
    chain, before = [], None
    for path in options.config:
        overrides = options.overrides + [f"model.init={before}"] * (before is not None)
        task = _run(path, overrides, options)
        chain.append([task])
        before = task.makes
    _check_apart(chain)
    return chain


def _run(path, overrides, options):
    """A Task that trains. Raises UserError here for a configuration that the job would refuse hours later."""
    loaded, ranks = config.load(path, overrides), options.nodes * _tasks_per_node(options)
    loaded.data.check_ranks(ranks)
    if loaded.run.grace is None:  # a run that knows how long it has leaves out a save that would be cut off
        overrides = [*overrides, f"run.grace={options.grace}"]
    return Task(pretrain(path, overrides), Path(loaded.run.dir))


def _tasks_per_node(options):
    return options.tasks_per_node or options.gpus_per_node or 1


def _array(options):
    """Runs that differ in one key, or in their configuration ("config=a.yaml,b.yaml")."""
    key, _, values = options.array.partition("=")
    if not values:
        raise UserError(f"--array is {options.array!r}; give a key and its values, such as seed=0,1,2")
    if key == "config":
        runs = [_run(path, options.overrides, options) for path in values.split(",")]
    else:
        (path,) = options.config
        folder = config.load(path, options.overrides).run.dir
        runs = [
            _run(path, [*options.overrides, f"{key}={value}", f"run.dir={folder}/{key}-{value}"], options)
            for value in values.split(",")
        ]
    _check_apart([runs])
    return runs


def _check_apart(chain):
    folders = [task.makes for stage in chain for task in stage]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"run.dir is {folder} for several of these runs; give each configuration its own")


def _shards(words, parts):
    """The parts of a build side by side, then what puts them together."""
    out = shards_parser().parse_args(words).out
    command = [sys.executable, "-m", "shards", *words]
    return [[Task([*command, "--part", f"{part}/{parts}"], out) for part in range(parts)], [Task(command, out)]]


def executor(options, after):
    """What submits jobs with these options, to start when job `after` has ended well (None: at once)."""
    try:
        made = submitit.SlurmExecutor(folder=options.logs)
    except RuntimeError as error:
        raise UserError("srun is not found: this is no machine of a SLURM cluster; see launch/local.py") from error
    setup = [f"export MSPT_RETRIES={options.retries}", f". {shlex.quote(str(JOB.resolve()))}"]
    if options.interface:
        setup.append(f"export NCCL_SOCKET_IFNAME={options.interface} GLOO_SOCKET_IFNAME={options.interface}")
    more = {"requeue": True, "signal": f"USR1@{options.grace}"}
    if after is not None:
        more |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    srun = ["--kill-on-bad-exit=1", "--open-mode=append"]
    if options.cpus_per_task:
        srun.append(f"--cpus-per-task={options.cpus_per_task}")  # since 22.05 it is not taken from the job
    made.update_parameters(
        **{name: getattr(options, name) for name in PASSED_ON},
        ntasks_per_node=_tasks_per_node(options),
        wckey=None,
        stderr_to_stdout=True,
        setup=setup,
        srun_args=srun,
        additional_parameters=more,
    )
    return made


def submit(stage, options, after):
    """Submit a stage -> its jobs, one a Task. Raises UserError where SLURM refuses it."""
    made = executor(options, after)
    try:
        with made.batch():
            # Each rank becomes the command, so that signals reach it and its exit code is the job's.
            return [made.submit(os.execv, task.command[0], task.command) for task in stage]
    except FailedJobError as error:
        raise UserError(f"sbatch refuses the job: {' '.join(str(error).split())}") from error


def script(stage, options, after):
    """The job script of a stage, and what its tasks run."""
    made = executor(options, after)
    if len(stage) > 1:
        made.parameters["map_count"] = len(stage)
    text = made._make_submission_file_text(made._submitit_command_str, "")
    return text + "".join(f"# task: {shlex.join(task.command)}\n" for task in stage)


def state(job_id):
    """A job's state as SLURM names it; FORGOTTEN where SLURM no longer has it, None where SLURM does not answer."""
    asked = subprocess.run(["scontrol", "show", "job", "-o", job_id], capture_output=True, text=True)
    if "Invalid job id" in asked.stderr:
        return FORGOTTEN
    found = re.search(r"JobState=(\w+)", asked.stdout)
    return found[1] if found else None


def follow(jobs, every=2.0, others=60.0):
    """Print the jobs' logs, one after the other, until all are over -> their last states by id.

    every, others: seconds between two questions for the one whose log is shown, and for those whose turn is yet to
    come: SLURM forgets a job some minutes after its end. A job that is queued again is not over.
    """
    states, over, asked = dict.fromkeys(job.job_id for job in jobs), set(), time.monotonic()

    def ask(job_id):
        now = state(job_id)
        if now in OVER and now == states[job_id]:  # one that is queued again may seem over for a moment
            over.add(job_id)
        states[job_id] = now or states[job_id]

    for job in jobs:
        shown = 0
        while job.job_id not in over:
            shown = _show(job.paths.stdout, shown)
            ask(job.job_id)
            if time.monotonic() - asked > others:
                asked = time.monotonic()
                for other in states.keys() - over - {job.job_id}:
                    ask(other)
            time.sleep(every)
        _show(job.paths.stdout, shown)
    return states


def _show(log, begin):
    """Print a log, which may not be there yet, from a place on -> the place up to which it is printed."""
    if not log.exists():
        return begin
    with log.open(errors="replace") as file:
        file.seek(begin)
        print(file.read(), end="", flush=True)
        return file.tell()


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", action="append", default=[], help="again for a next stage, which starts from the encoder before")
    add("--array", metavar="KEY=V1,V2,…", help="a run for each value, in run.dir/KEY-VALUE; config=A,B: for each file")
    add("--shards", metavar='"build …"', help="what to give to shards, instead of --config")
    add("--array-tasks", type=at_least(1), default=8, metavar="N", help="jobs that build shards (default: %(default)s)")
    add("--nodes", type=at_least(1), default=1, help="(default: %(default)s)")
    add("--gpus-per-node", type=at_least(1))
    add("--tasks-per-node", type=at_least(1), help="ranks a node (default: one a GPU, or one)")
    add("--cpus-per-task", type=at_least(1))
    add("--mem", help="memory a node, such as 64G")
    add("--partition")
    add("--account")
    add("--qos")
    add("--constraint")
    add("--time", help="limit, such as 24:00:00, after which the job is queued again")
    add("--job-name", default="mspt", help="(default: %(default)s)")
    add("--interface", help="network interface of NCCL and gloo, such as ib0")
    add(
        "--grace",
        type=at_least(1),
        default=120,
        help="seconds before the limit at which a run saves (default: %(default)s)",
    )
    add(
        "--retries",
        type=at_least(0),
        default=3,
        help="how often a job that fails is queued again (default: %(default)s)",
    )
    add("--logs", default="runs/slurm", help="folder of job scripts and logs (default: %(default)s)")
    add("--follow", action="store_true", help="print the log until the job is over")
    add("--dry-run", action="store_true", help="print the job script")
    add("overrides", nargs="*", metavar="key=value", help="such as training.steps=50 run.dir=runs/try")
    return parser


def launch(options):
    """Submit what was asked for -> exit code."""
    jobs, after = [], None
    for stage in stages(options):
        if options.dry_run:
            print(script(stage, options, after))
            after = "JOB"
            continue
        submitted = submit(stage, options, after)
        for job, task in zip(submitted, stage, strict=True):
            print(f"job {job.job_id}  {task.makes}  log: {job.paths.stdout}", flush=True)
        jobs += submitted
        after = submitted[0].job_id.split("_")[0]
    if not options.follow:
        return 0
    states = follow(jobs)
    for job_id, last in states.items():
        print(f"job {job_id} {last}")
    return 0 if set(states.values()) <= {"COMPLETED"} else 1


def main(arguments=None):
    parser = build_parser()
    options = parser.parse_args(arguments)
    by_config = options.array and options.array.startswith("config=")
    if options.shards:
        if options.config or options.array or options.overrides:
            parser.error("--shards goes without --config, --array and key=value")
        if options.nodes > 1 or options.tasks_per_node or options.gpus_per_node:
            parser.error("--shards is --array-tasks jobs, one or more, each of one task on one node")
    elif by_config and options.config:
        parser.error("--array config=… names the configurations; leave --config out")
    elif options.array and not by_config and len(options.config) != 1:
        parser.error("--array varies one --config")
    elif not options.config and not by_config:
        parser.error("give --config or --shards")
    try:
        sys.exit(launch(options))
    except UserError as error:
        print(f"launch/slurm.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("launch/slurm.py: no longer following; the jobs go on (squeue --me; scancel ends one)", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
