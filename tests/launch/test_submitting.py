"""What launch/slurm.py refuses, and the job scripts that it makes; tests/end_to_end/slurm has it submit them."""

import subprocess
from types import SimpleNamespace

import pytest

from launch import slurm

CONFIG = ["--config", "configs/quickstart.yaml"]
STAGE_1 = ["--config", "configs/quickstart-stage1.yaml"]


@pytest.fixture
def on_a_cluster(tmp_path, monkeypatch):
    """srun can be found; nothing here calls it."""
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def script(capsys, *arguments):
    """What --dry-run prints."""
    with pytest.raises(SystemExit) as ended:
        slurm.main([*arguments, "--dry-run"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("on_a_cluster")
def test_options_are_in_the_script(capsys):
    said = script(
        capsys,
        *(*CONFIG, "--nodes=3", "--gpus-per-node=4", "--cpus-per-task=7", "--partition=gpu", "--account=chem"),
        *("--time=1-00:00:00", "--grace=300", "--interface=ib0", "--mem=64G", "--retries=5", "data.lanes=12"),
    )
    options = {line.removeprefix("#SBATCH --") for line in said.splitlines() if line.startswith("#SBATCH")}
    assert options >= {"nodes=3", "gpus-per-node=4", "ntasks-per-node=4", "cpus-per-task=7", "partition=gpu", "mem=64G"}
    assert options >= {"account=chem", "time=1-00:00:00", "signal=USR1@300", "requeue", "open-mode=append"}
    assert not any(option.startswith(("array", "dependency", "qos")) for option in options)
    assert "--cpus-per-task=7" in said.split("srun ")[1]
    assert "export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0" in said
    assert "pretrain --config configs/quickstart.yaml data.lanes=12 run.grace=300" in said
    subprocess.run(["bash", "-n"], input=said, text=True, check=True)


@pytest.mark.usefixtures("on_a_cluster")
def test_without_a_time_the_limit_is_the_partitions(capsys):
    assert "--time" not in script(capsys, *CONFIG)


@pytest.mark.usefixtures("on_a_cluster")
def test_a_next_stage_waits_and_starts_from_the_one_before(capsys):
    first, second = script(capsys, *STAGE_1, *CONFIG).split("#!/bin/bash")[1:]
    assert "--dependency" not in first and "model.init" not in first
    assert "#SBATCH --dependency=afterok:JOB" in second and "model.init=runs/quickstart-stage1" in second


@pytest.mark.usefixtures("on_a_cluster")
def test_an_array_over_configurations(capsys):
    said = script(capsys, "--array", f"config={STAGE_1[1]},{CONFIG[1]}")
    assert "#SBATCH --array=0-1" in said
    assert f"--config {STAGE_1[1]} run.grace=120\n" in said and f"--config {CONFIG[1]} run.grace=120\n" in said


@pytest.mark.usefixtures("on_a_cluster")
def test_a_grace_that_was_given_stays(capsys):
    said = script(capsys, *CONFIG, "run.grace=30")
    assert "run.grace=30" in said and "run.grace=120" not in said


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([*CONFIG, "training.step=5"], "unknown key training.step; did you mean steps?"),
        ([*STAGE_1, *CONFIG, "run.dir=runs/one"], "run.dir is runs/one for several of these runs"),
        ([*CONFIG, "--nodes=3"], "data.lanes is 2, which 3 ranks do not divide"),
        ([*CONFIG, "--array", "seed"], "--array is 'seed'; give a key and its values"),
        ([*CONFIG, "--array", "seed=1,1"], "run.dir is runs/quickstart/seed-1 for several"),
        ([*CONFIG, *STAGE_1, "--array", "seed=0,1"], "--array varies one --config"),
        ([*CONFIG, "--shards", "build qm9 --out x"], "--shards goes without --config"),
        (["--shards", "build qm9"], "required: --out"),
        (["--shards", "build qm9 --out x", "--nodes=2"], "each of one task on one node"),
        (["training.steps=5"], "give --config or --shards"),
        ([*CONFIG, "--nodes=0"], "'0' is no whole number of 1 or more"),
        ([*CONFIG, "--grace=-5"], "'-5' is no whole number of 1 or more"),
    ],
)
@pytest.mark.usefixtures("on_a_cluster")
def test_what_cannot_work_is_not_submitted(capsys, arguments, reason):
    with pytest.raises(SystemExit) as ended:
        slurm.main(arguments)
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


SCONTROL = """#!/bin/bash
# Job 1 runs for six questions, with a controller that is away at the third; 2 is soon over and then forgotten.
asked=$(cat {folder}/$4 2>/dev/null || echo 0)
echo $((asked + 1)) > {folder}/$4
case $4-$asked in
  1-2) echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1 ;;
  1-[0-5]) echo "JobId=1 JobState=RUNNING" ;;
  1-*) echo "JobId=1 JobState=COMPLETED" ;;
  2-[0-1]) echo "JobId=2 JobState=COMPLETED" ;;
  *) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1 ;;
esac
"""


def test_jobs_that_are_followed(tmp_path, monkeypatch, capsys):
    """SLURM forgets a job before its turn, and does not answer once."""
    (tmp_path / "scontrol").write_text(SCONTROL.format(folder=tmp_path))
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    jobs = []
    for job_id in ("1", "2", "3"):
        (tmp_path / f"{job_id}.log").write_text(f"log of {job_id}\n")
        jobs.append(SimpleNamespace(job_id=job_id, paths=SimpleNamespace(stdout=tmp_path / f"{job_id}.log")))
    states = slurm.follow(jobs, every=0.02, others=0.0)
    assert states == {"1": "COMPLETED", "2": "COMPLETED", "3": slurm.FORGOTTEN}
    assert capsys.readouterr().out == "log of 1\nlog of 2\nlog of 3\n"
    assert (tmp_path / "2").read_text() == "2\n"  # not asked for again


def test_without_slurm(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as ended:
        slurm.main(CONFIG)
    assert ended.value.code == 2
    assert "srun is not found" in capsys.readouterr().err
