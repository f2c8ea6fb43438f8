"""Molecules of a micro-batch, end to end.

Legend: m molecules, n atoms, b bonds, L points of a spectrum's grid, t lines.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mspt.chemistry.spectra import GRIDS, SPECTRA, broaden
from mspt.data import block as blocks
from mspt.data.sums import row_sums


class Lines(NamedTuple):
    """Lines of all molecules: positions [t], strengths [t]; molecule i owns lines ptr[i] to ptr[i + 1]."""

    positions: Tensor
    strengths: Tensor
    ptr: Tensor


class Bonds(NamedTuple):
    """Bonds of all molecules, each once: pairs int64 [b, 2] of atoms of the batch, types int64 [b] (1 single, 2 double,
    3 triple, 4 aromatic, 0 other), in the order of the molecules. known bool [m]: whether a molecule's are listed.
    """

    pairs: Tensor
    types: Tensor
    known: Tensor


class Keys(Sequence):
    """m strings as they lie in blocks, UTF-8 end to end with ptr [m + 1]: few of them are ever looked at."""

    def __init__(self, data, ptr):
        self.data, self.ptr = data, ptr

    def __len__(self):
        return len(self.ptr) - 1

    def __getitem__(self, index):
        index = range(len(self))[index]
        return self.data[self.ptr[index] : self.ptr[index + 1]].tobytes().decode()


@dataclass(frozen=True)
class MoleculeBatch:
    """keys: m strings. records: int64 [m], what random numbers are keyed by. numbers: int64 [n]. positions: [n, 3] Å.
    ptr: int64 [m + 1]. spectra: name -> [m, L], zeros where absent; float16 where that is how they are stored, until
    they are broadened. present: name -> bool [m]. lines: name -> Lines not broadened yet. targets: name -> float64 [m],
    NaN where missing. forces: [n, 3] eV/Å, NaN where missing, or None. bonds: None where no block has any. missing: how
    many more records the batch should hold, whose blocks are damaged.
    """

    keys: Keys
    records: Tensor
    numbers: Tensor
    positions: Tensor
    ptr: Tensor
    spectra: dict = field(default_factory=dict)
    present: dict = field(default_factory=dict)
    lines: dict = field(default_factory=dict)
    targets: dict = field(default_factory=dict)
    forces: Tensor | None = None
    bonds: Bonds | None = None
    missing: int = 0

    @property
    def molecule(self):
        """The molecule of each atom, int64 [n]."""
        return torch.repeat_interleave(torch.arange(len(self.keys), device=self.ptr.device), self.ptr.diff())

    def sum(self, values):
        """values [n, …] of atoms added up over each molecule's, [m, …], in at least float32."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return values.new_zeros(len(self.keys), *values.shape[1:]).index_add(0, self.molecule, values)

    def to(self, target):
        """The same on a device, or with its floating-point values of another type."""

        def moved(value):
            if isinstance(value, Tensor):
                skip = isinstance(target, torch.dtype) and not value.is_floating_point()
                return value if skip else value.to(target)
            if isinstance(value, dict):
                return {name: moved(part) for name, part in value.items()}
            return type(value)(*map(moved, value)) if isinstance(value, (Lines, Bonds)) else value

        return replace(self, **{f.name: moved(getattr(self, f.name)) for f in fields(self)})

    def broadened(self, line_shapes, names=SPECTRA):
        """The same with every spectrum as values: lines become bands of line_shapes (name -> LineShape).

        A spectrum that is not among names counts as missing.
        """
        spectra, present = {}, dict(self.present)
        for name, grid in GRIDS.items():
            if name not in names:
                spectra[name] = self.positions.new_zeros(len(self.keys), grid.length)
                present[name] = torch.zeros_like(present[name])
                continue
            values = self.spectra.get(name)
            if values is None:
                values = self.positions.new_zeros(len(self.keys), grid.length)
            values = values.to(self.positions.dtype)
            if name in self.lines:
                values = values + broaden(*self.lines[name], grid, line_shapes[name]).to(values.dtype)
            spectra[name] = values
        return replace(self, spectra=spectra, present=present, lines={})

    @classmethod
    def empty(cls):
        """No molecules."""
        return cls(
            keys=Keys(np.zeros(0, np.uint8), np.zeros(1, np.int64)),
            records=torch.zeros(0, dtype=torch.int64),
            numbers=torch.zeros(0, dtype=torch.int64),
            positions=torch.zeros(0, 3),
            ptr=torch.zeros(1, dtype=torch.int64),
            present={name: torch.zeros(0, dtype=torch.bool) for name in GRIDS},
        )

    @classmethod
    def from_blocks(cls, pieces, order=None):
        """Rows of decoded blocks: pieces of (block, rows [k]); order [m] rearranges their concatenation.

        All targets that the blocks have come with them, and forces and bonds where a block has any.
        """
        if not pieces:
            return cls.empty()
        joined = _Pieces(pieces, order)
        texts, lengths = joined.ragged("keys", "keys_ptr")
        numbers, counts = joined.ragged("numbers", "ptr")
        positions, _ = joined.ragged("positions", "ptr")
        spectra, present, lines = {}, {}, {}
        for name, grid in GRIDS.items():
            kind = joined.rows(f"spectra/{name}/kind", blocks.MISSING, np.uint8)
            present[name] = torch.from_numpy(kind != blocks.MISSING)
            if (kind == blocks.VALUES).any():
                spectra[name] = torch.from_numpy(joined.values(name, grid.length))
            if (kind == blocks.LINES).any():
                where, per_molecule = joined.ragged(f"spectra/{name}/positions", f"spectra/{name}/ptr")
                strengths, _ = joined.ragged(f"spectra/{name}/strengths", f"spectra/{name}/ptr")
                ptr = torch.from_numpy(blocks.ptr_of(per_molecule))
                lines[name] = Lines(torch.from_numpy(where), torch.from_numpy(strengths), ptr)
        names = {name for block, _ in pieces for name in block if name.startswith("targets/")}
        return cls(
            keys=Keys(texts, blocks.ptr_of(lengths)),
            records=torch.from_numpy(joined.rows("words", 0, np.int64)),
            numbers=torch.from_numpy(numbers.astype(np.int64)),
            positions=torch.from_numpy(positions),
            ptr=torch.from_numpy(blocks.ptr_of(counts)),
            spectra=spectra,
            present=present,
            lines=lines,
            targets={
                name.removeprefix("targets/"): torch.from_numpy(joined.rows(name, np.nan, np.float64))
                for name in sorted(names)
            },
            forces=torch.from_numpy(joined.forces()) if any("forces" in block for block, _ in pieces) else None,
            bonds=joined.bonds(counts) if any("bonds" in block for block, _ in pieces) else None,
        )

    @classmethod
    def from_records(cls, records):
        """A list of Records."""
        if not records:
            return cls.empty()
        return cls.from_blocks([(blocks.decode(blocks.encode(records)), np.arange(len(records)))])


class _Pieces:
    """Rows of several blocks, looked at as one table in a given order."""

    def __init__(self, pieces, order):
        self.pieces = pieces
        total = sum(len(rows) for _, rows in pieces)
        self.order = np.arange(total) if order is None else np.asarray(order)

    def rows(self, name, missing, dtype):
        """One value a record, [m]; missing where a block does not have the array."""
        parts = [
            block[name][rows] if name in block else np.full(len(rows), missing, dtype) for block, rows in self.pieces
        ]
        return np.concatenate(parts)[self.order]

    def ragged(self, name, ptr):
        """Values end to end in order, and how many each record has [m]."""
        parts, counts = [], []
        for block, rows in self.pieces:
            own = blocks.take(block[name], block[ptr], rows) if name in block else None
            parts.append(own[0] if own else None)
            counts.append(own[1] if own else np.zeros(len(rows), np.int64))
        values, counts = np.concatenate([part for part in parts if part is not None]), np.concatenate(counts)
        return blocks.take(values, blocks.ptr_of(counts), self.order)

    def forces(self):
        """Forces [n, 3], NaN for the atoms of blocks that have none."""
        filled = [
            (block if "forces" in block else block | {"forces": np.full_like(block["positions"], np.nan)}, rows)
            for block, rows in self.pieces
        ]
        return _Pieces(filled, self.order).ragged("forces", "ptr")[0]

    def bonds(self, atoms):
        """The Bonds of molecules of atoms [m]. Raises DamagedBlock where one is between atoms that are not there."""
        pairs, counts = self.ragged("bonds", "bonds_ptr")
        if not blocks.within(pairs, np.repeat(atoms, counts)):
            raise blocks.DamagedBlock("bonds: an atom index is outside its molecule")
        pairs = pairs + np.repeat(np.cumsum(atoms) - atoms, counts)[:, None]
        types = self.ragged("bond_types", "bonds_ptr")[0].astype(np.int64)
        known = self.rows("bonds_known", 0, np.uint8) != 0
        return Bonds(*map(torch.from_numpy, (pairs, types, known)))

    def values(self, name, length):
        """A spectrum's values [m, L], zeros for records that have none; float16 where all have that.

        Raises DamagedRows where they are not what was written.
        """
        where, parts, wrong, at = [], [], [], 0
        for block, rows in self.pieces:
            is_values = block.get(f"spectra/{name}/kind", np.zeros(0)) == blocks.VALUES
            if is_values.any() and (own := is_values[rows]).any():
                stored = (np.cumsum(is_values) - 1)[rows[own]]
                parts.append(block[f"spectra/{name}/values"][stored])
                where.append(at + np.nonzero(own)[0])
                if f"spectra/{name}/sums" in block:  # not in those of a Zarr store, which has checksums of its own
                    sums = block[f"spectra/{name}/sums"][stored]
                    wrong += where[-1][row_sums(parts[-1]) != sums].tolist()
            at += len(rows)
        if wrong:
            raise blocks.DamagedRows(name, np.flatnonzero(np.isin(self.order, wrong)))
        values = np.zeros((at, length), np.result_type(*parts))
        values[np.concatenate(where)] = np.concatenate(parts)
        return values[self.order]
