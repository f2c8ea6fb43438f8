"""What the benchmarks share: times, memory, rates of this machine, molecules. Nothing happens when this is run."""

import ctypes
import datetime
import json
import multiprocessing
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mspt import files, kernels
from mspt.chemistry.spectra import LINE_SHAPES
from mspt.data.packing import Budget
from mspt.data.shardset import ShardSet
from mspt.data.stream import sequential

ROOT = Path(__file__).parent.parent


def synchronise(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(functions, runs, device="cpu"):
    """Seconds of each function (name -> callable), run in turn so many times after one that is not counted.

    What slows the machine down for a while slows all of them. -> name -> list of seconds, one a round.
    """
    times = {name: [] for name in functions}
    for _ in range(runs + 1):
        for name, function in functions.items():
            synchronise(device)
            begin = time.perf_counter()
            function()
            synchronise(device)
            times[name].append(time.perf_counter() - begin)
    return {name: seconds[1:] for name, seconds in times.items()}


def medians(times):
    """name -> median seconds."""
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def ratio(times, one, other):
    """The median over rounds of one's time by the other's."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def peak_memory(build, *arguments, device="cpu"):
    """Bytes that a function needs at its peak above what was there before it.

    build(molecules, *arguments) makes the function; it is imported by name in a fresh process, where the function is
    called for two molecules first, so that libraries are loaded. arguments: the first is the number of molecules.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory, (build, arguments, torch.get_num_threads(), device))


def _peak_memory(build, arguments, threads, device):
    torch.set_num_threads(threads)
    build(2, *arguments[1:])()
    function = build(*arguments)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident size starts again from here
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name):
    """A size of this process in bytes, as Linux has it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def copy_rate(device, dtype=torch.float32):
    """Bytes a second that a large copy reads and writes, the best of a few."""
    source = torch.ones(1 << (28 if torch.device(device).type == "cuda" else 25), dtype=dtype, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, 5, device)["copy"]
    return 2 * source.nbytes / min(times)


def machine(device="cpu"):
    """What a result must say of the machine and the software that it was measured with."""
    packages = {"python": platform.python_version()}
    for package in ("torch", "torchmd-net", "deepspeed", "triton"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu(),
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "kernels": kernels.implementation(device),
        "versions": packages,
        "date": datetime.date.today().isoformat(),
    }


def cpu():
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def bundled(molecules, name="qm9-spectra", device="cpu"):
    """A MoleculeBatch of the first bundled molecules, their spectra broadened."""
    budget = Budget(molecules=molecules, atoms=30 * molecules)
    batch = next(sequential(ShardSet.open(ROOT / "shards/bundled" / name / "train"), budget))
    return batch.to(device).broadened(LINE_SHAPES)


def write(path, result):
    """A result as JSON, whole or not at all."""
    files.write(path, json.dumps(result, indent=2) + "\n")
