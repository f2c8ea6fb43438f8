"""launch/job.sh: which ends of a job queue it again. The ranks are shell scripts, the SLURM is real."""

import time

import pytest

from tests.end_to_end.runs import ROOT

# What each of two ranks does, and how the job must end.
SAVED, REFUSED = (f"echo {code} > $MSPT_ENDED; exit {code}" for code in (75, 2))  # what mspt does
ENDS = {
    "saved and asked for it": (f"[ $again = 2 ] || {{ {SAVED}; }}", {"JobState": "COMPLETED", "Restarts": "2"}),
    # Its exit code is that of either rank: of the one that failed first, or of the other, which SLURM then ends (143).
    "fails each time": ("exit 1", {"JobState": "FAILED", "Restarts": "1"}),
    "saved and asked for it, and its other rank is killed": (
        f"[ $again = 2 ] && exit; [ $SLURM_PROCID = 0 ] || {{ {SAVED}; }}; sleep 60",
        {"JobState": "COMPLETED", "Restarts": "2"},
    ),
    "refused its configuration": (REFUSED, {"JobState": "FAILED", "Restarts": "0", "ExitCode": "2:0"}),
    "refused its configuration before another rank had started": (
        f"[ $SLURM_PROCID = 0 ] || {{ {REFUSED}; }}; sleep 60",
        {"JobState": "FAILED", "Restarts": "0", "ExitCode": "2:0"},
    ),
    "kills a rank each time": (
        "[ $SLURM_PROCID = 0 ] || kill -9 $$; sleep 60",
        {"JobState": "FAILED", "Restarts": "1"},
    ),
}


def submit(cluster, folder, does, *options):
    """Submit two ranks that do this -> job id. $again: how often the job was queued again."""
    task, script = folder / "task.sh", folder / "job.sh"
    task.write_text(f"again=${{SLURM_RESTART_COUNT:-0}}\necho begin $again\n{does}\n")
    script.write_text(
        f"#!/bin/bash\nexport MSPT_RETRIES=1\n. {ROOT}/launch/job.sh\nsrun --kill-on-bad-exit=1 bash {task}\n"
    )
    where = ["--output", folder / "log", "--open-mode=append", "--chdir", folder]
    return cluster.call("sbatch", "--parsable", "--requeue", "-N2", *where, *options, script).strip()


@pytest.fixture(scope="module")
def jobs(cluster, tmp_path_factory):
    """The ids of all of them, waiting side by side."""
    folders = {name: tmp_path_factory.mktemp("job") for name in ENDS}
    return {name: submit(cluster, folders[name], does) for name, (does, _) in ENDS.items()}


@pytest.mark.parametrize("name", ENDS)
def test_a_job_that(cluster, jobs, name):
    cluster.wait(jobs[name], **ENDS[name][1])


def wait_for(file):
    end = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < end, f"{file} did not come"
        time.sleep(0.1)


SAVES = "trap 'exit 75' TERM USR1; touch running; [ $again = 1 ] || for i in $(seq 600); do sleep 0.1; done"


def test_a_job_that_its_user_cancels_stays_cancelled(cluster, tmp_path):
    """Though its ranks save and ask to be queued again."""
    job = submit(cluster, tmp_path, SAVES)
    wait_for(tmp_path / "running")
    cluster.call("scancel", job)
    cluster.wait(job, JobState="CANCELLED")
    assert "begin 1" not in (tmp_path / "log").read_text()


def test_a_job_that_is_pre_empted_saves_and_goes_on(cluster, tmp_path):
    job = submit(cluster, tmp_path, SAVES, "--partition=main", "--signal=USR1@10", "--time=60", "--exclusive")
    wait_for(tmp_path / "running")
    other = cluster.call(
        "sbatch", "--parsable", "-N2", "--exclusive", "-phigh", "-o/dev/null", "--wrap=sleep 1"
    ).strip()
    cluster.wait(other, JobState="COMPLETED")
    cluster.wait(job, JobState="COMPLETED", Restarts="1")
    assert f"job {job} ended with 75: queued again" in (tmp_path / "log").read_text()
