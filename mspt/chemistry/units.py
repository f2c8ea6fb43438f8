"""Physical constants (CODATA 2018) and the conversions that the project uses."""

BOHR_ANGSTROM = 0.529177210903
HARTREE_EV = 27.211386245988
HARTREE_WAVENUMBER = 219474.6313632  # cm^-1
HARTREE_KCAL_MOL = 627.5094740631
DEBYE_PER_E_BOHR = 2.541746473
AMU_ELECTRON_MASS = 1822.888486209
# IR intensity in km/mol for a squared dipole derivative of 1 (D/Å)^2/amu.
KM_PER_MOL = 42.2561
KELVIN_HARTREE = 3.166811563e-6  # Boltzmann's constant times 1 K
FEMTOSECOND = 41.341373335  # atomic units of time
