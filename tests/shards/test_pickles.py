"""Pickles of others: their data is read, their code is not run."""

import io
import os
import pickle
import struct
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from mspt.errors import UserError
from shards import pickles

MAPS = Path("/proc/self/maps")


def fields(count):
    return {
        "z": torch.arange(1, count + 1),
        "pos": torch.arange(3.0 * count).reshape(count, 3),
        "number": count,
        "smile": "C" * count,
        "uv": np.linspace(0, 1, 5),
    }


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, torch.Tensor | np.ndarray):
        assert one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def test_data_of_torch_geometric_without_torch_geometric(tmp_path, monkeypatch):
    data = pytest.importorskip("torch_geometric.data")
    collate = pytest.importorskip("torch_geometric.data.collate").collate
    molecules = [data.Data(**fields(count)) for count in (3, 5)]
    together, slices, _ = collate(data.Data, molecules, increment=False, add_batch=False)
    torch.save(molecules, tmp_path / "list.pt")
    torch.save((together, slices), tmp_path / "two.pt")
    torch.save((together.to_dict(), slices, data.Data), tmp_path / "three.pt")

    for module in [name for name in sys.modules if name.partition(".")[0] == "torch_geometric"]:
        monkeypatch.setitem(sys.modules, module, None)  # an import would fail
    assert_same(pickles.load(tmp_path / "list.pt"), [fields(3), fields(5)])
    for name in ("two", "three"):
        loaded, ends, *_ = pickles.load(tmp_path / f"{name}.pt")
        assert_same(loaded["z"], torch.tensor([1, 2, 3, 1, 2, 3, 4, 5]))
        assert_same(loaded["smile"], ["CCC", "CCCCC"])
        assert_same(loaded["uv"], [fields(3)["uv"]] * 2)
        assert ends["pos"].tolist() == [0, 3, 8]


def old_data(monkeypatch, fields, layout):
    """An object that is pickled as the Data of torch-geometric 1.7 or 2.0, which lack what later ones add."""
    for name in (
        "torch_geometric",
        "torch_geometric.data",
        "torch_geometric.data.data",
        "torch_geometric.data.storage",
    ):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    made = []
    for module, name in (("data", "Data"), ("storage", "GlobalStorage")):
        made.append(type(name, (), {"__module__": f"torch_geometric.data.{module}"}))
        setattr(sys.modules[f"torch_geometric.data.{module}"], name, made[-1])
    data, store = (kind() for kind in made)
    if layout == "1.7":
        vars(data).update({"x": None, "edge_attr": None} | fields)
    else:
        vars(store).update(_mapping=fields, _parent=data)
        vars(data)["_store"] = store
    return data


@pytest.mark.parametrize("layout", ["1.7", "2.0"])
def test_data_of_older_torch_geometric(tmp_path, monkeypatch, layout):
    with monkeypatch.context() as patch:
        torch.save([old_data(patch, fields(4), layout)], tmp_path / "a.pt")
    assert_same(pickles.load(tmp_path / "a.pt"), [fields(4)])


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("package", [b"numpy._core", b"numpy.core"])
def test_arrays(tmp_path, protocol, package):
    value = {
        "c": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
        "bytes": np.arange(250, dtype=np.uint8),
        "text": np.array(["CCO", "C"]),
        "scalar": np.float64(1.5),
        "empty": np.zeros((0, 3)),
    }
    data = pickle.dumps(value, protocol)
    if protocol < 4:  # later ones write the length of a name
        data = data.replace(b"numpy._core", package)
    (tmp_path / "a.pkl").write_bytes(data)
    loaded = pickles.load(tmp_path / "a.pkl")
    assert loaded.keys() == value.keys()
    for name in value:
        assert loaded[name].dtype == value[name].dtype
        np.testing.assert_array_equal(loaded[name], value[name])


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def evil_files(folder):
    evil = {"pos": [1, Evil(folder / "ran")]}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (folder / f"{protocol}.pickle").write_bytes(pickle.dumps(evil, protocol))
    torch.save(evil, folder / "zip.pt")
    return sorted(folder.iterdir())


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    files = evil_files(tmp_path)
    assert len(files) > 5
    for file in files:
        with pytest.raises(UserError) as raised:
            pickles.load(file)
        message = str(raised.value)
        assert str(file) in message and f"{os.system.__module__}.system" in message and "--trust-pickle" in message
        assert not (tmp_path / "ran").exists()


def test_trust_runs_it(tmp_path):
    for file in evil_files(tmp_path):
        pickles.load(file, trusted=True)
        assert (tmp_path / "ran").exists(), file
        (tmp_path / "ran").unlink()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("collections", "OrderedDict.fromkeys"),
        ("builtins", "getattr"),
        ("builtins", "eval"),
        ("torch_geometric.data.data", "Batch"),
        ("torch", "load"),
        ("numpy", "load"),
    ],
)
def test_only_the_listed_names_are_known(tmp_path, module, name):
    texts = b"".join(b"\x8c" + struct.pack("B", len(text)) + text.encode() for text in (module, name))
    (tmp_path / "a.pickle").write_bytes(b"\x80\x04" + texts + b"\x93.")
    with pytest.raises(UserError, match=f"run {module}.{name}"):
        pickles.load(tmp_path / "a.pickle")


def test_a_codec_other_than_that_of_bytes(tmp_path):
    (tmp_path / "a.pickle").write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.")
    with pytest.raises(UserError, match="rot13"):
        pickles.load(tmp_path / "a.pickle")


def test_arrays_of_objects_are_refused(tmp_path):
    for array in (np.array([1, "a"], object), np.zeros(2, [("a", "f8"), ("b", "O")])):
        (tmp_path / "a.pickle").write_bytes(pickle.dumps(array))
        with pytest.raises(UserError, match=r"a\.pickle.*neither numbers nor text"):
            pickles.load(tmp_path / "a.pickle")


@pytest.mark.parametrize("trusted", [False, True])
def test_torchscript_is_refused(tmp_path, trusted):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: holds a TorchScript program"):
        pickles.load(tmp_path / "a.pt", trusted)


def test_old_torch_wants_trust(tmp_path):
    torch.save({"a": torch.arange(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"a\.pt.*--trust-pickle"):
        pickles.load(tmp_path / "a.pt")
    assert_same(pickles.load(tmp_path / "a.pt", trusted=True), {"a": torch.arange(3)})


def test_damaged_files(tmp_path):
    buffer = io.BytesIO()
    torch.save(fields(3), buffer)
    whole = {"zip": buffer.getvalue(), "pickle": pickle.dumps(fields(3) | {"z": 0, "pos": 0})}
    damaged = {f"{kind}-{at}": data[:at] for kind, data in whole.items() for at in (0, 5, 20, len(data) - 5)}
    for name, data in (damaged | {"text": b"C 0.0 0.0 0.0\n", "html": b"<!DOCTYPE html>"}).items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: cannot be opened"):
            pickles.load(tmp_path / name)


def test_trust_without_the_package(tmp_path):
    (tmp_path / "a.pickle").write_bytes(b"\x80\x02cno_such_package\nMol\n)\x81.")
    with pytest.raises(UserError, match=r"a\.pickle.*no_such_package"):
        pickles.load(tmp_path / "a.pickle", trusted=True)


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux lists what is mapped")
def test_tensors_are_views_of_the_file(tmp_path):
    torch.save({"a": torch.arange(1000)}, tmp_path / "a.pt")
    loaded = pickles.load(tmp_path / "a.pt")
    assert str(tmp_path / "a.pt") in MAPS.read_text()
    assert_same(loaded, {"a": torch.arange(1000)})
