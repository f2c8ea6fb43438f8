"""Frad: of two kinds of noise, on torsions and on coordinates, the second is predicted (Feng et al., ICML 2023).

Legend: m molecules, n atoms, b bonds, r rotatable bonds, t atoms that turn with them, in all.
"""

import math
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from mspt.objectives.coord import Coord
from mspt.settings import Settings

SINGLE, TRIPLE = 1, 3


class FradSettings(Settings):
    """weight: in the joint loss. sigma: standard deviation of the noise on coordinates, Å. torsion_sigma: of the noise
    on the torsion about every rotatable bond, degrees, as in the public code.
    """

    weight: float = Field(1.0, ge=0)
    sigma: float = Field(0.04, ge=0)
    torsion_sigma: float = Field(2.0, ge=0)


class Rotatable(NamedTuple):
    """Rotatable bonds: each turns the smaller side of its molecule about the axis from fixed [r] to turning [r].

    molecule [r]: whose. rank [r]: which of its molecule's. atom [t], bond [t]: the atoms that turn, and with which.
    """

    fixed: Tensor
    turning: Tensor
    molecule: Tensor
    rank: Tensor
    atom: Tensor
    bond: Tensor


def rotatable(batch):
    """Bonds that are single, in no ring, with another neighbour at both ends, and not beside a triple bond.

    A molecule whose bonds are not known has none.
    """
    (pairs, types, _), n, molecule = batch.bonds, len(batch.numbers), batch.molecule
    parent = spanning_forest(pairs, molecule, batch.ptr)
    below, above = descent(parent)
    # A bond that closes a ring lies across the bonds of the tree that are above one of its ends, but not the other.
    closing = (parent[pairs[:, 0]] != pairs[:, 1]) & (parent[pairs[:, 1]] != pairs[:, 0])
    over = torch.zeros(n, dtype=torch.bool, device=pairs.device)
    over[crossed(pairs[closing], below, above, n)] = True
    degree = torch.bincount(pairs.flatten(), minlength=n)
    beside_triple = torch.zeros_like(over)
    beside_triple[pairs[types == TRIPLE].flatten()] = True
    ends = (degree > 1) & ~beside_triple
    free = (types == SINGLE) & ~closing & ends[pairs].all(1)
    first, second = pairs[free].T
    child = torch.where(parent[first] == second, first, second)
    child = child[~over[child]].sort().values
    # Atoms below a bond of the tree; if they are more than half of the molecule, the others turn.
    sizes, subtree = batch.ptr.diff(), torch.bincount(above, minlength=n)
    up = 2 * subtree[child] > sizes[molecule[child]]
    fixed, turning = torch.where(up, child, parent[child]), torch.where(up, parent[child], child)
    own = molecule[child]
    ranks = torch.arange(len(child), device=child.device)
    first_of = torch.zeros(len(sizes), dtype=torch.long, device=child.device).scatter_reduce(
        0, own, ranks, "amin", include_self=False
    )
    # All atoms of the molecules that the bonds belong to; those on the right side stay.
    counts = sizes[own]
    bond = torch.repeat_interleave(ranks, counts)
    start = torch.cumsum(counts, 0) - counts
    atom = batch.ptr[own][bond] + torch.arange(len(bond), device=bond.device) - start[bond]
    inside = torch.isin(atom * n + child[bond], below * n + above)
    moves = inside != up[bond]
    return Rotatable(fixed, turning, own, ranks - first_of[own], atom[moves], bond[moves])


def spanning_forest(pairs, molecule, ptr):
    """The parent [n] of each atom in a tree along the bonds, breadth first; its own of a root.

    An atom's parent is the first of the atoms it could be; a molecule in pieces has a root for each.
    """
    atoms = torch.arange(len(molecule), device=molecule.device)
    parent, reached = atoms.clone(), torch.zeros_like(atoms, dtype=torch.bool)
    source, target = torch.cat([pairs, pairs.flip(1)]).T
    while not reached.all():
        # Roots: of each molecule the first atom that has not been reached.
        left = atoms[~reached]
        roots = torch.full_like(ptr[:-1], len(atoms)).scatter_reduce(0, molecule[left], left, "amin")
        reached[roots[roots < len(atoms)]] = True
        while (new := reached[source] & ~reached[target]).any():
            parent.scatter_reduce_(0, target[new], source[new], "amin", include_self=False)
            reached[target[new]] = True
    return parent


def descent(parent):
    """All pairs of an atom and one above it in the forest, itself among them and without the root: below, above."""
    below, above = [], []
    atom = at = torch.arange(len(parent), device=parent.device)
    while len(atom):
        rising = parent[at] != at
        atom, at = atom[rising], at[rising]
        below.append(atom)
        above.append(at)
        at = parent[at]
    return (torch.cat(parts) if parts else atom for parts in (below, above))


def crossed(closing, below, above, n):
    """The atoms whose bond to their parent is in a ring, for bonds closing [c, 2] that are not in the forest."""
    order = below.argsort()
    above, counts = above[order], torch.bincount(below, minlength=n)
    start = torch.cumsum(counts, 0) - counts
    ends = closing.flatten()
    number = torch.repeat_interleave(torch.arange(len(ends), device=ends.device), counts[ends])
    within = torch.arange(len(number), device=ends.device) - (torch.cumsum(counts[ends], 0) - counts[ends])[number]
    keys, times = torch.unique(
        torch.div(number, 2, rounding_mode="floor") * n + above[start[ends][number] + within], return_counts=True
    )
    return keys[times == 1] % max(n, 1)


def turned(positions, bonds, angles):
    """positions [n, 3] with the torsion about each of the Rotatable bonds changed by angles [r], radians."""
    positions, rounds = positions.clone(), int(bonds.rank.max()) + 1 if len(bonds.rank) else 0
    for rank in range(rounds):
        of = bonds.rank[bonds.bond] == rank
        atom, bond = bonds.atom[of], bonds.bond[of]
        centre = positions[bonds.turning[bond]]
        axis = centre - positions[bonds.fixed[bond]]
        axis = axis / axis.norm(dim=-1, keepdim=True)
        arm, cos, sin = positions[atom] - centre, angles[bond].cos()[:, None], angles[bond].sin()[:, None]
        along = (axis * arm).sum(-1, keepdim=True)
        positions[atom] = centre + cos * arm + sin * torch.linalg.cross(axis, arm) + (1 - cos) * along * axis
    return positions


class Frad(Coord):
    """x̃ = T(x) + σ ε: T turns every rotatable bond by a random angle; the vector head predicts ε.

    A molecule without rotatable bonds, or whose bonds are not known, is denoised as by Coord. Sum and weight: Coord's.
    """

    name = "frad"
    needs_bonds = True

    def start(self, batch, generator):
        if batch.bonds is None:
            return batch.positions
        bonds = rotatable(batch)
        fixed, turning = (end - batch.ptr[bonds.molecule] for end in (bonds.fixed, bonds.turning))
        # Keyed by the bond's atoms in the record, whichever of them turns.
        counter = (torch.minimum(fixed, turning) << 32) + torch.maximum(fixed, turning)
        records = batch.records[bonds.molecule]
        draws = generator.normal("frad/torsion", records, counter, 1, batch.positions.dtype)[:, 0]
        return turned(batch.positions, bonds, math.radians(self.settings.torsion_sigma) * draws)
