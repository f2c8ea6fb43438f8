"""Blocks held in memory, and batches of any of their rows.

What costs time for every molecule is done in C++ (gather.cpp, compiled at first use). Without a compiler, or with
MSPT_KERNELS=reference, MoleculeBatch.from_blocks does the same in numpy.
"""

import ctypes
import json
import logging
import math
import operator
import sys
import threading
from functools import cache
from itertools import compress
from pathlib import Path

import numpy as np
import torch

from mspt import native
from mspt.chemistry.spectra import GRIDS
from mspt.data import block as blocks
from mspt.data.batch import Bonds, Keys, Lines, MoleculeBatch
from mspt.data.sums import row_keys

log = logging.getLogger("mspt")
KEY_BYTES = 32  # room for a key; longer ones cost a second look
NAN = int(np.float64(np.nan).view(np.int64))
REQUIRED = "required"  # of a column that every block has


def _rules():
    """What find_columns checks of the arrays of a block.

    Column -> (types that it may have, values in a row, the column that has as many rows, the column that it is there
    together with).
    """
    rules = {
        "ptr": (["I64"], 1, None, REQUIRED),
        "numbers": (["U8"], 1, None, REQUIRED),
        "positions": (["F32"], 3, "numbers", REQUIRED),
        "forces": (["F32"], 3, "numbers", None),
        "keys_ptr": (["I64"], 1, "ptr", REQUIRED),
        "keys": (["U8"], 1, None, REQUIRED),
        "words": (["I64"], 1, None, REQUIRED),
        "bonds_ptr": (["I64"], 1, "ptr", None),
        "bonds": (["I16"], 2, None, "bonds_ptr"),
        "bond_types": (["U8"], 1, "bonds", "bonds_ptr"),
        "bonds_known": (["U8"], 1, "words", "bonds_ptr"),
    }
    for name, grid in GRIDS.items():
        at = f"spectra/{name}/"
        rules |= {
            f"{at}kind": (["U8"], 1, "words", None),
            f"{at}values": (["F16", "F32"], grid.length, None, None),
            f"{at}sums": (["I64"], 1, f"{at}values", f"{at}values"),
            f"{at}ptr": (["I64"], 1, "ptr", None),
            f"{at}positions": (["F32"], 1, None, f"{at}ptr"),
            f"{at}strengths": (["F32"], 1, f"{at}positions", f"{at}ptr"),
        }
    return rules


# The functions of gather.cpp, and how many pointers or numbers each takes.
FUNCTIONS = {
    "find_columns": 8,
    "conformers": 14,
    "ragged_offsets": 8,
    "ragged_values": 9,
    "words": 8,
    "bonds": 10,
    "spectrum_rows": 11,
    "spectrum_values": 11,
    "shuffle": 5,
    "cut": 7,
}


@cache
def library():
    """The compiled functions, or None where there are none; says once why. Pointers are given as whole numbers."""
    without = "batches are put together by numpy, some 10 times slower"
    loaded = native.wanted("data", Path(__file__).with_name("gather.cpp"), without)
    if loaded is None:
        return None
    for name, count in FUNCTIONS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = [ctypes.c_ssize_t] * count, ctypes.c_ssize_t
    return loaded


class Held:
    """Blocks by slot. targets: names of those that batches carry; forces: whether they carry forces."""

    def __init__(self, targets=(), forces=False):
        self.targets, self.forces = tuple(targets), forces
        rules = _rules() | {f"targets/{name}": (["F64"], 1, "words", None) for name in self.targets}
        self.at = {name: index for index, name in enumerate(rules)}
        place = self.at | {None: -1, REQUIRED: -2}
        # As the header of a block writes them, which is JSON.
        written = [json.dumps(name, ensure_ascii=False)[1:-1].encode() for name in rules]
        self.names = np.frombuffer(b"".join(written), np.uint8)
        self.rules = np.array(
            [
                (sum(1 << list(blocks.TYPES).index(k) for k in kinds), width, place[like], place[together], len(name))
                for name, (kinds, width, like, together) in zip(written, rules.values(), strict=True)
            ]
        )
        every = [self.at[name] for name in ("ptr", "numbers", "positions", "keys_ptr", "keys", "words")]
        self.places = np.array(every)
        self.every = self.places.ctypes.data
        self.bond_places = np.array([self.at[name] for name in ("bonds_ptr", "bonds", "bond_types", "bonds_known")])
        self.wanted = (self.names.ctypes.data, len(self.rules), self.rules.ctypes.data)
        self.library = library()
        self.held, self.heads, self.free = {}, {}, []
        self.table = np.zeros((0, len(rules), 3), np.int64)
        self.there = np.zeros(len(rules), bool)  # columns that any block has had

    def put(self, data, head=None):
        """Hold a block, uint8 [size] -> its slot. head: how many of its bytes lie before its values, all if not given.

        Raises DamagedBlock where it is no block.
        """
        if not self.free:
            self.free.append(len(self.table))
            self.table = np.concatenate([self.table, np.zeros((1, *self.table.shape[1:]), np.int64)])
        slot = self.free[-1]
        if self.library is None:
            self.held[slot] = blocks.decode(data)
        else:
            self.held[slot], row = data, self.table[slot]
            head = len(data) if head is None else head
            near = data if head == len(data) else self._near(slot, data[:head])
            rest = data.ctypes.data + head
            if self.library.find_columns(near.ctypes.data, head, rest, len(data), *self.wanted, row.ctypes.data) < 0:
                _complain([data])
            self.there |= row[:, 0] != 0
        return self.free.pop()

    def _near(self, slot, head):
        """A copy of a block's head [size], away from its spectra: rows of all heads in use then stay in the caches."""
        if len(self.heads.get(slot, ())) < len(head):
            self.heads[slot] = np.empty(len(head) + len(head) // 4, np.uint8)
        self.heads[slot][: len(head)] = head
        return self.heads[slot]

    def drop(self, slot):
        """A block is done with; its slot is free again."""
        del self.held[slot]
        self.free.append(slot)

    def batch(self, slots, rows, atoms):
        """The records at rows [m] of the blocks at slots [m] (int32), in this order, as a MoleculeBatch.

        atoms: how many they have together. Raises DamagedRows where a spectrum's values are not what was written, and
        DamagedBlock where a block is not consistent.
        """
        if len(slots) == 0:
            return MoleculeBatch.empty()
        if self.library is None:
            return self._by_numpy(slots, rows)
        return _Gathering(self, slots, rows).batch(atoms) or self._by_numpy(slots, rows)

    def _by_numpy(self, slots, rows):
        used, inverse = np.unique(slots, return_inverse=True)
        pieces = [(self._decoded(slot), rows[inverse == i]) for i, slot in enumerate(used)]
        back = np.empty(len(rows), np.int64)
        back[np.argsort(inverse, kind="stable")] = np.arange(len(rows))
        return MoleculeBatch.from_blocks(pieces, back)

    def _decoded(self, slot):
        """The arrays of a block that batches carry."""
        block = self.held[slot] if self.library is None else blocks.decode(self.held[slot])
        dropped = [name for name in block if name.startswith("targets/") and name[8:] not in self.targets]
        dropped += [] if self.forces else ["forces"]
        return {name: array for name, array in block.items() if name not in dropped}


def _references(buffers):
    """How often each of a list of buffers is referred to, the list and what asks here included."""
    return [sys.getrefcount(buffer) for buffer in buffers]


# Of a buffer that nothing but the list holds; how many of those who ask count is for each version of Python to say.
(UNUSED,) = _references([np.empty(0, np.uint8)])


class _Recycled(threading.local):
    """A thread's large arrays, each used again once no tensor holds it any more.

    A fresh page costs more than what is written to it: on a virtual machine up to 3 µs.
    """

    def __init__(self):
        self.buffers = []

    def empty(self, shape, dtype):
        """A tensor whose values are not set."""
        size = math.prod(shape) * dtype.itemsize
        free = [references == UNUSED for references in _references(self.buffers)]
        own = next((buffer for buffer in compress(self.buffers, free) if len(buffer) >= size), None)
        if own is None:
            own = np.empty(size, np.uint8)
            self.buffers = [*compress(self.buffers, map(operator.not_, free)), own]
        return torch.frombuffer(own, dtype=dtype, count=math.prod(shape)).view(shape)


RECYCLED = _Recycled()


def _complain(held):
    """Raise DamagedBlock with what is wrong with these blocks."""
    for data in held:
        blocks.records(data)
    raise blocks.DamagedBlock("its arrays are not of the types and lengths that a block's have")


class _Gathering:
    """One batch of rows from the compiled library."""

    def __init__(self, held, slots, rows):
        self.held, self.slots, self.m = held, slots, len(rows)
        self.library, self.at, self.there = held.library, held.at, held.there
        self.table = (held.table.ctypes.data, held.table.shape[1])
        self.which = (slots.ctypes.data, rows.ctypes.data, self.m)

    def batch(self, n):
        """The MoleculeBatch, or None where blocks differ in what they hold: numpy joins them."""
        forced = self.held.table[self.slots, self.at["forces"], 0] != 0 if self.held.forces else np.zeros(1, bool)
        if forced.any() and not forced.all():
            return None
        m, room = self.m, KEY_BYTES * self.m
        ptr, keys_ptr = torch.empty(m + 1, dtype=torch.int64), torch.empty(m + 1, dtype=torch.int64)
        numbers, positions = torch.empty(n, dtype=torch.int64), torch.empty(n, 3)
        words, keys = torch.empty(m, dtype=torch.int64), torch.empty(room, dtype=torch.uint8)
        out = (ptr.data_ptr(), numbers.data_ptr(), positions.data_ptr(), words.data_ptr(), keys_ptr.data_ptr())
        places = (*self.table, self.held.every, *self.which, n, *out, keys.data_ptr(), room)
        total = self.checked(self.library.conformers(*places))
        if total > room:
            keys = self.values("keys_ptr", "keys", torch.empty(total, dtype=torch.uint8))
        spectra, present, lines = {}, {}, {}
        nowhere = torch.zeros(m, dtype=torch.bool)
        for name, grid in GRIDS.items():
            at = f"spectra/{name}/"
            if not self.there[self.at[f"{at}kind"]]:
                present[name] = nowhere
                continue
            present[name], own, size, lined = self.spectrum_rows(at)
            if size < 0:
                return None
            if size > 0:
                spectra[name] = self.spectrum_values(name, own, size, grid.length)
            if lined:
                lines_ptr, total = self.offsets(f"{at}ptr", f"{at}positions")
                parts = [self.values(f"{at}ptr", f"{at}{part}", torch.empty(total)) for part in Lines._fields[:2]]
                lines[name] = Lines(*parts, lines_ptr)
        return MoleculeBatch(
            keys=Keys(keys.numpy(), keys_ptr.numpy()),
            records=words,
            numbers=numbers,
            positions=positions,
            ptr=ptr,
            spectra=spectra,
            present=present,
            lines=lines,
            targets={name: self.target(f"targets/{name}") for name in self.held.targets},
            forces=self.values("ptr", "forces", torch.empty(n, 3)) if forced.all() else None,
            bonds=self.bonds(ptr) if self.there[self.at["bonds_ptr"]] else None,
        )

    def checked(self, result):
        if result < 0:
            _complain([self.held.held[slot] for slot in np.unique(self.slots)])
        return result

    def offsets(self, ptr, values):
        out = torch.empty(self.m + 1, dtype=torch.int64)
        places = (self.at[ptr], self.at[values])
        total = self.library.ragged_offsets(*self.table, *places, *self.which, out.data_ptr())
        return out, self.checked(total)

    def values(self, ptr, values, out):
        size = out.element_size() * (out.shape[1] if out.dim() == 2 else 1)
        self.library.ragged_values(*self.table, self.at[ptr], self.at[values], *self.which, size, out.data_ptr())
        return out

    def target(self, name):
        out = torch.empty(self.m, dtype=torch.float64)
        self.checked(self.library.words(*self.table, self.at[name], *self.which, NAN, out.data_ptr()))
        return out

    def bonds(self, ptr):
        """The Bonds of molecules whose atoms ptr [m + 1] tells; None where none of these blocks has any."""
        if not self.held.table[self.slots, self.at["bonds_ptr"], 0].any():
            return None
        total = self.offsets("bonds_ptr", "bonds")[1]
        pairs, types = torch.empty(total, 2, dtype=torch.int64), torch.empty(total, dtype=torch.int64)
        known = torch.empty(self.m, dtype=torch.bool)
        out = (pairs.data_ptr(), types.data_ptr(), known.data_ptr())
        places = self.held.bond_places.ctypes.data
        self.checked(self.library.bonds(*self.table, places, *self.which, ptr.data_ptr(), *out))
        return Bonds(pairs, types, known)

    def spectrum_rows(self, at):
        """Which are there [m]; which row of its block's values each is [m], -1 where it is none; the bytes of a row, 0
        without one, -1 where blocks differ; how many are lines.
        """
        present, own = torch.empty(self.m, dtype=torch.bool), torch.empty(self.m, dtype=torch.int64)
        places, found = [self.at[at + part] for part in ("kind", "values", "ptr")], torch.empty(2, dtype=torch.int64)
        out = (present.data_ptr(), own.data_ptr(), found.data_ptr())
        self.checked(self.library.spectrum_rows(*self.table, *places, *self.which, *out))
        return present, own, *found.tolist()

    def spectrum_values(self, name, own, size, length):
        """Values [m, L] of rows of so many bytes, zeros where own [m], their places in the blocks, is -1."""
        places = [self.at[f"spectra/{name}/{part}"] for part in ("values", "sums")]
        out = RECYCLED.empty((self.m, length), torch.float16 if size == 2 * length else torch.float32)
        (slots, _, m), wrong = self.which, torch.empty(self.m, dtype=torch.bool)
        rows = (slots, m, own.data_ptr(), size, row_keys(size).ctypes.data)
        if self.library.spectrum_values(*self.table, *places, *rows, out.data_ptr(), wrong.data_ptr()):
            raise blocks.DamagedRows(name, np.flatnonzero(wrong.numpy()))
        return out
