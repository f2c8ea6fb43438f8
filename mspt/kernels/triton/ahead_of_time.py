"""Compile every kernel for GPUs that are not here, and read what it takes of them.

python -m mspt.kernels.triton.ahead_of_time prints the table of docs/kernels.md. Kernels are compiled as the operations
launch them: the operations run on a few atoms, and their launches are written down in place of being started.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from mspt.kernels import RadialBasis, pair_geometry
from mspt.kernels import triton as operations
from mspt.kernels.triton import launch

# Channels, heads and type of a model, an architecture, and whether with all options of the message pass or with none:
# the published model, then the quickstart's. Not every combination: a compiler takes half a second a kernel.
FORMS = (
    (256, 8, torch.float32, 80, True),
    (256, 8, torch.float32, 90, True),
    (256, 8, torch.float32, 90, False),
    (256, 8, torch.bfloat16, 80, True),
    (256, 8, torch.bfloat16, 90, True),
    (64, 4, torch.float32, 80, True),
)
TYPE_NAMES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
REGISTERS = 65536  # of a multiprocessor
WARPS = 64  # that a multiprocessor can hold
BLOCKS = 32  # programs that a multiprocessor can hold


def launches(channels, heads, dtype, whole):
    """What the operations launch, none twice: kernel, types of arguments, constants, warps.

    whole: with all options of the message pass, or with none.
    """
    recorded = {}

    def record(kernel, _grid, arguments, warps, constants):
        types = [TYPE_NAMES[x.dtype] if torch.is_tensor(x) else "i32" for x in arguments]
        recorded[kernel.fn.__name__, *types, *sorted(constants.items()), warps] = (kernel, types, constants, warps)

    start, launch.start = launch.start, record
    try:
        _run_all(channels, heads, dtype, whole)
    finally:
        launch.start = start
    return recorded


def _run_all(channels, heads, dtype, whole):
    """Every operation, forwards and backwards, the message pass twice, on the CPU; nothing is computed."""
    n, basis = 4, RadialBasis(64, 5.0, 384 if whole else None)
    positions = torch.arange(3 * n).view(n, 3).float() / 3
    found = operations.radius_graph(positions, torch.tensor([0, n]), 5.0, 32, True)
    geometry = pair_geometry(positions.double().requires_grad_(whole), found, basis, dtype)

    def new(*shape):
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    vec = new(n, 3, channels)
    gates = operations.gate_table(new(4 * channels, 64), new(4 * channels), heads, basis, geometry)
    qkv = new(n, heads, 5 * channels // heads)
    scalars, vectors = operations.radius_graph_attention(qkv, vec if whole else None, gates, found, geometry, whole)
    x, moved = operations.update(scalars, vectors, new(n, 3 * channels), new(n, 3, 3 * channels))
    white = operations.whiten(vec, new(channels), (2e-5, 2e-5, 2e-5))
    (slope,) = torch.autograd.grad((scalars.sum(), vectors.square().sum()), qkv, create_graph=True)
    (x.sum() + moved.sum() + white.sum() + slope.sum()).backward()


def compile_for(architecture, kernel, signature, constants, warps):
    """What a kernel takes: registers a thread, spilled bytes, shared memory in bytes, and warps that fit at once."""
    names = kernel.arg_names
    types = dict(zip(names, signature, strict=False)) | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
    registers, spilled = _assemble(compiled.asm["ptx"], architecture)
    return {
        "registers": registers,
        "spilled": spilled,
        "shared": compiled.metadata.shared,
        "warps": min(WARPS, BLOCKS * warps, REGISTERS // (32 * -(-registers // 8) * 8)),
    }


def _assemble(ptx, architecture):
    """Registers a thread and bytes of spills of a kernel, from ptxas."""
    assembler = get_ptxas(architecture)
    name = f"sm_{architecture}" + ("a" if architecture >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [getattr(assembler, "path", assembler), "-v", f"--gpu-name={name}", source, "-o", f"{folder}/cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    return int(re.search(r"Used (\d+) registers", said)[1]), spilled


def report():
    """What every kernel takes in each of FORMS, a list of records."""
    compiled, rows = {}, []
    for channels, heads, dtype, architecture, whole in FORMS:
        for key, form in launches(channels, heads, dtype, whole).items():
            took = compiled.get((architecture, key)) or compile_for(architecture, *form)
            compiled[architecture, key] = took
            head = {"kernel": key[0], "options": "all" if whole else "none", "channels": channels}
            head |= {"type": str(dtype).removeprefix("torch."), "architecture": f"sm_{architecture}"}
            rows.append(head | took)
    return rows


def markdown(rows):
    """The records as a table."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row[column]) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    rows = report()
    print(json.dumps(rows) if "--json" in sys.argv else markdown(rows))
