"""QM9 as packed on PyPI (qm9pack): all 130 831 characterised molecules with geometries and 12 targets.

Geometries, frequencies and targets are B3LYP/6-31G(2df,p) (Ramakrishnan et al., Sci. Data 1, 140022, 2014).
"""

import csv
import importlib.util
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mspt.chemistry.elements import NUMBERS
from mspt.chemistry.units import HARTREE_EV
from mspt.data.schema import Record

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


def molecules():
    """Yield every Molecule of qm9pack in the order of its index.

    Raises ModuleNotFoundError where qm9pack is not installed.
    """
    # The package itself cannot be imported (it needs pkg_resources, which setuptools 82 dropped); its files can.
    spec = importlib.util.find_spec("qm9pack")
    if spec is None:
        raise ModuleNotFoundError("qm9pack is not installed: pip install 'mspt[chem]'")
    csv.field_size_limit(sys.maxsize)
    for part in (1, 2, 3):
        path = Path(spec.submodule_search_locations[0]) / "data" / f"qm9_part{part}.csv"
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                yield _molecule(row)


def choose(molecules, count, seed):
    """count of a list of molecules, spread evenly at random; any prefix of the result is such a choice too."""
    order = np.random.default_rng(seed).permutation(len(molecules))
    return [molecules[i] for i in order[:count]]


def records(count=None, seed=0):
    """Records of count molecules (None: all), no rejects, and what a manifest says of them."""
    chosen = list(molecules())
    chosen = chosen if count is None else sorted(choose(chosen, count, seed), key=lambda molecule: molecule.key)
    source = "QM9 (B3LYP/6-31G(2df,p) geometries and targets, qm9pack)"
    made = (
        Record(
            key=molecule.key,
            numbers=molecule.numbers,
            positions=molecule.positions.astype(np.float32),
            targets=molecule.targets,
            smiles=molecule.smiles,
            source=source,
        )
        for molecule in chosen
    )
    return made, [], {"source": source, "units": TARGET_UNITS}


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
