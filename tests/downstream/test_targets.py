"""Units of reports, and references of the elements that are what they were made from."""

import numpy as np
import pytest

from mspt.downstream.targets import fit_references, of_atoms, reporting
from mspt.errors import UserError

ENERGY = {1: -16.5, 6: -1035.6, 8: -2057.9}


def molecules(count=40, seed=0):
    """numbers [n], ptr [m + 1] and the sums of ENERGY [m]."""
    rng = np.random.default_rng(seed)
    each = [rng.choice(list(ENERGY), rng.integers(1, 9)) for _ in range(count)]
    ptr = np.concatenate([[0], np.cumsum([len(numbers) for numbers in each])])
    return np.concatenate(each), ptr, np.array([sum(ENERGY[z] for z in numbers) for numbers in each])


def test_references_of_sums_of_atoms_are_exact():
    references = fit_references(*molecules())
    assert {z: references[z] for z in ENERGY} == pytest.approx(ENERGY, rel=1e-10)
    numbers, ptr, energies = molecules(seed=1)
    np.testing.assert_allclose(of_atoms(references, numbers, ptr), energies, rtol=1e-10)


def test_an_element_without_reference_is_named():
    with pytest.raises(UserError, match="F is in none of the labelled molecules"):
        of_atoms(fit_references(*molecules()), np.array([6, 9, 1]), np.array([0, 1, 3]))


def test_units_of_reports():
    """By the set's unit, whatever the name: electronvolts become their thousandths."""
    assert reporting("homo", {"homo": "eV"}) == ("meV", 1000.0, False)
    assert reporting("u0", {"u0": "eV"}).additive
    assert reporting("mu", {"mu": "D"}) == ("D", 1.0, False)
    assert reporting("alpha", {"alpha": "Å^3"}) == ("Å^3", 1.0, False)
    assert reporting("gap", {}) == ("unit not stated", 1.0, False)
    assert reporting("binding", {"binding": "eV"}) == ("meV", 1000.0, False)
    assert reporting("solubility", {"solubility": "mol/L"}) == ("mol/L", 1.0, False)
    assert reporting("solubility", {}).unit == "unit not stated"
