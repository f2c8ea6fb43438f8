"""launch/slurm.py on a real SLURM: real runs on two nodes, and what befalls them there."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from mspt import config
from mspt.training import checkpoint, metrics
from tests.end_to_end.runs import ROOT, SMALL, command, environment

QUICKSTART = "configs/quickstart.yaml"
STEPS = 40


def options(folder, *more):
    """Options of two ranks on two nodes, all of whose files are in a folder."""
    return ["--nodes=2", "--mem=2G", "--time=30", f"--logs={folder / 'logs'}", *more]


def settings(folder, steps, *more):
    return [*SMALL, "engine.zero_stage=2", f"run.dir={folder}", f"training.steps={steps}", *more]


def wait_until(condition, what):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.1)


def wait_for_step(folder, step):
    wait_until(lambda: len(metrics.read(folder)) >= step, f"step {step}")


def log(folder, job_id):
    return (folder / "logs" / f"{job_id}_0_log.out").read_text()


def assert_same(folder, expected, steps):
    """Both have the same records and losses up to this step, and bit-equal weights there."""
    names = ("step", "records_digest", "loss")
    ours, theirs = ([[row[name] for name in names] for row in metrics.read(each)] for each in (folder, expected))
    assert len(ours) == steps and ours == theirs[:steps]
    ours = checkpoint.read_weights(checkpoint.latest(folder))
    theirs = checkpoint.read_weights(expected / "checkpoints" / f"step-{steps:08d}")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def whole(cluster, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    more = ["checkpoint.keep_every=3", "checkpoint.keep_last=1"]
    (job,) = cluster.launch(
        "--config", QUICKSTART, *options(folder, "--follow"), *settings(folder / "run", STEPS, *more)
    )
    cluster.wait(job, JobState="COMPLETED", Restarts="0", NodeList="node[1-2]")
    return folder / "run"


def test_a_run_on_two_nodes(whole):
    assert len(metrics.read(whole)) == STEPS
    (said,) = (whole.parent / "logs").glob("*_0_log.out")
    assert f"done: {STEPS} steps" in said.read_text() and "on 2 processes" in said.read_text()


def test_plain_sbatch(cluster, whole, tmp_path):
    """launch/run.sbatch: as many ranks, the same losses."""
    cluster.environment["PATH"] = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    here = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={tmp_path}/log"]
    given = ["launch/run.sbatch", "--config", QUICKSTART, *settings(tmp_path / "run", 3)]
    job = cluster.call("sbatch", "--parsable", *here, *given).strip()
    cluster.wait(job, JobState="COMPLETED", NodeList="node[1-2]")
    assert_same(tmp_path / "run", whole, 3)


def test_a_cancelled_step_and_a_lost_node(cluster, whole, tmp_path):
    (job,) = cluster.launch("--config", QUICKSTART, *options(tmp_path), *settings(tmp_path / "run", STEPS))
    # Not a step: its checkpoint is published some steps later.
    wait_until(lambda: list((tmp_path / "run" / "checkpoints").glob("step-????????")), "a checkpoint")
    cluster.call("scancel", f"{job}.0")
    cluster.wait(job, Restarts="1")
    wait_until(lambda: "resuming from" in log(tmp_path, job), "a second start")
    wait_for_step(tmp_path / "run", 10)
    cluster.node("kill", 2)
    cluster.wait(job, Restarts="2")
    cluster.node("start", 2)
    cluster.wait(job, JobState="COMPLETED", Restarts="2")
    print(log(tmp_path, job))
    assert len(re.findall("resuming from", log(tmp_path, job))) == 2
    # SLURM kills a step that is cancelled, without a word before.
    assert re.search(rf"job {job} ended with 1\d\d: queued again", log(tmp_path, job))
    assert_same(tmp_path / "run", whole, STEPS)


def test_a_time_limit(cluster, tmp_path):
    """The signal before it → queued again → goes on → ends with the weights of an uninterrupted run.

    When SLURM gives the signal is known to half a minute, hence the run's length is set once it has been given.
    """
    configuration, run = tmp_path / "run.yaml", tmp_path / "run"
    tree = yaml.safe_load((ROOT / QUICKSTART).read_text())
    configuration.write_text(yaml.safe_dump(tree | {"training": {"steps": 10**6}}))
    overrides = [each for each in settings(run, 0) if not each.startswith("training.steps=")]
    (job,) = cluster.launch("--config", configuration, *options(tmp_path, "--grace=20"), *overrides)
    wait_for_step(run, 5)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    cluster.wait(job, Restarts="1")
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    reached = len(metrics.read(run))
    steps, expected = reached + 5, tmp_path / "expected"
    configuration.write_text(yaml.safe_dump(tree | {"training": {"steps": steps}}))
    uninterrupted = command(expected, 2, steps, "engine.zero_stage=2", "checkpoint.every=1000")
    with subprocess.Popen(uninterrupted, env=environment(), stdout=subprocess.DEVNULL) as other:
        cluster.wait(job, JobState="COMPLETED", Restarts="1")
        assert other.wait(timeout=200) == 0
    said = log(tmp_path, job)
    print(said)
    resumed = int(re.search(r"resuming from .*: step (\d+)", said)[1])
    assert 0 < resumed <= reached
    assert f"job {job} ended with 75: queued again" in said
    assert resumed == reached, "a step was taken twice"
    assert_same(run, expected, steps)


def test_stages_in_a_chain(cluster, tmp_path):
    """Each waits for the one before and starts from its encoder, the last to learn from labels; all have two ranks."""
    stages = {"first": QUICKSTART, "second": QUICKSTART, "third": "configs/quickstart-finetune.yaml"}
    encoder = [each for each in SMALL if each.startswith("model.encoder")]
    labelled = ["data.limit=40", "data.heldout=shards/bundled/qm9-spectra/heldout", "evaluation.every=1"]
    words = []
    for name, path in stages.items():
        changes = [*encoder, *labelled] if name == "third" else SMALL
        loaded = config.load(ROOT / path, [*changes, f"run.dir={tmp_path / name}"])
        (tmp_path / f"{name}.yaml").write_text(config.dump(loaded))
        words += ["--config", tmp_path / f"{name}.yaml"]
    jobs = cluster.launch(
        *(*words, "--tasks-per-node=2", "--mem=4G", f"--logs={tmp_path / 'logs'}", "--follow"), "training.steps=2"
    )
    first, second, third = (cluster.wait(job, JobState="COMPLETED", NumTasks="2") for job in jobs)
    assert first["EndTime"] <= second["StartTime"] and second["EndTime"] <= third["StartTime"]
    for name, before in (("second", "first"), ("third", "second")):
        resolved = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        assert resolved["model"]["init"] == str(tmp_path / before)
    errors = json.loads((tmp_path / "third" / "summary.json").read_text())["errors"]
    assert errors["homo"]["count"] == 223 and errors["homo"]["unit"] == "meV"


def test_an_array_of_seeds(cluster, tmp_path):
    jobs = cluster.launch(
        *("--config", QUICKSTART, "--array", "seed=0,1,2", f"--logs={tmp_path / 'logs'}", "--mem=2G"),
        *settings(tmp_path / "run", 2),
    )
    assert len(jobs) == 3
    losses = set()
    for job, seed in zip(jobs, range(3), strict=True):
        cluster.wait(job, JobState="COMPLETED")
        folder = tmp_path / "run" / f"seed-{seed}"
        assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == seed
        losses.add(metrics.read(folder)[-1]["loss"])
    assert len(losses) == 3


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_shards_built_by_an_array(cluster, tmp_path):
    """The same bytes as of one process; the job that finishes waits for the parts."""
    build = "build qm9 --limit 900 --shard 200 --split 0.1 --no-inchikey --processes 1"
    *parts, last = cluster.launch(
        *("--shards", f"{build} --out {tmp_path / 'many'}", "--array-tasks", "2", "--mem=2G"),
        *(f"--logs={tmp_path / 'logs'}", "--follow"),
    )
    assert len(parts) == 2
    for job in (*parts, last):
        cluster.wait(job, JobState="COMPLETED")
    cluster.call(sys.executable, "-m", "shards", *build.split(), "--out", tmp_path / "one")
    assert files(tmp_path / "many") == files(tmp_path / "one")
    assert {"train", "heldout"} <= {path.parts[0] for path in files(tmp_path / "one")}
