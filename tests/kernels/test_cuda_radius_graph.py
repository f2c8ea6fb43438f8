"""The GPU's search for neighbours: compiled for GPUs that are not here, and its decisions run on the host."""

import ctypes
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from agreement import molecules

from mspt.kernels import reference
from mspt.kernels.cuda import build
from mspt.kernels.cuda.radius_graph import search
from mspt.native import NoCompiler, compiler


def missing(find):
    """Why a compiler is not found, or an empty string."""
    try:
        find()
    except NoCompiler as error:
        return str(error)
    return ""


@pytest.mark.skipif(missing(build.compiler) != "", reason=missing(build.compiler) or "nvcc is there")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_kernels_fit(architecture, tmp_path):
    library = tmp_path / "radius_graph.so"
    said = build.compile_for(architecture, build.SOURCES / "radius_graph.cu", library)
    registers = [int(x) for x in re.findall(r"Used (\d+) registers", said)]
    spilled = [int(x) for x in re.findall(r"(\d+) bytes spill", said)]
    assert len(registers) == 3
    # At least half of a multiprocessor's warps fit; what is kept over the call of a division may spill.
    assert max(registers) <= 64
    assert max(spilled) <= 16
    assert all(hasattr(ctypes.CDLL(str(library)), name) for name in ("mspt_cells", "mspt_count", "mspt_fill"))


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    if missing(compiler):
        pytest.skip(missing(compiler))
    library = tmp_path_factory.mktemp("host") / "radius_graph.so"
    source = Path(__file__).with_name("radius_graph_host.cpp")
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{build.SOURCES}"]
    subprocess.run([compiler(), *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def assert_same(got, expected):
    for name in ("source", "target", "ptr", "pair", "first", "second"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize("loop", [True, False])
@pytest.mark.parametrize(("cutoff", "max_neighbours"), [(0.4, 32), (2.0, 5), (3.0, 1), (2.5, 10**6), (math.inf, 10**6)])
@pytest.mark.parametrize("sizes", [(1,), (0, 3, 0, 1, 30), (300,), (70, 2, 150, 65)])
def test_search_is_the_reference(host, sizes, cutoff, max_neighbours, loop):
    positions, ptr = molecules(sizes, seed=sum(sizes))
    given = positions, ptr, cutoff, max_neighbours, loop
    assert_same(search(host, None, *given), reference.radius_graph(*given))


@pytest.mark.parametrize("shape", [(1, 1, 0), (1, 0, 0), (0, 0, 0), (1, 1, 30)])
def test_flat_long_and_pointlike_systems(host, shape):
    """Atoms on a lattice, many pairs at the same distance: the nearest are taken in order of their index."""
    positions, ptr = molecules((400,), seed=1)
    positions = (positions * 2).round() / 2 * torch.tensor(shape)
    given = positions, ptr, 1.5, 8, True
    assert_same(search(host, None, *given), reference.radius_graph(*given))


def test_sparse_atoms_share_larger_cells(host):
    """Two clusters far apart, whose box holds millions of cells of the cut-off's size."""
    positions, ptr = molecules((200,), seed=2)
    positions[100:] += 1e4
    given = positions, ptr, 2.0, 32, True
    assert_same(search(host, None, *given), reference.radius_graph(*given))


def test_a_large_system(host):
    torch.manual_seed(0)
    positions, cutoff = torch.rand(20_000, 3, dtype=torch.float64) * 60, 4.0
    graph = search(host, None, positions, torch.tensor([0, 20_000]), cutoff, 10**6, False)
    found = 0
    for block in range(0, 20_000, 1000):
        rows = positions[block : block + 1000]
        near = torch.cdist(rows, positions, compute_mode="donot_use_mm_for_euclid_dist") < cutoff
        near[torch.arange(1000), torch.arange(block, block + 1000)] = False
        target, source = near.nonzero(as_tuple=True)
        edges = slice(int(graph.ptr[block]), int(graph.ptr[block + 1000]))
        assert torch.equal(graph.source[edges], source) and torch.equal(graph.target[edges], target + block)
        found += len(source)
    assert found == len(graph.source)
