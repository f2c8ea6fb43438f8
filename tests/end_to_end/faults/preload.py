"""What the parent of all ranks imports, once, before it forks any."""

import os

os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

# Of DeepSpeed, what it would import when an engine is made.
import deepspeed.runtime.zero.muon.original_muon  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401

import mspt.cli  # noqa: E402, F401
import mspt.config  # noqa: E402, F401
import mspt.training.trainer  # noqa: E402, F401
