"""Other people's pickles and .pt files, opened without running code from them.

A pickle names the functions and classes that rebuild its objects, and Python imports and calls whatever it names. Here
only the names in ALLOWED are known, and most of them stand for shells that do no more than keep what they are given, so
that torch-geometric, of any version, need not be installed.
"""

import collections
import pickle
from types import SimpleNamespace

import numpy as np
import torch

from mspt.errors import UserError

ZIP = b"PK\x03\x04"
# Files of torch.save before version 1.6 begin with this number, itself pickled.
LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)


class Fields:
    """Stands in for an object that only holds fields: what the pickle says of it lies in its __dict__."""


class _Dtype:
    """Stands in for numpy.dtype, whose own __setstate__ would believe any size and offset."""

    def __init__(self, code, *_):
        self.code, self.order = code, "="

    def __setstate__(self, state):
        self.order = state[1]


class _Array:
    """Stands in for a numpy array until all of its state is there."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data, dtype, shape, order):
    """Bytes -> array; dtype: a _Dtype."""
    dtype = np.dtype(dtype.code).newbyteorder(dtype.order)
    if dtype.kind not in "biufcSU":
        raise ValueError(f"an array of {dtype}, neither numbers nor text")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _encode(text, encoding):
    """Protocol 2 writes bytes as text; _codecs.encode itself would look up any codec."""
    if encoding != "latin1":
        raise ValueError(f"bytes are written in {encoding!r}, not in latin1")
    return text.encode("latin1")


# (module, name) as a pickle writes them -> what is used for them.
ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("__builtin__", "dict"): dict,
    ("builtins", "dict"): dict,
    ("__builtin__", "bytes"): bytes,  # protocol 2 calls it for empty ones
    ("_codecs", "encode"): _encode,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("torch_geometric.data.data", "Data"): Fields,
    ("torch_geometric.data.data", "DataEdgeAttr"): Fields,
    ("torch_geometric.data.data", "DataTensorAttr"): Fields,
    ("torch_geometric.data.storage", "GlobalStorage"): Fields,
}
for _package in ("numpy.core", "numpy._core"):  # before and since numpy 2
    ALLOWED[f"{_package}.multiarray", "_reconstruct"] = lambda *_: _Array()
    ALLOWED[f"{_package}.multiarray", "scalar"] = lambda dtype, data: _array(data, dtype, (), "C")[()]
    ALLOWED[f"{_package}.numeric", "_frombuffer"] = _array


def add_argument(parser):
    """The flag that allows everything, for sources that read pickles."""
    parser.add_argument(
        "--trust-pickle", action="store_true", help="open pickles that may run code; only for files you trust"
    )


def load(path, trusted=False):
    """What was pickled in a file, by torch.save or by pickle: dicts, lists, tuples, numbers, texts, tensors, arrays.

    An object of torch-geometric becomes the dict of its fields, without those that are None. Tensors of a .pt file of
    torch 1.6 or later are views of the file (mmap), so that only those looked at take memory; everything else is read
    into memory. trusted: import and call what else the file names. Raises UserError where the file cannot be opened,
    and, not trusted, where it names anything else or is of an older torch.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            known = ALLOWED.get((module, name))
            if trusted and known is not Fields:
                return super().find_class(module, name)
            if known is None:
                raise UserError(
                    f"{path}: opening it would run {module}.{name}, which rebuilds no tensor, array or Data of "
                    "torch-geometric; if you trust the file, add --trust-pickle"
                )
            return known

    try:
        with path.open("rb") as file:
            head = file.read(len(LEGACY))
            if not head.startswith(ZIP) and head != LEGACY:
                file.seek(0)
                return _plain(Unpickler(file).load())
        zipped = head.startswith(ZIP)
        # torch.load unpacks these in ways that can write files.
        if not zipped and not trusted:
            raise UserError(f"{path}: in the format of torch before 1.6; if you trust the file, add --trust-pickle")
        # torch.load would run an archive of TorchScript, which it tells by this member, without asking the unpickler.
        if zipped and "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
            raise UserError(f"{path}: holds a TorchScript program, not data; give the data set's own file")
        # Not weights_only: that takes an unpickler of its own, which takes twice as long and reads no arrays.
        module = SimpleNamespace(
            __name__=__name__, Unpickler=Unpickler, load=lambda file, **options: Unpickler(file, **options).load()
        )
        return _plain(torch.load(path, map_location="cpu", mmap=zipped, weights_only=False, pickle_module=module))
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise UserError(
            f"{path}: cannot be opened as a pickle ({type(error).__name__}: {error}); is it whole, and is the package "
            "that it was written with installed?"
        ) from error


def _plain(value):
    """Value with the shells in it, at any depth, replaced by what they stand for."""
    if isinstance(value, Fields):
        fields = vars(value)
        if "_store" in fields:  # torch-geometric 2; in 1 the fields are the object's own
            fields = vars(fields["_store"])["_mapping"]
        return {name: _plain(field) for name, field in fields.items() if field is not None}
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {name: _plain(field) for name, field in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value
