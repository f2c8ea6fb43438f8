"""SphereNet against that of dive-into-graphs (dig) with the same weights: features and gradients of every atom.

dig's own requirements do not install beside this project's, and its neighbour search, sums and sparse rows come from
compiled packages. Its files are loaded without the packages around them; torch-geometric gives the sums, and what it
needs of a sparse matrix stands here. Its zeros of Bessel functions are rounded to float32.

One thing is put right: dig takes the smallest torsion above 0 over all neighbours, the atom itself among them, whose
own torsion is 0 and is meant to count as a whole turn. By rounding it is often above 0 and then is the smallest.
"""

import importlib
import importlib.util
import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from encoder_contract import molecules

from mspt.models.encoders.spherenet import SphereNet, SphereNetSettings

dig = importlib.util.find_spec("dig")
if dig is None:
    pytest.skip("dive-into-graphs is not installed: pip install --no-deps dive-into-graphs", allow_module_level=True)
geometric = pytest.importorskip("torch_geometric.utils", reason="torch-geometric is not installed (extra: bench)")
pytest.importorskip("sympy")


class Rows:
    """Rows of a sparse matrix, as much of torch_sparse.SparseTensor as dig asks for."""

    def __init__(self, row, col, value, sparse_sizes=None):
        order = (row * (int(col.max()) + 1) + col).argsort()
        self.rows, self.cols, self.values = row[order], col[order], value[order]
        self.storage = SimpleNamespace(row=lambda: self.rows, col=lambda: self.cols, value=lambda: self.values)
        self.count = sparse_sizes[0] if sparse_sizes else int(row.max()) + 1

    def __getitem__(self, wanted):
        found = [(self.rows == w).nonzero()[:, 0] for w in wanted.tolist()]
        row = torch.repeat_interleave(torch.tensor([len(part) for part in found]))
        at = torch.cat(found)
        part = Rows.__new__(Rows)
        part.rows, part.cols, part.values, part.count = row, self.cols[at], self.values[at], len(wanted)
        part.storage = SimpleNamespace(row=lambda: part.rows, col=lambda: part.cols, value=lambda: part.values)
        return part

    def set_value(self, _):
        return self

    def sum(self, dim):
        return torch.bincount(self.rows, minlength=self.count)


@pytest.fixture(scope="module")
def peer():
    """dig's module spherenet, its packages empty but for what it imports."""
    patch = pytest.MonkeyPatch()
    (root,) = dig.submodule_search_locations
    for name in ("dig", "dig.threedgraph", "dig.threedgraph.method", "dig.threedgraph.method.spherenet"):
        package = ModuleType(name)
        package.__path__ = ["/".join([root, *name.split(".")[1:]])]
        patch.setitem(sys.modules, name, package)
    scatter = ModuleType("torch_scatter")
    scatter.scatter = reduced
    sparse = ModuleType("torch_sparse")
    sparse.SparseTensor = Rows
    patch.setitem(sys.modules, "torch_scatter", scatter)
    patch.setitem(sys.modules, "torch_sparse", sparse)
    patch.setattr(np, "math", math, raising=False)  # numpy 1's
    module = importlib.import_module("dig.threedgraph.method.spherenet.spherenet")
    patch.setattr(module, "radius_graph", near)
    yield module
    for name in [name for name in sys.modules if name.startswith("dig")]:
        del sys.modules[name]
    patch.undo()


def reduced(src, index, dim=0, dim_size=None, reduce="sum"):
    """torch_scatter.scatter. The smallest are asked for of torsions alone."""
    if reduce == "min":
        src = torch.where(src < 1e-9, src + 2 * math.pi, src)
    return geometric.scatter(src, index, 0, dim_size, reduce)


def near(positions, r, batch):
    """All pairs of a molecule closer than r; batch: no molecule but each atom's own, see atoms_of."""
    distance = torch.cdist(positions.detach(), positions.detach())
    return ((distance < r) & (distance > 0)).nonzero().T.flip(0)


# Our names of parameters -> dig's.
INNER = {
    "radial.0": "lin_rbf1", "radial.1": "lin_rbf2", "angles.0": "lin_sbf1", "angles.1": "lin_sbf2",
    "torsions.0": "lin_t1", "torsions.1": "lin_t2", "incoming": "lin_kj", "own": "lin_ji", "down": "lin_down",
    "up": "lin_up", "before.first": "layers_before_skip.0.lin1", "before.second": "layers_before_skip.0.lin2",
    "combine": "lin", "after.0.first": "layers_after_skip.0.lin1", "after.0.second": "layers_after_skip.0.lin2",
    "after.1.first": "layers_after_skip.1.lin1", "after.1.second": "layers_after_skip.1.lin2",
}  # fmt: skip
FIRST = {
    "embedding.radial": "init_e.lin_rbf_0",
    "embedding.combine": "init_e.lin",
    "outputs.0.radial": "init_e.lin_rbf_1",
}


def theirs_of(name):
    """dig's name of one of our parameters. There an edge's last map by distance belongs to the update of edges."""
    if name == "basis.frequencies":
        return "emb.dist_emb.freq"
    if name == "embedding.elements.weight":
        return "init_e.emb.weight"
    stem, kind = name.rsplit(".", 1)
    if stem in FIRST:
        return f"{FIRST[stem]}.{kind}"
    part, index, inner = stem.split(".", 2)
    if part == "blocks":
        return f"update_es.{index}.{INNER[inner]}.{kind}"
    if inner == "radial":
        return f"update_es.{int(index) - 1}.lin_rbf.{kind}"
    owner = "init_v" if index == "0" else f"update_vs.{int(index) - 1}"
    return f"{owner}.{inner.replace('up', 'lin_up').replace('layers', 'lins').replace('last', 'lin')}.{kind}"


def test_same_as_dig(peer):
    """With few functions, since dig has sympy work out each."""
    settings = SphereNetSettings(layers=2, radial_functions=2, spherical_functions=3, cutoff=3.0)
    numbers, positions, ptr = molecules((7,), seed=1)
    torch.manual_seed(0)
    theirs = peer.SphereNet(
        cutoff=settings.cutoff, num_layers=settings.layers, hidden_channels=settings.channels,
        out_channels=settings.channels, num_spherical=3, num_radial=2,
    ).double()  # fmt: skip
    ours = SphereNet(settings).double()
    state = theirs.state_dict()
    own = {name: state.pop(theirs_of(name)) for name in ours.state_dict()}
    assert not state
    elements = own["embedding.elements.weight"]
    own["embedding.elements.weight"] = torch.cat([elements, torch.zeros(119 - len(elements), settings.channels)])
    ours.load_state_dict(own)

    results = []
    for model, forward in (
        # Each atom as a molecule of its own in the last sum, so that features of atoms come out.
        (theirs, lambda x: theirs(SimpleNamespace(z=numbers, pos=x, batch=torch.arange(len(x))))),
        (ours, lambda x: ours(numbers, x, ptr)[0]),
    ):
        leaf = positions.clone().requires_grad_()
        scalars = forward(leaf)
        weights = torch.randn(scalars.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (scalars * weights).sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((scalars, leaf.grad, gradients))
    (scalars, force, gradients), (our_scalars, our_force, our_gradients) = results
    torch.testing.assert_close(our_scalars, scalars, rtol=2e-6, atol=2e-6 * float(scalars.detach().abs().max()))
    torch.testing.assert_close(our_force, force, rtol=2e-6, atol=2e-6 * float(force.abs().max()))
    for name, gradient in our_gradients.items():
        expected = gradients[theirs_of(name)]
        error = (gradient[: len(expected)] - expected).norm()
        assert error < 2e-6 * expected.norm() or error < 1e-12, name
