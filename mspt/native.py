"""Compile C++ with the machine's compiler, once, and load it.

The sources are plain C functions over pointers, so that a build needs no header of torch or CUDA and takes seconds.
What is built lies in a cache folder under a name that holds a digest of the sources and the flags; many processes may
ask at once, on one machine or on a shared file system.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from mspt.errors import UserError

log = logging.getLogger("mspt")
# Instruction sets, best first: what torch calls them, and the flags that select them.
LEVELS = {
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx2": ["-march=x86-64-v3"],
    "portable": [],
}
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


class NoCompiler(Exception):
    """Nothing can be compiled here; the message says why."""


def level():
    """The instruction set to compile for: MSPT_CPU if set, else the best that this CPU has."""
    name = os.environ.get("MSPT_CPU") or torch.backends.cpu.get_cpu_capability().lower()
    if os.environ.get("MSPT_CPU") and name not in LEVELS:
        raise UserError(f"MSPT_CPU is {name!r}; known: {', '.join(LEVELS)}")
    return name if name in LEVELS and platform.machine() in ("x86_64", "AMD64") else "portable"


def compiler():
    """The C++ compiler: CXX if set, else the first found; GCC, whose OpenMP is torch's. Raises NoCompiler."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++")):
        if shutil.which(name):
            return name
    raise NoCompiler("no C++ compiler (g++) is on PATH; install it or set CXX")


def cache_folder():
    """Where builds are kept: MSPT_CACHE, else the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MSPT_CACHE") or Path(home) / "mspt")


def cached(library, make):
    """The shared library at this path, loaded; where it is not there yet, or does not load, make(library) makes it.

    Raises NoCompiler.
    """
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with Path(f"{library}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if library.exists():
                # A machine that went down may have left it torn; one of another kind may have made it.
                with suppress(OSError):
                    return ctypes.CDLL(str(library))
            make(library)
    except OSError as error:
        message = f"{library.parent}: {error.strerror}; set MSPT_CACHE to a folder that can be written"
        raise NoCompiler(message) from error
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        message = f"{error}; set CXX to g++, and MSPT_CACHE to a folder from which programs may be run"
        raise NoCompiler(message) from error


def run(command):
    """Run a compiler. Raises NoCompiler with what it said; otherwise returns that."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoCompiler(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return done.stderr


def _torch_openmp():
    """The OpenMP runtime that torch has loaded, to share its threads: two pools would fight over the cores."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    libraries = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line}
    return min(libraries, default=None)


def library(folder, source, headers=()):
    """The shared library of a C++ file, compiled for this machine where it is not yet. Raises NoCompiler.

    folder: of the cache. headers: files that the source includes, besides the system's.
    """
    cxx, flags, openmp = compiler(), FLAGS + LEVELS[level()], _torch_openmp()
    if openmp:
        flags = [*flags, "-fopenmp"]
    digest = hashlib.sha256(repr((cxx, flags, openmp, torch.__version__)).encode())
    for file in sorted([*headers, source]):
        digest.update(file.read_bytes())
    path = cache_folder() / folder / f"{source.stem}-{level()}-{digest.hexdigest()[:16]}.so"
    return cached(path, lambda path: _compile(cxx, flags, openmp, source, path))


def wanted(folder, source, without):
    """The library, or None where there is no compiler, which is said with what it means, or where MSPT_KERNELS names
    the reference.
    """
    if os.environ.get("MSPT_KERNELS") == "reference":
        return None
    try:
        return library(folder, source)
    except NoCompiler as error:
        log.warning("mspt: %s: %s", without, error)
        return None


def _compile(cxx, flags, openmp, source, library):
    """Compile beside the final name, then rename: a library is whole or not there."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built, object_file = Path(scratch) / library.name, Path(scratch) / "kernel.o"
        link = [openmp, f"-Wl,-rpath,{Path(openmp).parent}"] if openmp else []
        run([cxx, *flags, "-c", str(source), "-o", str(object_file)])
        run([cxx, "-shared", str(object_file), *link, "-o", str(built)])
        os.replace(built, library)


def pointer(tensor):
    """The address of a tensor's first element, null for None; whoever calls keeps the tensor for as long."""
    return ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None)
