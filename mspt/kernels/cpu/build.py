"""The C++ kernels, compiled at first use (mspt.native)."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from mspt import native

SOURCES = Path(__file__).parent


@cache
def load(name):
    """The shared library of NAME.cpp. Raises native.NoCompiler."""
    return native.library("cpu", SOURCES / f"{name}.cpp", SOURCES.glob("*.h"))


def load_all():
    """Load every kernel, compiling side by side what is not there yet. Raises native.NoCompiler."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(load, [source.stem for source in SOURCES.glob("*.cpp")]))


def call(library, function, tensors, *numbers):
    """Call a C function that takes the addresses of contiguous tensors, then numbers as int64_t."""
    getattr(load(library), function)(*map(native.pointer, tensors), *[ctypes.c_int64(number) for number in numbers])
