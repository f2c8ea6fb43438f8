"""A SLURM cluster of two nodes on this machine, for the tests beside this file."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.runs import ROOT, environment

SCRIPT = Path(__file__).with_name("cluster.sh")
FOLDER = Path("/tmp/mspt-slurm")  # munge wants a place that everyone can enter
# Where Debian puts daemons, which is not on everyone's path.
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


class Cluster:
    """A running cluster, and what a user does with it."""

    def __init__(self, folder):
        self.environment = environment() | {
            "CLUSTER_DIR": str(folder),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": PATH,
        }

    def call(self, *command, check=True):
        """What a command prints, errors too."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )
        assert not check or done.returncode == 0, done.stdout
        return done.stdout

    def node(self, action, number):
        """Kill or start a node."""
        self.call(SCRIPT, f"{action}-node", number)

    def launch(self, *arguments):
        """Submit with launch/slurm.py -> the jobs' ids."""
        said = self.call(sys.executable, "launch/slurm.py", *arguments)
        print(said)
        return re.findall(r"^job (\S+)  .*log: ", said, flags=re.MULTILINE)

    def show(self, job_id):
        """What SLURM knows of a job, by field."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", "-o", job_id)))

    def wait(self, job_id, seconds=150, **wanted):
        """What SLURM knows of a job as soon as it has the wanted fields."""
        end, before = time.monotonic() + seconds, None
        while True:
            fields = self.show(job_id)
            line = " ".join(f"{name}={fields[name]}" for name in ("JobState", "Restarts", "ExitCode", "NodeList"))
            if line != before:
                print(f"{time.strftime('%X')} job {job_id} {line}")
                before = line
            if wanted.items() <= fields.items():
                return fields
            assert time.monotonic() < end, f"job {job_id} after {seconds} s: {line}; wanted {wanted}"
            time.sleep(0.3)


@pytest.fixture(scope="session")
def cluster():
    missing = [name for name in ("slurmctld", "slurmd", "srun", "munged") if not shutil.which(name, path=PATH)]
    if missing:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)} missing); {SCRIPT.relative_to(ROOT)} install")
    if os.geteuid() != 0:
        pytest.skip("a SLURM cluster on this machine needs root")
    with Path(f"{FOLDER}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # there can be one on a machine
        running = Cluster(FOLDER)
        print(running.call(SCRIPT, "start"))
        yield running
        running.call(SCRIPT, "stop")
