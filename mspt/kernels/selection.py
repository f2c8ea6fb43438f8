"""Which implementation runs an operation, and why."""

import logging
import os
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

from mspt import native
from mspt.errors import UserError
from mspt.kernels import cpu, reference
from mspt.kernels.cpu import build
from mspt.kernels.cpu.linear import ready as linear_ready

NAMES = ("auto", "reference", "cpu", "triton")
IMPLEMENTATIONS = {"reference": reference, "cpu": cpu}
NATIVE = {"cpu": "cpu", "cuda": "triton"}  # what `auto` means on a device; the reference elsewhere
log = logging.getLogger("mspt")


def requested(name):
    """The name, if there is such an implementation. Raises UserError."""
    if name not in NAMES:
        raise UserError(f"MSPT_KERNELS is {name!r}; known: {', '.join(NAMES)}")
    return name


_wanted = requested(os.environ.get("MSPT_KERNELS", "auto"))


@contextmanager
def use(name):
    """Within the context, run operations by the implementation of this name."""
    global _wanted
    before, _wanted = _wanted, requested(name)
    try:
        yield
    finally:
        _wanted = before


@torch.compiler.assume_constant_result
def _unavailable(name):
    """Why an implementation cannot run here, or None where it can."""
    return _reason(name)


@cache
def _reason(name):
    if name == "cpu":
        try:
            build.load_all()
        except native.NoCompiler as error:
            return str(error)
    if name == "triton":
        if find_spec("triton") is None:
            return "triton is not installed"
        # Imported where it is wanted: it takes its time, and a machine without a GPU need not have it.
        IMPLEMENTATIONS[name] = import_module("mspt.kernels.triton")
    return None


@cache
def _warn(name, reason):
    log.warning("mspt: the %s kernels cannot run, plain PyTorch does instead: %s", name, reason)


def choose(device):
    """The implementation for tensors on a device: reference, cpu or triton."""
    name = _wanted
    if name == "auto":
        name = NATIVE.get(device.type, "reference")
    if name == "reference":
        return name
    reason = _unavailable(name)
    if reason is None and name == "cpu" and device.type != "cpu":
        reason = f"the tensors are on {device.type}"
    if reason is None and name == "triton" and device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        reason = f"the tensors are on {device.type}, and TRITON_INTERPRET is not set"
    if reason is not None:
        _warn(name, reason)
        return "reference"
    return name


def pick(operation, device, dtype=torch.float32):
    """The function that runs an operation on a device, for features of this type.

    float64 is for checking, and an implementation may leave an operation to PyTorch: both are the reference's.
    """
    name = choose(device) if dtype in (torch.float32, torch.bfloat16) else "reference"
    return getattr(IMPLEMENTATIONS[name], operation, getattr(reference, operation))


def implementation(device):
    """The name of what runs on a device, for a person: such as `cpu (avx512)`."""
    name = choose(torch.device(device))
    return f"cpu ({native.level()})" if name == "cpu" else name


def report():
    """What runs where on this machine and why, in lines for a person."""
    lines = [f"MSPT_KERNELS={_wanted}" + (" (the default)" if "MSPT_KERNELS" not in os.environ else "")]
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        lines.append(f"{device}: {implementation(device)}")
        if _reason(NATIVE[device]) is not None:
            lines.append(f"  {NATIVE[device]} cannot: {_reason(NATIVE[device])}")
    if _reason("cpu") is None:
        unit = ", matrix unit" if linear_ready() else ""
        lines.append(f"C++ kernels: {native.compiler()}, {native.level()}{unit}, {torch.get_num_threads()} threads")
        lines.append(f"builds are kept in {native.cache_folder()}")
    if len(devices) == 1:
        lines.append("no CUDA device")
    return lines
