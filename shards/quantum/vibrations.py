"""Harmonic IR and Raman lines.

Hessian: central differences of analytic gradients; the dipole derivatives come with them.
Raman: dα_ij/dR = −∂²(gradient)/∂F_i∂F_j from 13 gradients in finite fields, whatever the number of atoms.
"""

import numpy as np
from rdkit import Chem

from mspt.chemistry.units import (
    AMU_ELECTRON_MASS,
    BOHR_ANGSTROM,
    DEBYE_PER_E_BOHR,
    HARTREE_WAVENUMBER,
    KM_PER_MOL,
)
from shards.quantum.xtb import XTB, model_hessian, relax

DISPLACEMENT = 0.005  # a0
FIELD = 2e-3  # a.u.
# A relaxed geometry with a mode below this (cm^-1, imaginary ones negative) is a saddle point of GFN2.
SADDLE = -20.0


def masses(numbers):
    """Masses (amu) [n] of the most common isotopes."""
    table = Chem.GetPeriodicTable()
    return np.array([table.GetMostCommonIsotopeMass(int(z)) for z in numbers])


def hessian_and_dipole_derivatives(calculator, positions):
    """positions [n, 3] bohr -> Hessian [3n, 3n] (Eh/a0²), dipole derivatives [3n, 3] (e)."""
    x = positions.ravel()
    hessian, dipoles = np.zeros((x.size, x.size)), np.zeros((x.size, 3))
    for i in range(x.size):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[i] += sign * DISPLACEMENT
            ends.append(calculator(moved.reshape(positions.shape))[1:])
        (g_plus, d_plus), (g_minus, d_minus) = ends
        hessian[i] = (g_plus - g_minus).ravel() / (2 * DISPLACEMENT)
        dipoles[i] = (d_plus - d_minus) / (2 * DISPLACEMENT)
    return 0.5 * (hessian + hessian.T), dipoles


def polarisability_derivatives(calculator, positions):
    """positions [n, 3] bohr -> dα/dR [3n, 3, 3] (a0²)."""
    axes = np.eye(3) * FIELD

    def gradient(field):
        return calculator(positions, field=field)[1].ravel()

    zero = gradient(np.zeros(3))
    single = {(i, s): gradient(s * axes[i]) for i in range(3) for s in (1, -1)}
    result = np.zeros((positions.size, 3, 3))
    for i in range(3):
        result[:, i, i] = -(single[i, 1] + single[i, -1] - 2 * zero) / FIELD**2
        for j in range(i):
            both = gradient(axes[i] + axes[j]) + gradient(-axes[i] - axes[j])
            alone = sum(single[k, s] for k in (i, j) for s in (1, -1))
            result[:, i, j] = result[:, j, i] = -(both - alone + 2 * zero) / (2 * FIELD**2)
    return result


def normal_modes(hessian, positions, mass):
    """-> wavenumbers [m] (cm^-1, imaginary as negative), displacements dR/dQ [3n, m] (amu^-1/2).

    m is 3n − 6, or 3n − 5 for a linear molecule: translations and rotations are projected out.
    """
    root = np.sqrt(mass)
    centred = positions - (mass[:, None] * positions).sum(0) / mass.sum()
    rigid = [np.outer(root, axis).ravel() for axis in np.eye(3)]
    rigid += [(np.cross(axis, centred) * root[:, None]).ravel() for axis in np.eye(3)]
    basis, weights, _ = np.linalg.svd(np.array(rigid).T, full_matrices=False)
    basis = basis[:, weights > 1e-4 * weights[0]]  # a linear molecule has one rotation less
    scale = np.repeat(np.sqrt(mass * AMU_ELECTRON_MASS), 3)
    projector = np.eye(scale.size) - basis @ basis.T
    values, vectors = np.linalg.eigh(projector @ (hessian / np.outer(scale, scale)) @ projector)
    overlap = np.abs(basis.T @ vectors).max(0)
    kept = np.sort(np.argsort(overlap)[: scale.size - basis.shape[1]])
    values, vectors = values[kept], vectors[:, kept]
    wavenumbers = np.sign(values) * np.sqrt(np.abs(values)) * HARTREE_WAVENUMBER
    return wavenumbers, vectors / np.repeat(root, 3)[:, None]


def ir_intensities(dipole_derivatives, displacements):
    """IR intensities [m] in km/mol."""
    per_mode = dipole_derivatives.T @ displacements * DEBYE_PER_E_BOHR / BOHR_ANGSTROM
    return KM_PER_MOL * (per_mode**2).sum(0)


def raman_activities(polarisability_derivative, displacements):
    """Raman activities 45 a'² + 7 γ'² [m] in Å⁴/amu."""
    a = np.einsum("kij,km->ijm", polarisability_derivative, displacements) * BOHR_ANGSTROM**2
    isotropic = np.einsum("iim->m", a) / 3
    diagonal = (a[0, 0] - a[1, 1]) ** 2 + (a[1, 1] - a[2, 2]) ** 2 + (a[2, 2] - a[0, 0]) ** 2
    anisotropy = 0.5 * diagonal + 3 * (a[0, 1] ** 2 + a[1, 2] ** 2 + a[0, 2] ** 2)
    return 45 * isotropic**2 + 7 * anisotropy


def vibrations(numbers, positions, walks=2):
    """Relax a molecule by GFN2-xTB and compute its IR and Raman lines.

    numbers [n], positions [n, 3] Å. walks: how often a saddle point may be left along its imaginary mode.
    Returns a dict: positions [n, 3] Å (relaxed), wavenumbers [m] cm^-1, ir [m] km/mol, raman [m] Å⁴/amu.
    Raises ValueError where the relaxation does not converge or stays at a saddle point.
    """
    calculator = XTB(numbers)
    x, largest = relax(calculator, np.asarray(positions) / BOHR_ANGSTROM, model_hessian(numbers, positions))
    mass = masses(numbers)
    hessian, dipoles = hessian_and_dipole_derivatives(calculator, x)
    wavenumbers, displacements = normal_modes(hessian, x, mass)
    for _ in range(walks):
        if wavenumbers.min() > SADDLE:
            break
        downhill = displacements[:, wavenumbers.argmin()].reshape(x.shape)
        x, largest = relax(calculator, x + 0.3 * downhill / np.abs(downhill).max(), hessian)
        hessian, dipoles = hessian_and_dipole_derivatives(calculator, x)
        wavenumbers, displacements = normal_modes(hessian, x, mass)
    if largest > 1e-3:
        raise ValueError(f"GFN2-xTB relaxation did not converge: largest gradient {largest:.1e} Eh/a0")
    if wavenumbers.min() < SADDLE:
        raise ValueError(f"GFN2-xTB saddle point: lowest mode {wavenumbers.min():.0f} cm^-1")
    return {
        "positions": x * BOHR_ANGSTROM,
        "wavenumbers": wavenumbers,
        "ir": ir_intensities(dipoles, displacements),
        "raman": raman_activities(polarisability_derivatives(calculator, x), displacements),
    }
