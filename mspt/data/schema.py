"""What one molecule's record holds: names, types, shapes, units; and what is refused."""

from dataclasses import dataclass, field

import numpy as np

from mspt.chemistry.elements import MAX_NUMBER
from mspt.chemistry.spectra import GRIDS

SCHEMA_VERSION = 3
# Two nuclei closer than this (Å) are one atom written twice; H2, the shortest bond, has 0.74.
COINCIDENT = 0.3


@dataclass(frozen=True)
class Lines:
    """A spectrum as lines: positions [l] in the grid's unit, strengths [l]."""

    positions: np.ndarray
    strengths: np.ndarray


@dataclass(frozen=True)
class Record:
    """One conformer.

    key: unique in its set. numbers: uint8 [n]. positions: float32 [n, 3] Å. spectra: name -> values on the grid of
    chemistry.spectra (float16 or float32) or Lines; any may be missing. targets: named numbers. forces: float32
    [n, 3]. bonds: int16 [b, 2] with bond_types uint8 [b]. source: where the molecule comes from; methods: how each
    spectrum was obtained, by its name.
    """

    key: str
    numbers: np.ndarray
    positions: np.ndarray
    spectra: dict = field(default_factory=dict)
    targets: dict = field(default_factory=dict)
    smiles: str = ""
    charge: int = 0
    forces: np.ndarray | None = None
    bonds: np.ndarray | None = None
    bond_types: np.ndarray | None = None
    source: str = ""
    methods: dict = field(default_factory=dict)


class RejectedRecord(Exception):
    """A record that must not get into a shard: key, field and reason."""

    def __init__(self, key, field, reason):
        super().__init__(f"{key}: {field}: {reason}")
        self.key, self.field, self.reason = key, field, reason


def validate(record):
    """Raise RejectedRecord where a record is not what the schema says."""

    def refuse(field, reason):
        raise RejectedRecord(record.key, field, reason)

    n = len(record.numbers)
    if not record.key:
        refuse("key", "is empty")
    if n == 0:
        refuse("numbers", "the molecule has no atoms")
    if record.numbers.shape != (n,):
        refuse("numbers", f"shape {record.numbers.shape} where ({n},) is needed")
    if record.numbers.min() < 1 or record.numbers.max() > MAX_NUMBER:
        wrong = next(int(z) for z in record.numbers if not 1 <= z <= MAX_NUMBER)
        refuse("numbers", f"{wrong} is not an atomic number (1 to {MAX_NUMBER})")
    if record.positions.shape != (n, 3):
        refuse("positions", f"shape {record.positions.shape} where ({n}, 3) is needed")
    if not np.isfinite(record.positions).all():
        refuse("positions", "not finite")
    if not -128 <= record.charge <= 127:
        refuse("charge", f"{record.charge} is outside -128 to 127")
    if n > 1:
        _refuse_coincident(record, refuse)
    if record.forces is not None and record.forces.shape != (n, 3):
        refuse("forces", f"shape {record.forces.shape} where ({n}, 3) is needed")
    if record.forces is not None and not np.isfinite(record.forces).all():
        refuse("forces", "not finite")
    if record.bonds is not None:
        if record.bonds.ndim != 2 or record.bonds.shape[1] != 2:
            refuse("bonds", f"shape {record.bonds.shape} where (b, 2) is needed")
        if record.bond_types is None or record.bond_types.shape != (len(record.bonds),):
            refuse("bond_types", "not one for each bond")
        if len(record.bonds) and not 0 <= record.bonds.min() <= record.bonds.max() < n:
            refuse("bonds", f"an atom index is outside 0 to {n - 1}")
        if n > np.iinfo(np.int16).max:
            refuse("bonds", f"{n} atoms are more than bonds can number; leave the bonds out")
    for name, value in record.targets.items():
        if not np.isfinite(value):
            refuse(f"targets.{name}", f"{value} is not finite")
    for name, spectrum in record.spectra.items():
        _validate_spectrum(name, spectrum, refuse)


def _refuse_coincident(record, refuse):
    x = record.positions.astype(np.float64)
    order = np.argsort(x[:, 0])
    x = x[order]
    # Along x, atoms further apart in the order are further apart in space: few steps for any number of atoms.
    for step in range(1, len(x)):
        apart = x[step:] - x[:-step]
        if not (apart[:, 0] <= COINCIDENT).any():
            return
        close = np.flatnonzero(np.square(apart).sum(1) < COINCIDENT**2)
        if len(close):
            a, b = sorted(order[[close[0], close[0] + step]].tolist())
            refuse("positions", f"atoms {a} and {b} coincide (closer than {COINCIDENT} Å)")


def _validate_spectrum(name, spectrum, refuse):
    if name not in GRIDS:
        refuse(f"spectra.{name}", f"unknown; known: {', '.join(GRIDS)}")
    field = f"spectra.{name}"
    if isinstance(spectrum, Lines):
        if spectrum.positions.shape != spectrum.strengths.shape or spectrum.positions.ndim != 1:
            refuse(field, f"{spectrum.positions.shape} positions for {spectrum.strengths.shape} strengths")
        values = spectrum.strengths
        if not np.isfinite(spectrum.positions).all():
            refuse(field, "a line's position is not finite")
    else:
        values = spectrum
        if values.shape != (GRIDS[name].length,):
            refuse(field, f"{values.shape} values where the grid has {GRIDS[name].length}")
    if not np.isfinite(values).all():
        refuse(field, "not finite")
    if len(values) and values.min() < 0:
        refuse(field, f"negative intensity {values.min():.3g}")
