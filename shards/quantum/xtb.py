"""GFN2-xTB through tblite: energies, gradients, dipoles, relaxation.

Everything inside is in atomic units (bohr, Hartree).
"""

import numpy as np
from rdkit import Chem, RDLogger
from rdkit.Chem import rdDetermineBonds, rdForceFieldHelpers
from tblite.interface import Calculator
from tblite.library import ffi

from mspt.chemistry.elements import SYMBOLS
from mspt.chemistry.units import BOHR_ANGSTROM, HARTREE_KCAL_MOL

RDLogger.DisableLog("rdApp.*")

METHOD = "GFN2-xTB"


class XTB:
    """GFN2-xTB singlepoints of one neutral molecule.

    numbers: [n] atomic numbers. accuracy: tblite's SCF accuracy (smaller is tighter).
    """

    def __init__(self, numbers, accuracy=0.02):
        self.numbers = np.asarray(numbers)
        self.accuracy = accuracy
        self._field_free = self._density = None

    def __call__(self, positions, field=None):
        """positions [n, 3] bohr, field [3] a.u. -> energy, gradient [n, 3], dipole [3] (e a0).

        The SCF starts from the density of the last field-free point, which halves its iterations.
        """
        positions = np.ascontiguousarray(positions, dtype=float)
        if field is not None:
            calculator = self._new(positions)
            # tblite 0.8 hands the field to cffi as it is, so it must be a C array.
            calculator.add("electric-field", ffi.new("double[3]", [float(f) for f in field]))
            result = calculator.singlepoint(self._density, copy=self._density is not None)
        else:
            if self._field_free is None:
                self._field_free = self._new(positions)
            self._field_free.update(positions)
            result = self._density = self._field_free.singlepoint(self._density)
        return float(result.get("energy")), np.array(result.get("gradient")), np.array(result.get("dipole"))

    def _new(self, positions):
        calculator = Calculator(METHOD, self.numbers, positions)
        calculator.set("verbosity", 0)
        calculator.set("accuracy", self.accuracy)
        return calculator


def model_hessian(numbers, positions, step=0.005):
    """MMFF94 (else UFF) Hessian [3n, 3n] in Eh/a0^2 at positions [n, 3] Å; None where neither knows the molecule.

    A molecular-mechanics Hessian halves the number of relaxation steps of a unit matrix.
    """
    lines = (f"{SYMBOLS[int(z)]} {x:.8f} {y:.8f} {w:.8f}" for z, (x, y, w) in zip(numbers, positions, strict=True))
    molecule = Chem.MolFromXYZBlock(f"{len(numbers)}\n\n" + "\n".join(lines) + "\n")
    try:
        rdDetermineBonds.DetermineBonds(molecule, charge=0)
        Chem.SanitizeMol(molecule)
    except ValueError:  # RDKit finds no Lewis structure; the caller starts from a unit Hessian
        return None
    properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(molecule)
    if properties is not None:
        force_field = rdForceFieldHelpers.MMFFGetMoleculeForceField(molecule, properties)
    elif rdForceFieldHelpers.UFFHasAllMoleculeParams(molecule):
        force_field = rdForceFieldHelpers.UFFGetMoleculeForceField(molecule)
    else:
        return None
    x = np.array(positions, dtype=float).ravel()
    hessian = np.zeros((x.size, x.size))
    for i in range(x.size):
        plus, minus = x.copy(), x.copy()
        plus[i] += step
        minus[i] -= step
        hessian[i] = np.subtract(force_field.CalcGrad(plus.tolist()), force_field.CalcGrad(minus.tolist()))
    hessian /= 2 * step * HARTREE_KCAL_MOL / BOHR_ANGSTROM**2
    return 0.5 * (hessian + hessian.T)


def relax(calculator, positions, hessian=None, max_gradient=1e-4, max_steps=150):
    """BFGS in a trust region from positions [n, 3] bohr -> relaxed positions, largest gradient component (Eh/a0)."""
    shape, n = positions.shape, positions.size
    hessian = 0.5 * np.eye(n) if hessian is None else hessian
    values, vectors = np.linalg.eigh(hessian)
    hessian = (vectors * np.clip(np.abs(values), 0.02, None)) @ vectors.T
    trust = 0.25  # a0, largest displacement of one coordinate
    energy, gradient, _ = calculator(positions)
    gradient = gradient.ravel()
    for _ in range(max_steps):
        if np.abs(gradient).max() < max_gradient:
            break
        values, vectors = np.linalg.eigh(hessian)
        step = -(vectors / np.clip(np.abs(values), 0.01, None)) @ (vectors.T @ gradient)
        step *= min(1.0, trust / np.abs(step).max())
        new_energy, new_gradient, _ = calculator(positions + step.reshape(shape))
        new_gradient = new_gradient.ravel()
        change, curved = new_gradient - gradient, hessian @ step
        if step @ change > 1e-10:
            hessian = hessian + np.outer(change, change) / (step @ change) - np.outer(curved, curved) / (step @ curved)
        if new_energy > energy + 1e-6:  # rejected: the curvature is kept, the point is not
            trust = max(0.02, 0.4 * trust)
        else:
            trust = min(0.3, 1.2 * trust)
            positions, energy, gradient = positions + step.reshape(shape), new_energy, new_gradient
    return positions, float(np.abs(gradient).max())
