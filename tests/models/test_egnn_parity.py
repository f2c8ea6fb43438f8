"""EGNN against the layers of egnn-pytorch with the same weights: outputs and every gradient.

Its hidden layers are wider than the published ones: what is too wide of them gets zeros. Its sparse layers, which take
edges by hand, give the scalars; their update of positions sees messages before the gate, so that the vectors are those
of its dense layers, one a channel, which see them after it.
"""

import pytest
import torch
from encoder_contract import molecules
from torch.nn.functional import pad

from mspt.models import encoders
from mspt.models.encoders import egnn

peer = pytest.importorskip("egnn_pytorch", reason="egnn-pytorch is not installed: pip install --no-deps egnn-pytorch")


def put(linear, weight, bias=None):
    """Into the first rows and columns of a layer, zeros elsewhere; gradients flow on to weight and bias."""
    rows, columns = linear.weight.shape
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    del linear.weight, linear.bias
    linear.weight = pad(weight, (0, columns - weight.shape[1], 0, rows - len(weight)))
    linear.bias = pad(bias, (0, rows - len(bias)))


def put_messages(edge_mlp, gate, layer):
    """The maps of an edge: of both atoms' scalars, an edge's target first, and the squared distance."""
    put(edge_mlp[0], layer.weight, layer.bias)
    put(edge_mlp[3], layer.message.weight, layer.message.bias)
    put(gate[0], layer.gate.weight, layer.gate.bias)


def updated(layer, x, positions, edges):
    """Scalars after their sparse layer with the maps of ours."""
    theirs = peer.EGNN_Sparse(x.shape[1], m_dim=x.shape[1], soft_edge=1, update_coors=False)
    put_messages(theirs.edge_mlp, theirs.edge_weight, layer)
    put(theirs.node_mlp[0], layer.update[0].weight, layer.update[0].bias)
    put(theirs.node_mlp[3], layer.update[2].weight, layer.update[2].bias)
    return theirs(torch.cat([positions, x], 1), edges)[:, 3:]


def moved(model, channel, molecules):
    """How far their dense layer with the maps of a channel of ours moves the atoms. molecules: pairs (x, positions)."""
    channels = model.settings.channels
    theirs = peer.EGNN(
        channels, m_dim=channels, soft_edges=True, update_feats=False, norm_coors=True, norm_coors_scale_init=1.0
    )
    # It divides by the length or this, if that is more: 1e-8 would enlarge rounding of an atom's offset from itself.
    theirs.coors_norm.eps = 0.5
    put_messages(theirs.edge_mlp, theirs.edge_gate, model.layers[-1])
    put(theirs.coors_mlp[0], model.moves[0].weight, model.moves[0].bias)
    put(theirs.coors_mlp[3], model.moves[2].weight[channel : channel + 1])
    return torch.cat([theirs(x[None], positions[None])[1][0] - positions for x, positions in molecules])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize(
    ("settings", "channels"),
    [(egnn.TINY.model_copy(update={"cutoff": None}), range(16)), (egnn.EGNNSettings(), (0, 127))],
    ids=["tiny", "published"],
)
def test_same_as_egnn_pytorch(settings, channels, dtype, tolerance):
    """Of the published size the vectors of some channels alone: a dense layer each."""
    numbers, positions, ptr = molecules((9, 1, 5, 14))
    sizes = ptr.diff()
    molecule = torch.repeat_interleave(sizes)
    joined = (molecule[:, None] == molecule) & ~torch.eye(len(numbers), dtype=torch.bool)
    target, source = joined.nonzero().T
    torch.manual_seed(0)
    model = encoders.build(settings).to(dtype)

    def theirs(leaf):
        x = model.embedding(numbers)
        for layer in model.layers:
            before, x = x, updated(layer, x, leaf, torch.stack([source, target]))
        pairs = list(zip(before.split(sizes.tolist()), leaf.split(sizes.tolist()), strict=True))
        return model.out(x), torch.stack([moved(model, channel, pairs) for channel in channels], -1)

    def ours(leaf):
        scalars, vectors = model(numbers, leaf, ptr)
        return scalars, vectors[..., list(channels)]

    results = []
    for forward in (ours, theirs):
        leaf = positions.to(dtype).requires_grad_()
        outputs = forward(leaf)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(part.shape, generator=generator).to(dtype) for part in outputs]
        total = sum((part * weight).sum() for part, weight in zip(outputs, weights, strict=True))
        results.append([*outputs, *torch.autograd.grad(total, [leaf, *model.parameters()])])
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() < tolerance * other.norm()
