"""TorchMDET against TorchMD-Net's own layers with the same weights: outputs and every gradient.

Both run in float32 and are compared with TorchMD-Net's layers in float64. Its neighbour search is left out: edges come
by hand, and no atom has more neighbours than are kept.
"""

import copy
import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.published import WhitenedNorm
from mspt.data.packing import Budget
from mspt.data.shardset import ShardSet
from mspt.data.stream import sequential
from mspt.errors import UserError
from mspt.models.encoders.torchmd_et import TorchMDET
from mspt.models.encoders.torchmd_net import convert

peer = pytest.importorskip("torchmdnet.models.torchmd_et", reason="torchmd-net is not installed (extra: bench)")
BUNDLED = Path(__file__).parents[2] / "shards/bundled/qm9-geometries/train"


class Peer(nn.Module):
    """TorchMD-Net's encoder with given edges, and, with norms, the layer norms of the published QM9 model."""

    def __init__(self, channels, layers, norms):
        super().__init__()
        # Its registered parameters, under the names that its checkpoints have.
        self.model = peer.TorchMD_ET(
            hidden_channels=channels, num_layers=layers, num_rbf=64, trainable_rbf=False, num_heads=8
        )
        if norms:
            self.model.x_norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(layers))
            self.model.vec_norms = nn.ModuleList(WhitenedNorm(channels) for _ in range(layers))
            self.model.out_norm_vec = WhitenedNorm(channels)
        self.norms = norms

    def forward(self, numbers, positions, ptr):
        model, molecule = self.model, torch.repeat_interleave(ptr.diff())
        near = torch.cdist(positions.detach(), positions.detach()) < 5.0
        edges = (near & (molecule[:, None] == molecule)).nonzero().T
        source, target = edges
        others = source != target
        offset = positions[source] - positions[target]
        length = offset[others].norm(dim=1)
        index = others.nonzero()[:, 0]
        distance = offset.new_zeros(len(source)).index_put((index,), length)
        direction = torch.zeros_like(offset).index_put((index,), offset[others] / length[:, None])
        radial = model.distance_expansion(distance)
        x = model.neighbor_embedding(numbers, model.embedding(numbers), edges, distance, radial)
        vec = x.new_zeros(len(x), 3, x.shape[1])
        for index, attention in enumerate(model.attention_layers):
            dx, dvec = attention(x, vec, edges, distance, radial, direction)
            x, vec = x + dx, vec + dvec
            if self.norms:
                x, vec = model.x_norms[index](x), model.vec_norms[index](vec)
        return model.out_norm(x), model.out_norm_vec(vec) if self.norms else vec


def molecules(count):
    """numbers, positions, ptr of bundled molecules that are neither flat nor symmetric.

    Where symmetry makes an atom's vectors vanish in some direction, the norm divides rounding by rounding: there two
    float32 runs agree to 1e-2 only, whoever computes them.
    """
    batch = next(islice(sequential(ShardSet.open(BUNDLED), Budget(molecules=128, atoms=4096)), 40, None))
    sizes = batch.ptr.diff().tolist()
    chosen = [
        (numbers, positions)
        for numbers, positions in zip(batch.numbers.split(sizes), batch.positions.split(sizes), strict=True)
        if torch.linalg.svdvals(positions - positions.mean(0))[-1] > 0.7 * len(positions) ** 0.5  # Å
    ][:count]
    assert len(chosen) == count
    ptr = torch.tensor([0, *(len(numbers) for numbers, _ in chosen)]).cumsum(0)
    return torch.cat([numbers for numbers, _ in chosen]), torch.cat([positions for _, positions in chosen]), ptr


def build(channels, layers, norms):
    """A Peer with no parameter zero."""
    torch.manual_seed(0)
    model = Peer(channels, layers, norms)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def in_float64(model):
    """The same in float64, its radial functions exact and not rounded to float32 first."""
    model = copy.deepcopy(model).double()
    radial, first = model.model.distance_expansion, math.exp(-5)
    radial.means = torch.linspace(first, 1, 64, dtype=torch.float64)
    radial.betas = torch.full((64,), (2 / 64 * (1 - first)) ** -2, dtype=torch.float64)
    return model


def run(model, numbers, positions, ptr):
    """Scalars, vectors, and the gradients of positions and parameters of a weighted sum of both."""
    positions = positions.clone().requires_grad_()
    scalars, vectors = model(numbers, positions, ptr)
    generator = torch.Generator().manual_seed(1)
    weights = (torch.randn(part.shape, generator=generator) for part in (scalars, vectors))
    sum((part * weight).sum() for part, weight in zip((scalars, vectors), weights, strict=True)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"scalars": scalars, "vectors": vectors, "positions": positions.grad}, gradients


def errors(result, truth):
    """name -> ‖result − truth‖ / ‖truth‖."""
    return {
        name: float((result[name].detach().double() - value.detach()).norm() / value.detach().norm())
        for name, value in truth.items()
        if value.norm() > 0
    }


@pytest.mark.parametrize("gates", ["direct", "tabulated", "finely tabulated"])
@pytest.mark.parametrize("norms", [False, True], ids=["none", "whitened_published"])
@pytest.mark.parametrize(("channels", "layers", "count"), [(64, 2, 4), (256, 8, 8)], ids=["small", "published"])
def test_same_as_torchmd_net(channels, layers, count, norms, gates):
    numbers, positions, ptr = molecules(count)
    theirs = build(channels, layers, norms)
    settings, weights = convert(theirs.model.state_dict(), max_neighbours=100)
    assert (settings.layers, settings.channels, settings.radial_functions, settings.cutoff) == (layers, channels, 64, 5)
    own = {
        "direct": {"gates": "direct"},
        "tabulated": {},  # as it comes
        "finely tabulated": {"knots_per_function": 16},
    }
    ours = TorchMDET(settings.model_copy(update=own[gates]))
    ours.load_state_dict(weights)

    buffers = dict(theirs.model.named_buffers())

    def converted(gradients):
        """Gradients go through the same rearrangement as weights."""
        return convert({name.removeprefix("model."): value for name, value in gradients.items()} | buffers)[1]

    truth, gradients = run(in_float64(theirs), numbers, positions.double(), ptr)
    truth |= converted(gradients)
    result, gradients = run(theirs, numbers, positions, ptr)
    their_errors = errors(result | converted(gradients), truth)
    result, gradients = run(ours, numbers, positions, ptr)
    our_errors = errors(result | gradients, truth)
    assert our_errors.keys() == their_errors.keys()
    for name, error in our_errors.items():
        # The slope of a gate, which the positions' gradient is made of, is what more knots are for.
        bound = 1e-4 if (name, gates) == ("positions", "tabulated") else 1e-5
        assert error < bound, f"{name}: {error:.1e}, where TorchMD-Net in float32 errs by {their_errors[name]:.1e}"


def small(**options):
    """The state dict of a small TorchMD_ET."""
    return peer.TorchMD_ET(
        **{"hidden_channels": 16, "num_layers": 2, "num_rbf": 8, "num_heads": 2, "trainable_rbf": False} | options
    ).state_dict()


def test_a_checkpoint_holds_the_model_under_a_prefix():
    state = small()
    checkpoint = {f"model.representation_model.{name}": value for name, value in state.items()}
    checkpoint["model.output_model.output_network.0.weight"] = torch.zeros(3)
    bare, prefixed = convert(state, heads=2)[1], convert(checkpoint, heads=2)[1]
    assert bare.keys() == prefixed.keys()
    assert all(torch.equal(bare[name], prefixed[name]) for name in bare)


def without(name):
    return lambda: {key: value for key, value in small().items() if key != name}


def trained():
    state = small()
    state["distance_expansion.betas"] = 1.1 * state["distance_expansion.betas"]
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (dict, "attention_layers.0.q_proj.weight"),
        (without("attention_layers.1.o_proj.bias"), "attention_layers.1.o_proj.bias: missing"),
        (lambda: small(distance_influence="keys"), 'attention_layers.0.dv_proj.weight: missing; .*"both"'),
        (lambda: small(distance_influence="none"), 'attention_layers.0.dk_proj.weight: missing; .*"both"'),
        (lambda: small(neighbor_embedding=False), "neighbor_embedding.embedding.weight: missing; neighbor_embedding"),
        (lambda: small(rbf_type="gauss"), "distance_expansion.means: missing; .*expnorm"),
        (trained, "distance_expansion.betas: not the fixed ones"),
        (lambda: small(max_z=200), "embedding.weight: 200 elements"),
        (lambda: small() | {"out_norm_vec.weight": torch.ones(16)}, "out_norm_vec.weight: nothing here takes it"),
        (lambda: small() | {"out_norm.weight": torch.ones(4)}, "out_norm.weight: has shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_what_does_not_fit(state, message):
    with pytest.raises(UserError, match=message):
        convert(state(), heads=2)


def test_refuses_heads_that_do_not_divide_the_channels():
    with pytest.raises(UserError, match="16 channels .* 3 heads"):
        convert(small(), heads=3)
