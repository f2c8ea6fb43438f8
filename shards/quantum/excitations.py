"""Vertical singlet excitations by TD-B3LYP/def2-SVP with PySCF's integrals.

Casida's equation in full (no Tamm-Dancoff), density fitting for Coulomb, exchange and the exchange-correlation
kernel, and one dense diagonalisation, so that all states up to 15 eV come at once.
"""

import numpy as np
import scipy.linalg
from pyscf import df, dft, gto, lib

from mspt.chemistry.units import HARTREE_EV

METHOD = "TD-B3LYP/def2-SVP"
MAX_ENERGY = 15.5  # eV; half an eV beyond the grid, so that its last points have their tails
WINDOW = 45.0  # eV; occupied-virtual pairs further apart than this are left out


class DensityFit(df.DF):
    """Density fitting whose Coulomb and exchange matrices are products of NumPy's BLAS.

    PySCF's own BLAS ran ten times slower than NumPy's where this was measured.
    """

    def integrals(self):
        """The three-index integrals [n_aux, n_ao, n_ao], unpacked once."""
        if getattr(self, "_unpacked", None) is None:
            self._unpacked = np.concatenate([lib.unpack_tril(np.asarray(block)) for block in self.loop(blksize=200)])
        return self._unpacked

    def get_jk(self, dm, hermi=1, with_j=True, with_k=True, direct_scf_tol=1e-13, omega=None):
        fitted, n = self.integrals(), dm.shape[-1]
        j = k = None
        if with_j:
            flat = fitted.reshape(len(fitted), -1)
            j = (flat.T @ (flat @ np.asarray(dm).ravel())).reshape(n, n)
        if with_k:
            if hasattr(dm, "mo_coeff"):
                filled = dm.mo_occ > 0
                root = dm.mo_coeff[:, filled] * np.sqrt(dm.mo_occ[filled])
            else:  # the first guess: a density without orbitals
                values, vectors = np.linalg.eigh(np.asarray(dm))
                filled = values > 1e-12
                root = vectors[:, filled] * np.sqrt(values[filled])
            half = (fitted.reshape(-1, n) @ root).reshape(len(fitted), n, -1).transpose(1, 0, 2).reshape(n, -1)
            k = half @ half.T
        return j, k


def excitations(numbers, positions, dtype=np.float32):
    """numbers [n], positions [n, 3] Å -> energies [s] eV, oscillator strengths [s], by rising energy.

    dtype: of the response matrices. float32 moves energies by less than 1 meV and takes half the time.
    Raises ValueError where the SCF does not converge.
    """
    atoms = [(int(z), tuple(p)) for z, p in zip(numbers, positions, strict=True)]
    molecule = gto.M(atom=atoms, basis="def2-svp", verbose=0, unit="Angstrom", max_memory=3000)
    scf = dft.RKS(molecule, xc="b3lyp").density_fit(auxbasis="weigend", with_df=DensityFit(molecule, "weigend"))
    scf.grids.level, scf.conv_tol = 0, 1e-7
    scf.kernel()
    if not scf.converged:
        raise ValueError("B3LYP/def2-SVP self-consistent field did not converge")
    core = sum(z > 2 for z in numbers)
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
    kernel = _coupling_kernel(scf).astype(dtype)
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
    half_o = (integrals.reshape(-1, n) @ occupied).reshape(len(integrals), n, -1).transpose(0, 2, 1)
    half_v = (integrals.reshape(-1, n) @ virtual).reshape(len(integrals), n, -1)
    return half_o @ virtual, half_o @ occupied, virtual.T @ half_v


def _coupling_kernel(scf):
    """Singlet Coulomb + exchange-correlation kernel in the orthonormal auxiliary basis [n_aux, n_aux]."""
    ni, grids, aux = scf._numint, scf.grids, scf.with_df.auxmol
    density = scf.make_rdm1()
    xc_kernel = np.zeros((aux.nao, aux.nao))
    for start in range(0, len(grids.weights), 2000):
        coords, weights = grids.coords[start : start + 2000], grids.weights[start : start + 2000]
        rho = ni.eval_rho(scf.mol, ni.eval_ao(scf.mol, coords, deriv=1), density, xctype="GGA", hermi=1)
        dense = rho[0] > 1e-6
        if not dense.any():
            continue
        second = ni.eval_xc_eff("b3lyp", rho[:, dense], deriv=2, xctype="GGA")[2]
        basis = ni.eval_ao(aux, coords[dense], deriv=1)
        weighted = np.einsum("xyn,ynp->xnp", second * weights[dense], basis, optimize=True)
        xc_kernel += np.tensordot(basis, weighted, axes=([0, 1], [0, 1]))
    factor = np.linalg.cholesky(aux.intor("int2c2e"))
    inner = scipy.linalg.solve_triangular(factor, xc_kernel, lower=True)
    kernel = 2 * np.eye(aux.nao) + 2 * scipy.linalg.solve_triangular(factor, inner.T, lower=True)
    return 0.5 * (kernel + kernel.T)
