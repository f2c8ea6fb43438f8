"""PaiNN against SchNetPack's with the same weights: outputs and every gradient."""

import importlib.util
import sys
import types

import pytest
import torch
from encoder_contract import molecules

from mspt.models import encoders
from mspt.models.encoders import painn

spec = importlib.util.find_spec("schnetpack")
if spec is None:
    pytest.skip("schnetpack is not installed: pip install --no-deps schnetpack", allow_module_level=True)
# Importing the package itself would import its data and training too, which need a dozen packages more.
package = types.ModuleType("schnetpack")
package.__path__ = list(spec.submodule_search_locations)
sys.modules["schnetpack"] = package
peer = importlib.import_module("schnetpack.representation.painn")
snn = importlib.import_module("schnetpack.nn")

# Their names and ours, of layer N.
NAMES = {
    "embedding": "embedding",
    "filter_net": "filters",
    "interactions.{}.interatomic_context_net.0": "messages.{}.sent.0",
    "interactions.{}.interatomic_context_net.1": "messages.{}.sent.2",
    "mixing.{}.mu_channel_mix": "updates.{}.mix",
    "mixing.{}.intraatomic_context_net.0": "updates.{}.scales.0",
    "mixing.{}.intraatomic_context_net.1": "updates.{}.scales.2",
}


def build(settings):
    """SchNetPack's network in the precision of the default type."""
    basis = snn.BesselRBF(settings.radial_functions, settings.cutoff)
    basis.freqs = torch.arange(1, settings.radial_functions + 1).double() * torch.pi / settings.cutoff
    return peer.PaiNN(settings.channels, settings.layers, basis, snn.CosineCutoff(settings.cutoff))


def converted(values, settings):
    """Their values by name -> ours; elements past their table of 100 get zeros."""
    ours = {}
    for theirs, own in NAMES.items():
        for layer in range(settings.layers):
            for kind in ("weight", "bias"):
                if f"{theirs}.{kind}".format(layer) in values:
                    ours[f"{own}.{kind}".format(layer)] = values[f"{theirs}.{kind}".format(layer)]
    table = ours["embedding.weight"]
    ours["embedding.weight"] = torch.cat([table, table.new_zeros(119 - len(table), table.shape[1])])
    return ours


def run(model, positions, parameters):
    """Scalars, vectors, and the gradients of positions and of named parameters of a weighted sum of both."""
    leaf = positions.clone().requires_grad_()
    outputs = model(leaf)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(part.shape, generator=generator).to(part.dtype) for part in outputs]
    sum((part * weight).sum() for part, weight in zip(outputs, weights, strict=True)).backward()
    return [*outputs, leaf.grad], {name: parameter.grad for name, parameter in parameters}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("settings", [painn.TINY, painn.QM9], ids=["tiny", "published"])
def test_same_as_schnetpack(settings, dtype, tolerance):
    numbers, positions, ptr = molecules((9, 1, 5, 14))
    molecule = torch.repeat_interleave(ptr.diff())
    near = (torch.cdist(positions, positions) < settings.cutoff) & (molecule[:, None] == molecule)
    target, source = (near & ~torch.eye(len(near), dtype=torch.bool)).nonzero().T
    torch.manual_seed(0)
    theirs = build(settings)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    theirs = theirs.to(dtype)
    ours = encoders.build(settings).to(dtype)
    ours.load_state_dict(converted(theirs.state_dict(), settings))

    def their_forward(leaf):
        inputs = {"_atomic_numbers": numbers, "_Rij": leaf[source] - leaf[target], "_idx_i": target, "_idx_j": source}
        outputs = theirs(inputs)
        return outputs["scalar_representation"], outputs["vector_representation"]

    expected, their_gradients = run(their_forward, positions.to(dtype), theirs.named_parameters())
    results, gradients = run(lambda leaf: ours(numbers, leaf, ptr), positions.to(dtype), ours.named_parameters())
    their_gradients = converted(their_gradients, settings)
    assert gradients.keys() == their_gradients.keys()
    for one, other in zip(
        [*results, *gradients.values()], [*expected, *map(their_gradients.get, gradients)], strict=True
    ):
        assert (one - other).norm() < tolerance * other.norm()
