"""What torch.distributed needs to know, from the variables that srun sets."""

import re

from mspt.training.ports import COUNT, FIRST


def launcher_variables(environment):
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT of a task that srun has started; {} elsewhere.

    A batch script itself is no task: only srun sets SLURM_STEP_NUM_TASKS. The first node of the step is the master;
    the port follows from job and step, so that runs on a shared node do not meet.
    """
    if "SLURM_STEP_NUM_TASKS" not in environment:
        return {}
    # Names such as node1, node[01-04,07] or gpu-a[3,5]: the first of them.
    prefix, number = re.match(r"([^\[,]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"]).groups()
    port = FIRST + (int(environment["SLURM_JOB_ID"]) * 16 + int(environment["SLURM_STEP_ID"])) % COUNT
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": prefix + (number or ""),
        "MASTER_PORT": str(port),
    }
