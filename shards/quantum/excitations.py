"""Vertical singlet excitations by TD-B3LYP/def2-SVP with PySCF's integrals.

Casida's equation in full (no Tamm-Dancoff), density fitting for Coulomb, exchange and the exchange-correlation
kernel, and one dense diagonalisation, so that all states up to 15 eV come at once.
"""

import numpy as np
import scipy.linalg
from pyscf import df, dft, gto, lib
from pyscf.dft import numint

from mspt.chemistry.elements import SYMBOLS
from mspt.chemistry.units import HARTREE_EV

METHOD = "TD-B3LYP/def2-SVP"
MAX_ENERGY = 15.5  # eV; half an eV beyond the grid, so that its last points have their tails
WINDOW = 45.0  # eV; occupied-virtual pairs further apart than this are left out
ALL_ELECTRON = 36  # beyond Kr, def2-SVP is made for effective core potentials


def orbitals(density):
    """A density matrix [n, n] as orbitals [n, o] times the root of their occupation: density = orbitals · orbitalsᵀ."""
    if hasattr(density, "mo_coeff"):
        filled = density.mo_occ > 0
        return density.mo_coeff[:, filled] * np.sqrt(density.mo_occ[filled])
    values, vectors = np.linalg.eigh(np.asarray(density))  # the first guess: a density without orbitals
    filled = values > 1e-12
    return vectors[:, filled] * np.sqrt(values[filled])


class DensityFit(df.DF):
    """Density fitting whose Coulomb and exchange matrices are products of NumPy's BLAS.

    PySCF's own BLAS ran ten times slower than NumPy's where this was measured.
    """

    def integrals(self):
        """The three-index integrals [n_ao, n_aux, n_ao], unpacked once."""
        if getattr(self, "_unpacked", None) is None:
            self._packed = np.concatenate(list(self.loop(blksize=200)))
            self._unpacked = np.ascontiguousarray(lib.unpack_tril(self._packed).transpose(1, 0, 2))
        return self._unpacked

    def get_jk(self, dm, hermi=1, with_j=True, with_k=True, direct_scf_tol=1e-13, omega=None):
        fitted, n = self.integrals(), dm.shape[-1]
        j = k = None
        if with_j:  # of a symmetric matrix: off the diagonal everything counts twice
            pairs = lib.pack_tril(2 * np.asarray(dm) - np.diag(np.diag(dm)))
            j = lib.unpack_tril((self._packed @ pairs) @ self._packed)
        if with_k:
            half = (fitted.reshape(-1, n) @ orbitals(dm)).reshape(n, -1)
            k = half @ half.T
        return j, k


class Quadrature(numint.NumInt):
    """The exchange-correlation potential of a GGA; the basis functions' values are kept between iterations."""

    def values(self, mol, grids):
        """Basis functions and their gradients on the grid [4, n_ao, points]."""
        if getattr(self, "_of", None) is not grids.coords:
            self._of, self._values = grids.coords, self.eval_ao(mol, grids.coords, deriv=1).transpose(0, 2, 1)
        return self._values

    def density(self, mol, grids, dm):
        """The density and its gradient on the grid [4, points]."""
        amplitudes = orbitals(dm).T @ self.values(mol, grids)
        density = np.einsum("xog,og->xg", amplitudes, amplitudes[0])
        density[1:] *= 2
        return density

    def nr_rks(self, mol, grids, xc_code, dms, relativity=0, hermi=1, max_memory=2000, verbose=None):
        density = self.density(mol, grids, dms)
        energy, potential = self.eval_xc_eff(xc_code, density, deriv=1, xctype="GGA")[:2]
        electrons = density[0] * grids.weights
        weighted = potential * grids.weights
        weighted[0] /= 2
        values = self.values(mol, grids)
        half = values[0] @ np.einsum("xg,xng->ng", weighted, values).T
        return electrons.sum(), electrons @ energy, half + half.T


def excitations(numbers, positions, dtype=np.float32):
    """numbers [n], positions [n, 3] Å -> energies [s] eV, oscillator strengths [s], by rising energy.

    dtype: of the response matrices. float32 moves energies by less than 1 meV and takes half the time.
    Raises ValueError where the SCF does not converge.
    """
    atoms = [(int(z), tuple(p)) for z, p in zip(numbers, positions, strict=True)]
    potentials = {SYMBOLS[z]: "def2-svp" for z in map(int, numbers) if z > ALL_ELECTRON}
    molecule = gto.M(atom=atoms, basis="def2-svp", ecp=potentials, verbose=0, unit="Angstrom", max_memory=3000)
    scf = dft.RKS(molecule, xc="b3lyp").density_fit(auxbasis="weigend", with_df=DensityFit(molecule, "weigend"))
    scf._numint = Quadrature()
    scf.grids.level, scf.conv_tol = 0, 1e-7
    scf.kernel()
    if not scf.converged:
        raise ValueError("B3LYP/def2-SVP self-consistent field did not converge")
    # The 1s orbitals. An effective core potential stands for them; the orbitals that it leaves are WINDOW's to choose.
    core = sum(2 < z <= ALL_ELECTRON for z in numbers)
    n_occupied = int((scf.mo_occ > 0).sum())
    occupied, e_occupied = scf.mo_coeff[:, core:n_occupied], scf.mo_energy[core:n_occupied]
    virtual, e_virtual = scf.mo_coeff[:, n_occupied:], scf.mo_energy[n_occupied:]
    in_window = e_virtual - e_occupied[-1] < WINDOW / HARTREE_EV
    virtual, e_virtual = virtual[:, in_window], e_virtual[in_window]
    gaps = (e_virtual[None, :] - e_occupied[:, None]).ravel()
    pairs = gaps < WINDOW / HARTREE_EV
    gaps = gaps[pairs]

    l_ov, l_oo, l_vv = _fitted_integrals(scf, occupied, virtual, dtype)
    n_aux, n_o, n_v = l_ov.shape
    l_pairs = l_ov.reshape(n_aux, n_o * n_v)[:, pairs]
    kernel = _coupling_kernel(scf, dtype)
    hybrid = scf._numint.rsh_and_hybrid_coeff("b3lyp")[2]

    coupling = l_pairs.T @ (kernel @ l_pairs)
    exchange_a = l_oo.reshape(n_aux, -1).T @ l_vv.reshape(n_aux, -1)
    exchange_a = exchange_a.reshape(n_o, n_o, n_v, n_v).transpose(0, 2, 1, 3).reshape(n_o * n_v, -1)
    exchange_b = l_ov.reshape(n_aux, -1).T @ l_ov.reshape(n_aux, -1)
    exchange_b = exchange_b.reshape(n_o, n_v, n_o, n_v).transpose(0, 3, 2, 1).reshape(n_o * n_v, -1)
    chosen = np.ix_(pairs, pairs)
    a = coupling - hybrid * exchange_a[chosen]
    a[np.diag_indices(len(gaps))] += gaps.astype(dtype)
    b = coupling - hybrid * exchange_b[chosen]
    del exchange_a, exchange_b, coupling

    # (A − B)^1/2 (A + B) (A − B)^1/2 z = ω² z, with a Cholesky factor in the square root's place.
    root = np.linalg.cholesky(a - b)
    squares, vectors = scipy.linalg.eigh(
        root.T @ (a + b) @ root,
        subset_by_value=(1e-6, (MAX_ENERGY / HARTREE_EV) ** 2),
        driver="evr",
        overwrite_a=True,
        check_finite=False,
    )
    omega = np.sqrt(squares.astype(np.float64))
    with molecule.with_common_orig((0, 0, 0)):
        r = molecule.intor_symmetric("int1e_r", comp=3)
    dipoles = np.einsum("xpq,pi,qa->xia", r, occupied, virtual, optimize=True).reshape(3, -1)[:, pairs]
    transition = np.sqrt(2) * dipoles @ (root @ vectors) / np.sqrt(omega)
    return omega * HARTREE_EV, 2 / 3 * omega * (transition**2).sum(0)


def _fitted_integrals(scf, occupied, virtual, dtype):
    """Density-fitted three-index integrals in molecular orbitals: ov, oo and vv, each [n_aux, ·, ·]."""
    integrals, n = scf.with_df.integrals().astype(dtype), len(occupied)
    occupied, virtual = occupied.astype(dtype), virtual.astype(dtype)
    half_o, half_v = (
        (integrals.reshape(-1, n) @ each).reshape(n, -1, each.shape[1]).transpose(1, 2, 0)
        for each in (occupied, virtual)
    )
    return half_o @ virtual, half_o @ occupied, half_v @ virtual


def _coupling_kernel(scf, dtype):
    """Singlet Coulomb + exchange-correlation kernel in the orthonormal auxiliary basis [n_aux, n_aux]."""
    ni, grids, aux = scf._numint, scf.grids, scf.with_df.auxmol
    density = ni.density(scf.mol, grids, scf.make_rdm1())
    dense = density[0] > 1e-6
    coords, weights, density = grids.coords[dense], grids.weights[dense], density[:, dense]
    xc_kernel = np.zeros((aux.nao, aux.nao), dtype)
    for start in range(0, len(weights), 2000):
        part = slice(start, start + 2000)
        second = ni.eval_xc_eff("b3lyp", density[:, part], deriv=2, xctype="GGA")[2] * weights[part]
        basis = ni.eval_ao(aux, coords[part], deriv=1).transpose(0, 2, 1)
        # Without the Gaussians' tails: products of them are denormal in float32, which is 20 times slower.
        basis = np.where(np.abs(basis) > 1e-12, basis, 0).astype(dtype)
        weighted = np.einsum("xyg,ypg->xpg", second.astype(dtype), basis)
        weighted[np.abs(weighted) < 1e-20] = 0
        xc_kernel += sum(one @ other.T for one, other in zip(basis, weighted, strict=True))
    factor = np.linalg.cholesky(aux.intor("int2c2e"))
    inner = scipy.linalg.solve_triangular(factor, xc_kernel, lower=True)
    kernel = 2 * np.eye(aux.nao) + 2 * scipy.linalg.solve_triangular(factor, inner.T, lower=True)
    return (0.5 * (kernel + kernel.T)).astype(dtype)
