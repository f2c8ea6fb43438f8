"""A block of records <-> bytes: safetensors, ragged arrays end to end with their ptr.

Names in a block of m records with n atoms in all:

    ptr [m + 1], numbers [n], positions [n, 3]         atoms of record i: ptr[i] to ptr[i + 1]
    keys, keys_ptr; smiles, smiles_ptr                 UTF-8 text end to end
    words [m]                                          keyed.word of each key: what random numbers are keyed by
    charge [m], provenance [m]                         index into the metadata's table of sources and methods
    targets/NAME [m]                                   float64, NaN where missing
    forces [n, 3]                                      NaN where missing; absent if no record has them
    bonds [b, 2], bond_types [b], bonds_ptr [m + 1]    indices within the record; absent if no record has them
    bonds_known [m]                                    0 where a record has no list of bonds; absent with them
    spectra/NAME/kind [m]                              0 missing, 1 values, 2 lines; absent if no record has it
    spectra/NAME/values [v, L]                         of the records of kind 1, in order; float16 or float32
    spectra/NAME/sums [v]                              sums.row_sums of the values
    spectra/NAME/positions, strengths, ptr             lines; records that have none own an empty range
    padding [p]                                        in front of values, which come last and start at 64 bytes

The bytes before the values are the block's head. The index has its length and its checksum; values have their sums, so
that a row can be checked as it is taken, and nothing is read for a checksum alone that is large.
"""

import json
import math

import numpy as np

from mspt.chemistry.spectra import GRIDS
from mspt.data import keyed
from mspt.data.schema import Lines, Record
from mspt.data.sums import row_sums

MISSING, VALUES, LINES = 0, 1, 2
TYPES = {
    name: np.dtype(kind)
    for name, kind in {
        "U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
    }.items()
}  # fmt: skip

ALWAYS = {"ptr", "numbers", "positions", "keys", "keys_ptr", "smiles", "smiles_ptr", "words", "charge", "provenance"}
BONDS = {"bonds", "bond_types", "bonds_ptr", "bonds_known"}  # all or none
ALIGNMENT = 64  # of the first values, in bytes


def _layout():
    """Array -> its type, the shape of a row, and what says how many rows: "m" or the name of a ptr."""
    u8, i8, i16, i64, f32 = (TYPES[name] for name in ("U8", "I8", "I16", "I64", "F32"))
    layout = {
        "numbers": (u8, (), "ptr"),
        "positions": (f32, (3,), "ptr"),
        "forces": (f32, (3,), "ptr"),
        "keys": (u8, (), "keys_ptr"),
        "smiles": (u8, (), "smiles_ptr"),
        "words": (i64, (), "m"),
        "charge": (i8, (), "m"),
        "provenance": (i16, (), "m"),
        "bonds": (i16, (2,), "bonds_ptr"),
        "bond_types": (u8, (), "bonds_ptr"),
        "bonds_known": (u8, (), "m"),
    }
    for name in GRIDS:
        layout[f"spectra/{name}/kind"] = (u8, (), "m")
        layout |= {f"spectra/{name}/{part}": (f32, (), f"spectra/{name}/ptr") for part in ("positions", "strengths")}
    return layout


LAYOUT = _layout()
PTRS = list(dict.fromkeys(rows for _, _, rows in LAYOUT.values() if rows != "m"))
TARGET = (TYPES["F64"], (), "m")
HALF_OR_SINGLE = (TYPES["F16"], TYPES["F32"])


class DamagedBlock(ValueError):
    """Bytes that are no block; the message says what is wrong with them."""


class DamagedRows(DamagedBlock):
    """Spectra whose values are not what was written. rows: their places in what was asked for, an array."""

    def __init__(self, name, rows):
        super().__init__(f"checksum of spectra/{name}/values")
        self.rows = rows


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
            values = values if values.dtype == np.float16 else values.astype(np.float32)
            arrays |= {f"spectra/{name}/values": values, f"spectra/{name}/sums": row_sums(values)}
        if (kind == LINES).any():
            lines = [s for s in spectra if isinstance(s, Lines)]
            arrays[f"spectra/{name}/positions"] = np.concatenate([s.positions for s in lines]).astype(np.float32)
            arrays[f"spectra/{name}/strengths"] = np.concatenate([s.strengths for s in lines]).astype(np.float32)
            counts = [len(s.positions) if isinstance(s, Lines) else 0 for s in spectra]
            arrays[f"spectra/{name}/ptr"] = ptr_of(counts)
    return _save(arrays, {"mspt": json.dumps({"provenance": table})})


def _save(arrays, metadata):
    """The bytes of a safetensors file. Its own writer mixes what is large with what is small, by type and name; so does
    this one, but for values, which come last.
    """
    types = {kind: name for name, kind in TYPES.items()}
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, "IFU".index(types[arrays[name].dtype][0]), name))
    last = [name for name in names if name.endswith("/values")]
    if last:
        names = [name for name in names if name not in last]
        arrays["padding"] = np.zeros(-sum(arrays[name].nbytes for name in names) % ALIGNMENT, np.uint8)
        names += ["padding", *last]
    header, at = {"__metadata__": metadata}, 0
    for name in names:
        array, begin = arrays[name], at
        at += array.nbytes
        header[name] = {"dtype": types[array.dtype], "shape": array.shape, "data_offsets": [begin, at]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % (ALIGNMENT if last else 8))
    return b"".join([len(text).to_bytes(8, "little"), text, *(arrays[name].tobytes() for name in names)])


def head(data):
    """How many bytes of a block lie before its values."""
    arrays = decode(data)
    return len(data) - sum(array.nbytes for name, array in arrays.items() if name.endswith("/values"))


def decode(data):
    """Bytes of a safetensors file (a buffer) -> name -> array, which are views of them; "" -> its metadata.

    The format's own reader copies every array; here nothing is copied. Raises DamagedBlock where the bytes are not
    what the format says.
    """
    try:
        data = np.frombuffer(data, np.uint8)
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        if not 8 < start <= len(data):
            raise DamagedBlock(f"its header should end at byte {start} of {len(data)}")
        header = json.loads(data[8:start].tobytes())
        arrays = {"": header.pop("__metadata__", {})}
        if "" in header:
            raise DamagedBlock("an array in it has no name")
        for name, entry in header.items():
            (begin, end), kind, shape = entry["data_offsets"], TYPES[entry["dtype"]], tuple(entry["shape"])
            # Before anything is multiplied: 2**40 times a text is a long one.
            if set(map(type, (begin, end, *shape))) != {int}:
                raise DamagedBlock(f"{name}: its offsets or its shape are not whole numbers")
            if not 0 <= begin <= end <= len(data) - start or math.prod(shape) * kind.itemsize != end - begin:
                raise DamagedBlock(f"{name}: bytes {begin} to {end} are not {shape} values of {entry['dtype']}")
            arrays[name] = data[start + begin : start + end].view(kind).reshape(shape)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, DamagedBlock):
            raise
        raise DamagedBlock(f"its header is not one of safetensors ({error!r})") from error
    return arrays


def check(block):
    """Raise DamagedBlock where the arrays of a decoded block do not fit together, so that any row of it can be read.

    Whether values make sense, such as whether a position is finite, is the build's to check (schema.validate).
    """
    missing = (ALWAYS if BONDS.isdisjoint(block) else ALWAYS | BONDS) - block.keys()
    if missing:
        raise DamagedBlock(f"{min(missing)} is missing")
    m = block["ptr"].size - 1
    if m < 1:
        raise DamagedBlock("it holds no records")
    present = [name for name in PTRS if name in block]
    for name in present:
        if block[name].dtype != TYPES["I64"] or block[name].shape != (m + 1,):
            raise _unlike(name, block[name], TYPES["I64"], (m + 1,))
    # All at once: many small arrays cost more than one.
    ptrs = np.concatenate([block[name] for name in present]).reshape(-1, m + 1)
    falls = ptrs[:, 1:] < ptrs[:, :-1]
    if np.count_nonzero(falls) or np.count_nonzero(ptrs[:, 0]):
        wrong = falls.any(1) | (ptrs[:, 0] != 0)
        raise DamagedBlock(f"{present[wrong.argmax()]} does not rise from 0")
    lengths = {"m": m} | dict(zip(present, ptrs[:, -1].tolist(), strict=True))
    for name, array in block.items():
        entry = LAYOUT.get(name) or (TARGET if name.startswith("targets/") else None)
        if entry is None:
            continue
        kind, row, rows = entry
        if rows not in lengths:
            raise DamagedBlock(f"{name} is there without {rows}")
        if array.dtype != kind or array.shape != (lengths[rows], *row):
            raise _unlike(name, array, kind, (lengths[rows], *row))
    if "bonds" in block and not within(block["bonds"], np.repeat(np.diff(block["ptr"]), np.diff(block["bonds_ptr"]))):
        raise DamagedBlock("bonds: an atom index is outside its molecule")
    for name, grid in GRIDS.items():
        _check_spectra(block, f"spectra/{name}", grid.length)
    for name in ("keys", "smiles"):
        _check_texts(name, block[name], block[f"{name}_ptr"])


def within(pairs, counts):
    """Whether pairs [b, 2] number atoms of molecules of counts [b]."""
    return not np.count_nonzero((pairs < 0) | (pairs >= counts[:, None]))


def _unlike(name, array, kind, shape):
    return DamagedBlock(f"{name}: {array.dtype} {array.shape} where {kind} {shape} is needed")


def _check_spectra(block, prefix, length):
    """What kind says of each record is what there is; length: points of the grid."""
    kind, values, ptr = (block.get(f"{prefix}/{part}") for part in ("kind", "values", "ptr"))
    if kind is None:
        if values is not None or ptr is not None:
            raise DamagedBlock(f"{prefix}/kind is missing")
        return
    kinds = kind.tobytes()
    absent, valued, lined = (kinds.count(known) for known in (MISSING, VALUES, LINES))
    if absent + valued + lined != len(kinds):
        raise DamagedBlock(f"{prefix}/kind: {kind.max()} is unknown")
    shape = None if values is None else values.shape
    if shape != ((valued, length) if valued else None) or (valued and values.dtype not in HALF_OR_SINGLE):
        raise DamagedBlock(f"{prefix}/values: {shape} where kind says {valued} rows of {length}")
    if f"{prefix}/sums" in block:
        check_values(prefix.removeprefix("spectra/"), values, block[f"{prefix}/sums"])
    if (ptr is not None) != (lined > 0):
        raise DamagedBlock(f"{prefix}/ptr: kind says that {lined} records have lines")
    if lined and not (f"{prefix}/positions" in block and f"{prefix}/strengths" in block):
        raise DamagedBlock(f"{prefix}: positions or strengths of lines are missing")
    if lined and np.count_nonzero((ptr[1:] != ptr[:-1]) > (kind == LINES)):
        raise DamagedBlock(f"{prefix}/ptr: a record that has no lines owns some")


def check_values(name, values, sums):
    """Raise DamagedRows where values [v, L] of a spectrum do not have these sums [v]."""
    if np.shape(sums) != np.shape(values)[:1]:
        raise DamagedBlock(f"spectra/{name}/sums: {np.shape(sums)} where there are {np.shape(values)} values")
    wrong = np.flatnonzero(row_sums(values) != sums)
    if len(wrong):
        raise DamagedRows(name, wrong)


def values_hold(data):
    """Whether all values in the bytes of a block, whose head is what was written, are so too."""
    block = decode(data)
    try:
        for name in GRIDS:
            if f"spectra/{name}/sums" in block:
                check_values(name, block[f"spectra/{name}/values"], block[f"spectra/{name}/sums"])
    except DamagedRows:
        return False
    return True


def _check_texts(name, data, ptr):
    content = data.tobytes()
    if content.isascii():
        return
    starts = ptr[ptr < len(data)]
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise DamagedBlock(f"{name} is not UTF-8 at byte {error.start}") from error
    # A byte 10xxxxxx continues a character.
    if (data[starts] >> 6 == 0b10).any():
        raise DamagedBlock(f"{name}_ptr cuts a character in two")


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
    """Bytes -> list of Records. Raises DamagedBlock where the bytes are no block."""
    block = decode(data)
    check(block)
    table = _provenance(block)
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
        source, methods = table[block["provenance"][i]]
        result.append(
            Record(
                key=key,
                numbers=block["numbers"][atoms],
                positions=block["positions"][atoms],
                spectra={name: s for name in GRIDS if (s := _spectrum(block, name, i)) is not None},
                targets={name: value for name, value in targets.items() if not np.isnan(value)},
                smiles=smiles[i],
                charge=int(block["charge"][i]),
                source=source,
                methods=methods,
                **optional,
            )
        )
    return result


def _provenance(block):
    """(source, methods) of each entry of the table that the block's provenance indexes."""
    try:
        entries = json.loads(block[""]["mspt"])["provenance"]
        table = [(entry["source"], entry["methods"]) for entry in entries]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DamagedBlock(f"its metadata has no table of sources and methods ({error!r})") from error
    if not 0 <= block["provenance"].min() <= block["provenance"].max() < len(table):
        raise DamagedBlock(f"provenance: an index is outside 0 to {len(table) - 1}")
    return table


def _spectrum(block, name, i):
    kind = block.get(f"spectra/{name}/kind")
    if kind is None or kind[i] == MISSING:
        return None
    if kind[i] == VALUES:
        return block[f"spectra/{name}/values"][(kind[:i] == VALUES).sum()]
    own = slice(*block[f"spectra/{name}/ptr"][i : i + 2])
    return Lines(block[f"spectra/{name}/positions"][own], block[f"spectra/{name}/strengths"][own])
