"""A block of records <-> bytes: safetensors, ragged arrays end to end with their ptr.

Names in a block of m records with n atoms in all:

    ptr [m + 1], numbers [n], positions [n, 3]         atoms of record i: ptr[i] to ptr[i + 1]
    keys, keys_ptr; smiles, smiles_ptr                 UTF-8 text end to end
    words [m]                                          keyed.word of each key: what random numbers are keyed by
    charge [m], provenance [m]                         index into the metadata's table of sources and methods
    targets/NAME [m]                                   float64, NaN where missing
    forces [n, 3]                                      NaN where missing; absent if no record has them
    bonds [b, 2], bond_types [b], bonds_ptr [m + 1]    absent if no record has them
    bonds_known [m]                                    0 where a record has no list of bonds; absent with them
    spectra/NAME/kind [m]                              0 missing, 1 values, 2 lines; absent if no record has it
    spectra/NAME/values [v, L]                         of the records of kind 1, in order; float16 or float32
    spectra/NAME/positions, strengths, ptr             lines; records that have none own an empty range
"""

import json
import math

import numpy as np
from safetensors.numpy import save

from mspt.chemistry.spectra import GRIDS
from mspt.data import keyed
from mspt.data.schema import Lines, Record

MISSING, VALUES, LINES = 0, 1, 2
TYPES = {
    name: np.dtype(kind)
    for name, kind in {
        "U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
    }.items()
}  # fmt: skip


class DamagedBlock(ValueError):
    """Bytes that are no block; the message says what is wrong with them."""


def ptr_of(counts):
    """Offsets [m + 1] of ragged rows from their lengths [m]."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def encode(records):
    """Records -> bytes; the same records give the same bytes."""
    m = len(records)
    arrays = {
        "ptr": ptr_of([len(r.numbers) for r in records]),
        "numbers": np.concatenate([np.asarray(r.numbers, np.uint8) for r in records]),
        "positions": np.concatenate([np.asarray(r.positions, np.float32) for r in records]),
        "charge": np.array([r.charge for r in records], np.int8),
        "words": np.array([keyed.word(r.key) for r in records], np.int64),
    }
    for name, texts in (("keys", [r.key for r in records]), ("smiles", [r.smiles for r in records])):
        data = [text.encode() for text in texts]
        arrays[name] = np.frombuffer(b"".join(data), np.uint8)
        arrays[f"{name}_ptr"] = ptr_of([len(d) for d in data])
    table, indices = [], []
    for r in records:
        entry = {"source": r.source, "methods": dict(sorted(r.methods.items()))}
        if entry not in table:
            table.append(entry)
        indices.append(table.index(entry))
    arrays["provenance"] = np.array(indices, np.int16)
    for name in sorted({name for r in records for name in r.targets}):
        arrays[f"targets/{name}"] = np.array([r.targets.get(name, np.nan) for r in records], np.float64)
    if any(r.forces is not None for r in records):
        missing = [np.full((len(r.numbers), 3), np.nan, np.float32) if r.forces is None else r.forces for r in records]
        arrays["forces"] = np.concatenate(missing).astype(np.float32)
    if any(r.bonds is not None for r in records):
        bonds = [np.zeros((0, 2), np.int16) if r.bonds is None else r.bonds for r in records]
        types = [np.zeros(0, np.uint8) if r.bonds is None else r.bond_types for r in records]
        arrays["bonds"] = np.concatenate(bonds).astype(np.int16)
        arrays["bond_types"] = np.concatenate(types).astype(np.uint8)
        arrays["bonds_ptr"] = ptr_of([len(b) for b in bonds])
        arrays["bonds_known"] = np.array([r.bonds is not None for r in records], np.uint8)
    for name in GRIDS:
        spectra = [r.spectra.get(name) for r in records]
        if all(s is None for s in spectra):
            continue
        kind = np.zeros(m, np.uint8)
        kind[[i for i, s in enumerate(spectra) if isinstance(s, np.ndarray)]] = VALUES
        kind[[i for i, s in enumerate(spectra) if isinstance(s, Lines)]] = LINES
        arrays[f"spectra/{name}/kind"] = kind
        if (kind == VALUES).any():
            values = np.stack([s for s in spectra if isinstance(s, np.ndarray)])
            arrays[f"spectra/{name}/values"] = values if values.dtype == np.float16 else values.astype(np.float32)
        if (kind == LINES).any():
            lines = [s for s in spectra if isinstance(s, Lines)]
            arrays[f"spectra/{name}/positions"] = np.concatenate([s.positions for s in lines]).astype(np.float32)
            arrays[f"spectra/{name}/strengths"] = np.concatenate([s.strengths for s in lines]).astype(np.float32)
            counts = [len(s.positions) if isinstance(s, Lines) else 0 for s in spectra]
            arrays[f"spectra/{name}/ptr"] = ptr_of(counts)
    # One metadata entry: safetensors writes several in no fixed order.
    return save(arrays, metadata={"mspt": json.dumps({"provenance": table})})


def decode(data):
    """Bytes of a safetensors file (a buffer) -> name -> array, which are views of them; "" -> its metadata.

    The format's own reader copies every array; here nothing is copied. Raises DamagedBlock where the bytes are not
    what the format says.
    """
    data = np.frombuffer(data, np.uint8)
    try:
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        if not 8 < start <= len(data):
            raise DamagedBlock(f"its header should end at byte {start} of {len(data)}")
        header = json.loads(data[8:start].tobytes())
        arrays = {"": header.pop("__metadata__", {})}
        for name, entry in header.items():
            (begin, end), kind, shape = entry["data_offsets"], TYPES[entry["dtype"]], tuple(entry["shape"])
            if not 0 <= begin <= end <= len(data) - start or math.prod(shape) * kind.itemsize != end - begin:
                raise DamagedBlock(f"{name}: bytes {begin} to {end} are not {shape} values of {entry['dtype']}")
            arrays[name] = data[start + begin : start + end].view(kind).reshape(shape)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, DamagedBlock):
            raise
        raise DamagedBlock(f"its header is not one of safetensors ({error!r})") from error
    return arrays


def take(values, ptr, rows):
    """Rows of a ragged array: values [t, …], ptr [m + 1], rows [k] -> their values end to end, their lengths [k]."""
    starts, counts = ptr[rows], ptr[rows + 1] - ptr[rows]
    shift = np.repeat(starts - (np.cumsum(counts) - counts), counts)
    return values[shift + np.arange(len(shift))], counts


def texts(block, name, rows):
    """Strings of keys or smiles at rows."""
    data, ptr = block[name].tobytes(), block[f"{name}_ptr"]
    return [data[ptr[i] : ptr[i + 1]].decode() for i in rows]


def records(data):
    """Bytes -> list of Records."""
    block = decode(data)
    table = json.loads(block[""]["mspt"])["provenance"]
    ptr = block["ptr"]
    keys, smiles = (texts(block, name, range(len(ptr) - 1)) for name in ("keys", "smiles"))
    result = []
    for i, key in enumerate(keys):
        atoms = slice(ptr[i], ptr[i + 1])
        optional = {}
        if "forces" in block and not np.isnan(block["forces"][atoms]).any():
            optional["forces"] = block["forces"][atoms]
        if "bonds" in block and block["bonds_known"][i]:
            own = slice(*block["bonds_ptr"][i : i + 2])
            optional |= {"bonds": block["bonds"][own], "bond_types": block["bond_types"][own]}
        prefix = "targets/"
        targets = {name.removeprefix(prefix): float(a[i]) for name, a in block.items() if name.startswith(prefix)}
        provenance = table[block["provenance"][i]]
        result.append(
            Record(
                key=key,
                numbers=block["numbers"][atoms],
                positions=block["positions"][atoms],
                spectra={name: s for name in GRIDS if (s := _spectrum(block, name, i)) is not None},
                targets={name: value for name, value in targets.items() if not np.isnan(value)},
                smiles=smiles[i],
                charge=int(block["charge"][i]),
                source=provenance["source"],
                methods=provenance["methods"],
                **optional,
            )
        )
    return result


def _spectrum(block, name, i):
    kind = block.get(f"spectra/{name}/kind")
    if kind is None or kind[i] == MISSING:
        return None
    if kind[i] == VALUES:
        return block[f"spectra/{name}/values"][(kind[:i] == VALUES).sum()]
    own = slice(*block[f"spectra/{name}/ptr"][i : i + 2])
    return Lines(block[f"spectra/{name}/positions"][own], block[f"spectra/{name}/strengths"][own])
