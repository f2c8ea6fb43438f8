"""What the parent of all ranks imports, once, before it forks any."""

import os

os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

# Of DeepSpeed, what it would import when an engine is made.
import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
import matplotlib.pyplot  # noqa: F401

import mspt.cli
import mspt.config
import mspt.training.trainer  # noqa: F401
