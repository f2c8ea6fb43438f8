"""Ranks that srun has started find each other."""

import os
import subprocess
import sys

import pytest

from mspt.training.engine import LAUNCHED_WITH
from mspt.training.slurm import launcher_variables
from tests.end_to_end.runs import ROOT

TASK = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
}


@pytest.mark.parametrize(
    ("nodes", "master"),
    [
        ("alpha", "alpha"),
        ("node[03-07,11]", "node03"),
        ("gpu-a[5,9]", "gpu-a5"),
        ("one,two", "one"),
        ("n1,m[2-3]", "n1"),
    ],
)
def test_variables_of_a_task(nodes, master):
    found = launcher_variables(TASK | {"SLURM_STEP_NODELIST": nodes})
    assert found["MASTER_ADDR"] == master
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("3", "4", "1")
    assert 10_000 <= int(found["MASTER_PORT"]) < 32_000


def test_a_batch_script_is_no_task():
    assert launcher_variables({"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == {}


def test_two_tasks_add_up():
    """Two processes that know nothing but what srun tells them join, and add their ranks up."""
    script = (
        "import torch; from mspt.training.engine import all_reduce, initialise\n"
        "process = initialise(); total = torch.tensor(process.rank + 1); all_reduce(total)\n"
        "print(process.world_size, int(total), flush=True); import os; os._exit(0)"
    )
    launched = {*LAUNCHED_WITH, "LOCAL_RANK"}
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith("SLURM_") and name not in launched
    }
    shared = clean | TASK | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "PYTHONPATH": str(ROOT)}
    shared |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert [task.communicate(timeout=300)[0].strip() for task in tasks] == ["2 3", "2 3"]
    finally:
        for task in tasks:  # whoever is left would hold the port
            task.kill()
            task.wait()
