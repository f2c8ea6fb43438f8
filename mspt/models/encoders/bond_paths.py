"""Shortest paths between the atoms of molecules along their bonds.

Legend: m molecules, N atoms of the largest, b bonds.
"""

import torch

KINDS = 5  # of bonds: Bonds.types; a higher code counts as 0, another


@torch.no_grad()
def bond_paths(bonds, at, count, largest, settings):
    """Bonds; at: molecule and place of each atom [n]; count m, largest N -> degree, hops, shares.

    degree [m, N]: atoms bound to each. hops [m, N, N]: bonds between two atoms, settings.longest_path + 1 for more or
    no path. shares [m, N, N, settings.typed_bonds · KINDS] float32: of the path from i to j, for each of its first
    bonds from i the type as 0 or 1, divided by the path's length or typed_bonds, whichever is less. Where several
    shortest paths lead to j, the mean over their last bonds, so that the order of atoms does not matter.
    """
    molecule, place = at
    kinds = torch.zeros(count, KINDS, largest, largest, device=molecule.device)
    first, second = bonds.pairs.unbind(1)
    kind = torch.where(bonds.types < KINDS, bonds.types, 0)
    for one, other in ((first, second), (second, first)):
        kinds[molecule[one], kind, place[one], place[other]] = 1.0
    steps = kinds.sum(1)
    degree = (steps > 0).sum(-1)

    typed, longest = settings.typed_bonds, settings.longest_path
    hops = torch.full((count, largest, largest), longest + 1, device=molecule.device)
    edge = torch.eye(largest, device=molecule.device).expand(count, -1, -1)  # the atoms reached last
    hops = torch.where(edge > 0, 0, hops)
    shares = kinds.new_zeros(count, typed * KINDS, largest, largest)
    for length in range(1, longest + 1):
        ways = edge @ steps
        new = (ways > 0) & (hops > longest)
        if not new.any():
            break
        total = (shares * edge[:, None]) @ steps[:, None]
        if length <= typed:
            total[:, (length - 1) * KINDS : length * KINDS] += edge[:, None] @ kinds
        shares = torch.where(new[:, None], total / ways.clamp(min=1)[:, None], shares)
        hops = torch.where(new, length, hops)
        edge = new.to(edge.dtype)
    return degree, hops, shares.permute(0, 2, 3, 1) / hops.clamp(1, typed)[..., None]
