"""What a manifest says of the records of a set, counted block by block."""

from dataclasses import asdict, dataclass, field
from math import inf, sqrt

import numpy as np

from mspt.chemistry.elements import SYMBOLS
from mspt.chemistry.spectra import GRIDS


@dataclass
class Spectrum:
    """records: that have it; lines: of all of them; total: the sum over all lines and values.

    Of values on the grid alone: points (how many there are), minimum, maximum, mean, squares (the sum of squared
    distances from the mean).
    """

    records: int = 0
    lines: int = 0
    total: float = 0.0
    points: int = 0
    minimum: float = inf
    maximum: float = -inf
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, block, name):
        """One spectrum of a decoded block that has it."""
        own, prefix = cls(records=int(np.count_nonzero(block[f"spectra/{name}/kind"]))), f"spectra/{name}"
        if f"{prefix}/strengths" in block:
            own.lines = len(block[f"{prefix}/strengths"])
            own.total = float(block[f"{prefix}/strengths"].sum(dtype=np.float64))
        if f"{prefix}/values" in block:
            values = block[f"{prefix}/values"].astype(np.float64)
            own.total += float(values.sum())
            own.points, own.mean = values.size, float(values.mean())
            own.minimum, own.maximum = float(values.min()), float(values.max())
            own.squares = float(np.square(values - own.mean).sum())
        return own

    def add(self, other):
        self.records += other.records
        self.lines += other.lines
        self.total += other.total
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        if other.points:
            points, step = self.points + other.points, other.mean - self.mean
            self.squares += other.squares + step**2 * self.points * other.points / points
            self.mean += step * other.points / points
            self.points = points

    def manifest(self):
        said = {
            "records": self.records,
            "lines_per_record": round(self.lines / self.records, 1),
            "mean_total": self.total / self.records,
        }
        if self.points:
            values = {"minimum": self.minimum, "maximum": self.maximum, "mean": self.mean}
            said["values"] = values | {"std": sqrt(self.squares / self.points)}
        return said


@dataclass
class Statistics:
    """Added up in the order of blocks and shards, so that the same records give the same digits."""

    records: int = 0
    atoms: int = 0
    largest: int = 0
    elements: dict = field(default_factory=dict)
    targets: list = field(default_factory=list)
    spectra: dict = field(default_factory=dict)

    @classmethod
    def of(cls, block):
        """Of one decoded block."""
        sizes, counts = np.diff(block["ptr"]), np.bincount(block["numbers"])
        return cls(
            records=len(sizes),
            atoms=int(sizes.sum()),
            largest=int(sizes.max()),
            elements={SYMBOLS[z]: int(counts[z]) for z in np.flatnonzero(counts)},
            targets=sorted(name.removeprefix("targets/") for name in block if name.startswith("targets/")),
            spectra={name: Spectrum.of(block, name) for name in GRIDS if f"spectra/{name}/kind" in block},
        )

    def add(self, other):
        self.records += other.records
        self.atoms += other.atoms
        self.largest = max(self.largest, other.largest)
        for symbol, count in other.elements.items():
            self.elements[symbol] = self.elements.get(symbol, 0) + count
        self.targets = sorted({*self.targets, *other.targets})
        for name, spectrum in other.spectra.items():
            self.spectra.setdefault(name, Spectrum()).add(spectrum)

    def manifest(self):
        return {
            "records": self.records,
            "atoms": self.atoms,
            "largest": self.largest,
            "elements": dict(sorted(self.elements.items())),
            "targets": self.targets,
            "spectra": {name: self.spectra[name].manifest() for name in GRIDS if name in self.spectra},
        }

    def dump(self):
        """As values of JSON."""
        return asdict(self)

    @classmethod
    def load(cls, values):
        spectra = {name: Spectrum(**spectrum) for name, spectrum in values["spectra"].items()}
        return cls(**values | {"spectra": spectra})
