"""Compile the CUDA kernels with nvcc, once for a kind of GPU, and load them: plain C functions over pointers."""

import hashlib
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from mspt.native import NoCompiler, cache_folder, cached, run

SOURCES = Path(__file__).parent
# Products and sums are rounded one by one, as on the host: which atoms are nearer than the cut-off must not depend on
# where that is asked.
FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-shared", "-Xcompiler", "-fPIC", "-Xptxas", "-v"]


def compiler():
    """nvcc: that of CUDA_HOME if set, else the one on PATH. Raises NoCompiler."""
    home = os.environ.get("CUDA_HOME")
    for name in (Path(home) / "bin" / "nvcc" if home else None, "nvcc"):
        if name and shutil.which(name):
            return str(name)
    raise NoCompiler("nvcc is not on PATH; install the CUDA toolkit or set CUDA_HOME")


def compile_for(architecture, source, library):
    """Compile a source for an architecture, such as sm_90, and return what ptxas says of registers and spills."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch) / library.name
        said = run([compiler(), *FLAGS, f"-arch={architecture}", str(source), "-o", str(built)])
        os.replace(built, library)
    return said


@cache
def load(name, architecture):
    """The shared library of NAME.cu for an architecture, compiled where it is not yet. Raises NoCompiler."""
    digest = hashlib.sha256(repr((compiler(), FLAGS, architecture)).encode())
    for source in sorted([*SOURCES.glob("*.h"), SOURCES / f"{name}.cu"]):
        digest.update(source.read_bytes())
    library = cache_folder() / "cuda" / f"{name}-{architecture}-{digest.hexdigest()[:16]}.so"
    return cached(library, lambda library: compile_for(architecture, SOURCES / f"{name}.cu", library))
