"""Weights of the equivariant transformer as TorchMD-Net keeps them, for TorchMDET.

Names are those of its class TorchMD_ET, alone or inside a model or a Lightning checkpoint; x_norms.N, vec_norms.N and
out_norm_vec are the layer norms of the published QM9 model, which TorchMD-Net itself does not have.

Legend: F channels, H heads, D = F / H, K radial functions.
"""

import math

import torch
from torch.nn.functional import pad

from mspt.chemistry.elements import MAX_NUMBER
from mspt.errors import UserError
from mspt.models.encoders.torchmd_et import TorchMDETSettings

PREFIXES = ("", "representation_model.", "model.representation_model.")
# Names that a checkpoint lacks when its model was made with another option than the one supported.
OPTIONS = {
    "neighbor_embedding.": "neighbor_embedding is off there; only models that have it can be read",
    "dk_proj.": 'distance_influence is not "both" there; only models made with "both" can be read',
    "dv_proj.": 'distance_influence is not "both" there; only models made with "both" can be read',
    "distance_expansion.": 'rbf_type is not "expnorm" there; only models made with "expnorm" can be read',
}


class Weights:
    """A state dict that is taken from name by name. Raises UserError for a name or a shape that does not fit."""

    def __init__(self, state):
        for self.prefix in PREFIXES:
            if f"{self.prefix}attention_layers.0.q_proj.weight" in state:
                break
        else:
            raise UserError(
                "no attention_layers.0.q_proj.weight among the weights; give the state dict of a TorchMD_ET, or the "
                "state_dict of a checkpoint whose model is an equivariant-transformer"
            )
        self.state = {
            name.removeprefix(self.prefix): value for name, value in state.items() if name.startswith(self.prefix)
        }

    def __contains__(self, name):
        return name in self.state

    def take(self, name, *shape):
        """The tensor of this name; of this shape, where one is given."""
        if name not in self.state:
            why = next((text for part, text in OPTIONS.items() if part in name), "give the whole state dict")
            raise UserError(f"{self.prefix}{name}: missing; {why}")
        value = self.state.pop(name)
        if shape and value.shape != shape:
            raise UserError(
                f"{self.prefix}{name}: has shape {list(value.shape)} where {list(shape)} is expected; "
                "only TorchMD_ET and the published QM9 model's norms can be read"
            )
        return value

    def finish(self):
        """Raise UserError for what was not taken."""
        for name in self.state:
            raise UserError(f"{self.prefix}{name}: nothing here takes it; remove it if the model works without it")


def by_head(heads, *parts):
    """Rows of several maps, each ordered by head, as one ordered by head: [H w₁, …], [H w₂, …] -> [H (w₁ + w₂), …]."""
    return torch.cat([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 1)


def convert(state, heads=8, max_neighbours=32, vector_cutoff=False):
    """A state dict of TorchMD-Net's -> TorchMDETSettings, state dict of TorchMDET.

    heads, max_neighbours (its max_num_neighbors) and vector_cutoff: as that model was made; its weights do not tell.
    Nor do they tell that its activations are silu and its lower cut-off is 0, which are taken for granted. Elements
    past its table (max_z) get zeros. Raises UserError for what does not fit.
    """
    weights = Weights(state)
    layers = 0
    while f"attention_layers.{layers}.q_proj.weight" in weights:
        layers += 1
    channels = weights.state["attention_layers.0.q_proj.weight"].shape[0]
    if channels % heads:
        raise UserError(f"{channels} channels are no multiple of {heads} heads; give the heads of that model")
    functions, cutoff = _radial_functions(weights)
    norms = "x_norms.0.weight" in weights

    def rows(theirs, counts, *last):
        """The named projections, so many times F rows each, as one ordered by head."""
        return by_head(heads, *(weights.take(theirs.format(name), n * f, *last) for name, n in counts.items()))

    f, out = channels, {}
    out["embedding.weight"] = _elements(weights, "embedding.weight")
    out["neighbours.embedding.weight"] = _elements(weights, "neighbor_embedding.embedding.weight")
    out["neighbours.filter_weight"] = weights.take("neighbor_embedding.distance_proj.weight", f, functions)
    out["neighbours.filter_bias"] = weights.take("neighbor_embedding.distance_proj.bias", f)
    out["neighbours.combine.weight"] = weights.take("neighbor_embedding.combine.weight", f, 2 * f)
    out["neighbours.combine.bias"] = weights.take("neighbor_embedding.combine.bias", f)
    for index in range(layers):
        theirs, ours = f"attention_layers.{index}.", f"layers.{index}."
        features, gates = {"q": 1, "k": 1, "v": 3}, {"dk": 1, "dv": 3}
        out[f"{ours}qkv.weight"] = rows(theirs + "{}_proj.weight", features, f)
        out[f"{ours}qkv.bias"] = rows(theirs + "{}_proj.bias", features)
        out[f"{ours}gate_weight"] = rows(theirs + "{}_proj.weight", gates, functions)
        out[f"{ours}gate_bias"] = rows(theirs + "{}_proj.bias", gates)
        out[f"{ours}o.weight"] = weights.take(f"{theirs}o_proj.weight", 3 * f, f)
        out[f"{ours}o.bias"] = weights.take(f"{theirs}o_proj.bias", 3 * f)
        out[f"{ours}vectors.weight"] = weights.take(f"{theirs}vec_proj.weight", 3 * f, f)
        for kind in ("weight", "bias"):
            out[f"{ours}norm.{kind}"] = weights.take(f"{theirs}layernorm.{kind}", f)
            if norms:
                out[f"norms.{index}.{kind}"] = weights.take(f"x_norms.{index}.{kind}", f)
        if norms:
            out[f"vector_norms.{index}.weight"] = weights.take(f"vec_norms.{index}.weight", f)
    if norms:
        out[f"vector_norms.{layers}.weight"] = weights.take("out_norm_vec.weight", f)
    for kind in ("weight", "bias"):
        out[f"out_norm.{kind}"] = weights.take(f"out_norm.{kind}", f)
    weights.state.pop("distance.box", None)  # used only where it was given, with periodic boundaries
    weights.finish()
    settings = TorchMDETSettings(
        layers=layers,
        channels=channels,
        heads=heads,
        radial_functions=functions,
        cutoff=cutoff,
        max_neighbours=max_neighbours,
        norm="whitened_published" if norms else "none",
        vector_cutoff=vector_cutoff,
    )
    return settings, out


def _elements(weights, name):
    """An embedding of atomic numbers with our number of rows."""
    table = weights.take(name)
    if len(table) > MAX_NUMBER + 1:
        raise UserError(f"{weights.prefix}{name}: {len(table)} elements, more than the {MAX_NUMBER} there are; cut it")
    return pad(table, (0, 0, 0, MAX_NUMBER + 1 - len(table)))


def _radial_functions(weights):
    """K and the cut-off, read off the first mean e^{−cutoff}. Raises UserError where they are not the fixed ones."""
    means = weights.take("distance_expansion.means").double()
    betas = weights.take("distance_expansion.betas").double()
    cutoff = round(-math.log(means[0]), 3)
    first = math.exp(-cutoff)
    expected = torch.linspace(first, 1, len(means), dtype=torch.float64)
    beta = (2 / len(means) * (1 - first)) ** -2
    for name, values, fixed in (("means", means, expected), ("betas", betas, torch.full_like(betas, beta))):
        if not torch.allclose(values, fixed, rtol=1e-4, atol=1e-6):
            raise UserError(
                f"{weights.prefix}distance_expansion.{name}: not the fixed ones; only models made with trainable_rbf "
                "false can be read"
            )
    return len(means), cutoff
