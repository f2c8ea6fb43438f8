"""The table of elements and the constants."""

import numpy as np
import pytest

from mspt.chemistry import units
from mspt.chemistry.elements import COVALENT_RADII, MAX_NUMBER, NUMBERS, SYMBOLS


def test_118_elements_both_ways():
    assert MAX_NUMBER == len(NUMBERS) == 118
    assert SYMBOLS[0] == ""
    assert all(SYMBOLS[number] == symbol for symbol, number in NUMBERS.items())
    assert len(set(SYMBOLS)) == 119


@pytest.mark.parametrize(
    ("symbol", "number"),
    [
        ("H", 1),
        ("C", 6),
        ("N", 7),
        ("O", 8),
        ("F", 9),
        ("S", 16),
        ("Fe", 26),
        ("Br", 35),
        ("I", 53),
        ("Au", 79),
        ("Og", 118),
    ],
)
def test_numbers(symbol, number):
    assert NUMBERS[symbol] == number


def test_table_is_that_of_rdkit():
    table = pytest.importorskip("rdkit.Chem").GetPeriodicTable()
    assert [table.GetElementSymbol(number) for number in range(1, 119)] == list(SYMBOLS[1:])


def test_covalent_radii_are_those_of_others():
    data = pytest.importorskip("ase.data")
    table = pytest.importorskip("rdkit.Chem").GetPeriodicTable()
    assert len(COVALENT_RADII) == MAX_NUMBER + 1
    # ASE has those of Cordero et al.; RDKit has Pyykkö's from Nh on and no measured ones from Bk to Cn.
    np.testing.assert_allclose(COVALENT_RADII[1:97], data.covalent_radii[1:97], atol=1e-9)
    assert list(COVALENT_RADII[113:]) == [table.GetRcovalent(number) for number in range(113, 119)]
    assert all(1.2 < radius < 1.8 for radius in COVALENT_RADII[97:])


def test_constants_agree_with_those_they_follow_from():
    """CODATA 2018 in SI units: every constant of the project from h, c, e, a0, m_e, u, N_A and ε0."""
    h, c, e, n_a = 6.62607015e-34, 299792458.0, 1.602176634e-19, 6.02214076e23
    hartree, bohr = 4.3597447222071e-18, 5.29177210903e-11
    electron_mass, amu, epsilon_0 = 9.1093837015e-31, 1.66053906660e-27, 8.8541878128e-12
    debye = 1e-21 / c
    for constant, value in (
        (units.BOHR_ANGSTROM, bohr * 1e10),
        (units.HARTREE_EV, hartree / e),
        (units.HARTREE_WAVENUMBER, hartree / (h * c) / 100),
        (units.HARTREE_KCAL_MOL, hartree * n_a / 4184),
        (units.DEBYE_PER_E_BOHR, e * bohr / debye),
        (units.AMU_ELECTRON_MASS, amu / electron_mass),
    ):
        assert constant == pytest.approx(value, rel=1e-8)
    # Integrated absorption N_A / (12 ε0 c^2) |dμ/dQ|^2, in km/mol for 1 D^2/(Å^2 amu).
    per_mode = n_a / (12 * epsilon_0 * c**2) * (debye / 1e-10) ** 2 / amu / 1000
    assert units.KM_PER_MOL == pytest.approx(per_mode, rel=1e-4)
