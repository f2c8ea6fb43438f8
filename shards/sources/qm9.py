"""QM9 as packed on PyPI (qm9pack): all 130 831 characterised molecules with geometries and 12 targets.

Geometries, frequencies and targets are B3LYP/6-31G(2df,p) (Ramakrishnan et al., Sci. Data 1, 140022, 2014).
"""

import csv
import importlib.util
import itertools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mspt.chemistry.elements import NUMBERS
from mspt.chemistry.units import HARTREE_EV
from mspt.data.schema import Record
from mspt.errors import UserError
from shards.source import Source

HELP = "QM9 of the package qm9pack, without spectra"

# Target -> (column of qm9pack, factor to the unit in TARGET_UNITS). Energies are eV, as in torch-geometric.
TARGETS = {
    "mu": ("Dipole_debye", 1.0),
    "alpha": ("Polarizability_bohr3", 1.0),
    "homo": ("HOMO_au", HARTREE_EV),
    "lumo": ("LUMO_au", HARTREE_EV),
    "gap": ("HOMO_LUMO_gap_au", HARTREE_EV),
    "r2": ("R2_bohr2", 1.0),
    "zpve": ("ZPVE_au", HARTREE_EV),
    "u0": ("InternalEnergy_0K_au", HARTREE_EV),
    "u298": ("InternalEnergy_298K_au", HARTREE_EV),
    "h298": ("Enthalphy_298K_au", HARTREE_EV),
    "g298": ("GibbsFreeEnergy_298K_au", HARTREE_EV),
    "cv": ("Heatcapacity_Cv_cal_mol_K", 1.0),
}
TARGET_UNITS = {"mu": "D", "alpha": "a0^3", "r2": "a0^2", "cv": "cal/mol/K"} | dict.fromkeys(
    ("homo", "lumo", "gap", "zpve", "u0", "u298", "h298", "g298"), "eV"
)


@dataclass(frozen=True)
class Molecule:
    """key; numbers [n]; positions [n, 3] Å; smiles; named targets; harmonic frequencies [m] cm^-1 or None.

    QM9 lists the frequencies of some near-linear molecules twice, end to end; they are left as they are.
    """

    key: str
    numbers: np.ndarray
    positions: np.ndarray
    smiles: str
    targets: dict[str, float]
    frequencies: np.ndarray | None = None


def files():
    """The three CSVs of qm9pack, in the order of its index. Raises UserError where it is not installed."""
    # The package itself cannot be imported (it needs pkg_resources, which setuptools 82 dropped); its files can.
    spec = importlib.util.find_spec("qm9pack")
    if spec is None:
        raise UserError("qm9pack is not installed: pip install 'mspt[chem]'")
    return [Path(spec.submodule_search_locations[0]) / "data" / f"qm9_part{part}.csv" for part in (1, 2, 3)]


def molecules():
    """Yield every Molecule of qm9pack in the order of its index."""
    csv.field_size_limit(sys.maxsize)
    for path in files():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                yield _molecule(row)


def choose(molecules, count, seed):
    """count of a list of molecules, spread evenly at random; any prefix of the result is such a choice too."""
    order = np.random.default_rng(seed).permutation(len(molecules))
    return [molecules[i] for i in order[:count]]


class QM9(Source):
    """Rows of qm9pack's CSVs, each one line. A chunk is a list of (number of the file, byte where the row begins)."""

    def __init__(self, count, seed):
        self.inputs = files()
        self.provenance = {
            "source": "QM9 (B3LYP/6-31G(2df,p) geometries and targets, qm9pack)",
            "units": TARGET_UNITS,
        }
        self.places = [(part, place) for part, path in enumerate(self.inputs) for place in _line_starts(path)[1:]]
        if count is not None:
            self.places = sorted(choose(self.places, count, seed))
        self.total = len(self.places)

    def chunks(self, size):
        for first in range(0, self.total, size):
            yield self.places[first : first + size]

    def read(self, chunk):
        csv.field_size_limit(sys.maxsize)
        for part, places in itertools.groupby(chunk, key=lambda place: place[0]):
            with self.inputs[part].open("rb") as file:
                header = file.readline().decode()
                for _, place in places:
                    file.seek(place)
                    (row,) = csv.DictReader([header, file.readline().decode()])
                    yield _record(_molecule(row), self.provenance["source"])


def add_arguments(parser):
    parser.add_argument("--count", type=int, help="how many, spread over the whole set (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="which ones")


def open(options):
    return QM9(options.count, options.seed)


def _line_starts(path):
    """Where each line of a file begins, in bytes."""
    with path.open("rb") as file:
        return list(itertools.accumulate(map(len, file), initial=0))[:-1]


def _record(molecule, source):
    return Record(
        key=molecule.key,
        numbers=molecule.numbers,
        positions=molecule.positions.astype(np.float32),
        targets=molecule.targets,
        smiles=molecule.smiles,
        source=source,
    )


def _molecule(row):
    return Molecule(
        key=f"qm9-{int(row['Index']):06d}",
        numbers=np.array([NUMBERS[symbol] for symbol in _list(row["Elements"])], dtype=np.uint8),
        positions=np.array(_list(row["XYZ_Ang"]), dtype=np.float64),
        smiles=row["SMILES"],
        targets={name: float(row[column]) * factor for name, (column, factor) in TARGETS.items()},
        frequencies=np.array(_list(row["Harmonic_Freq_cmi"]), dtype=np.float64),
    )


def _list(text):
    """A Python-like list of the CSV as JSON: quotes doubled, `0.` and `3.E-6` completed to `0.0` and `3.0E-6`."""
    return json.loads(re.sub(r"\.(?!\d)", ".0", text.replace("'", '"')))
