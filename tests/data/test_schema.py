"""What is refused, with the field it is refused for, and what is not."""

import numpy as np
import pytest

from mspt.chemistry.spectra import GRIDS
from mspt.data.schema import COINCIDENT, Lines, RejectedRecord, validate
from tests.data.molecules import record, spectrum


def lines(positions, strengths):
    return Lines(np.array(positions, np.float32), np.array(strengths, np.float32))


def with_value(value):
    values = np.ones(GRIDS["ir"].length, np.float32)
    values[7] = value
    return values


def moved(x):
    """Three atoms, of which the last lies at distance x from the first."""
    return np.array([[0, 0, 0], [0, 1.5, 0], [x, 0, 0]], np.float32)


REFUSED = [
    ("key", {"key": ""}),
    ("numbers", {"numbers": np.zeros(0, np.uint8), "positions": np.zeros((0, 3), np.float32)}),
    ("numbers", {"numbers": np.array([1, 0, 6], np.uint8)}),
    ("numbers", {"numbers": np.array([1, 119, 6], np.uint8)}),
    ("numbers", {"numbers": np.array([1, 300, 6])}),
    ("numbers", {"numbers": np.ones((3, 1), np.uint8)}),
    ("positions", {"positions": np.zeros((2, 3), np.float32)}),
    ("positions", {"positions": np.full((3, 3), np.nan, np.float32)}),
    ("positions", {"positions": np.full((3, 3), np.inf, np.float32)}),
    ("positions", {"positions": moved(0.9 * COINCIDENT)}),
    ("charge", {"charge": 200}),
    ("forces", {"forces": np.zeros((2, 3), np.float32)}),
    ("forces", {"forces": np.full((3, 3), np.nan, np.float32)}),
    ("bonds", {"bonds": np.array([[0, 3]], np.int16), "bond_types": np.ones(1, np.uint8)}),
    ("bonds", {"bonds": np.array([[-1, 1]], np.int16), "bond_types": np.ones(1, np.uint8)}),
    ("bonds", {"bonds": np.array([0, 1], np.int16), "bond_types": np.ones(2, np.uint8)}),
    ("bond_types", {"bonds": np.array([[0, 1]], np.int16)}),
    ("bond_types", {"bonds": np.array([[0, 1]], np.int16), "bond_types": np.ones(2, np.uint8)}),
    ("targets.gap", {"targets": {"gap": float("nan")}}),
    ("spectra.nmr", {"spectra": {"nmr": np.ones(5, np.float32)}}),
    ("spectra.ir", {"spectra": {"ir": np.ones(3500, np.float32)}}),
    ("spectra.ir", {"spectra": {"ir": with_value(np.nan)}}),
    ("spectra.ir", {"spectra": {"ir": with_value(-0.5)}}),
    ("spectra.ir", {"spectra": {"ir": lines([1000.0, 1200.0], [1.0])}}),
    ("spectra.ir", {"spectra": {"ir": lines([np.nan], [1.0])}}),
    ("spectra.ir", {"spectra": {"ir": lines([1000.0], [np.inf])}}),
    ("spectra.ir", {"spectra": {"ir": lines([1000.0], [-1.0])}}),
]


@pytest.mark.parametrize(("field", "changes"), REFUSED, ids=[f"{i}-{field}" for i, (field, _) in enumerate(REFUSED)])
def test_refused_for_its_field(field, changes):
    with pytest.raises(RejectedRecord) as refusal:
        validate(record(**({"key": "mol-7"} | changes)))
    assert refusal.value.field == field
    assert refusal.value.key == changes.get("key", "mol-7")
    assert refusal.value.reason and "\n" not in str(refusal.value)


def test_accepted():
    validate(record(atoms=1))
    validate(record(positions=moved(1.1 * COINCIDENT)))
    validate(record(numbers=np.array([1, 118, 6], np.uint8), charge=-128))
    validate(record(bonds=np.zeros((0, 2), np.int16), bond_types=np.zeros(0, np.uint8)))
    for kind in ("values16", "values32", "lines", "no_lines"):
        validate(record(spectra={name: spectrum(name, kind) for name in GRIDS}))


def test_coincident_atoms_are_found_wherever_they_are():
    """Among many atoms at the same x, where sorting along x does not separate anything."""
    positions = np.zeros((60, 3), np.float32)
    positions[:, 1] = np.arange(60)
    validate(record(atoms=60, positions=positions))
    positions[41] = positions[3] + [0, 0, 0.1]
    with pytest.raises(RejectedRecord, match="atoms 3 and 41 coincide"):
        validate(record(atoms=60, positions=positions))
