"""Which implementation runs, and what is said where it cannot."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mspt import kernels, native
from mspt.errors import UserError
from mspt.kernels import cpu, reference, selection
from mspt.kernels.cpu import build


def test_unknown_implementation_is_refused():
    with (
        pytest.raises(UserError, match="MSPT_KERNELS is 'fastest'; known: auto, reference, cpu, triton"),
        kernels.use("fastest"),
    ):
        pass


def test_float64_is_the_reference_and_float32_the_kernels():
    name, device = "radius_graph_attention", torch.device("cpu")
    assert selection.pick(name, device, torch.float64) is reference.radius_graph_attention
    assert selection.pick(name, device, torch.float32) is cpu.radius_graph_attention
    assert selection.pick(name, device, torch.bfloat16) is cpu.radius_graph_attention
    with kernels.use("reference"):
        assert selection.pick(name, device) is reference.radius_graph_attention


@pytest.fixture
def unbuilt():
    """Nothing is built or known to be unavailable; afterwards neither."""
    caches = build.load, selection._reason, selection._warn
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_without_a_compiler_the_reference_runs_and_says_so_once(monkeypatch, caplog, unbuilt):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING, "mspt"):
        for _ in range(2):
            assert selection.choose(torch.device("cpu")) == "reference"
    assert len(caplog.records) == 1
    assert "no C++ compiler" in caplog.text


def test_a_failed_build_leaves_nothing_behind(monkeypatch, tmp_path, unbuilt):
    monkeypatch.setenv("MSPT_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", ["-no-such-flag"])
    with pytest.raises(native.NoCompiler, match="no-such-flag"):
        build.load("graph")
    assert [path.suffix for path in (tmp_path / "cpu").iterdir()] == [".lock"]


def test_a_torn_library_is_built_again(monkeypatch, tmp_path, unbuilt):
    """As a machine leaves it that went down before it was on the disk."""
    monkeypatch.setenv("MSPT_CACHE", str(tmp_path))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "torn.so").touch()
    build.load("graph")
    [library] = [path for path in (tmp_path / "cpu").glob("*.so") if path.name != "torn.so"]

    def make(path):
        path.write_bytes(library.read_bytes())

    assert native.cached(tmp_path / "cpu" / "torn.so", make).graph_build
    with pytest.raises(native.NoCompiler, match=r"set CXX to g\+\+, and MSPT_CACHE to a folder"):
        native.cached(tmp_path / "cpu" / "never.so", Path.touch)


def test_many_processes_build_at_once(tmp_path):
    code = "from mspt.kernels.cpu import build; print(build.load('update').update_forward)"
    environment = {"MSPT_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin:/usr/local/bin"}
    commands = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [command.wait() for command in commands] == [0, 0, 0]
    assert len(list((tmp_path / "cpu").glob("*.so"))) == 1


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("MSPT_CPU", "avx1024")
    with pytest.raises(UserError, match="MSPT_CPU is 'avx1024'; known: avx512, avx2, portable"):
        native.level()
