"""Floating-point operations of a training step, and the rate at which this machine multiplies matrices.

Their ratio over time is the model FLOPs utilisation: the share of the machine's products that the model gets. Counted
are multiply-adds, two operations each, of the forward pass and twice those again for the backward pass; as many as the
equations need, so that work done over to save memory does not count as use. Left out is what is below a few per cent:
norms, activations, the neighbour embedding's sums, and what does not grow with the batch (tables of gates).

Legend: m molecules, n atoms, e edges, F channels of the encoder, d channels of the SpecFormer, T tokens.
"""

import time

import torch

from mspt import kernels
from mspt.chemistry.spectra import GRIDS

# Side of the square matrices whose product is timed: large enough for the full rate, over in milliseconds.
SIDE = {"cpu": 1024, "cuda": 8192}


def torchmd_et(settings):
    """Multiply-adds of the forward pass: per atom, per edge.

    An atom and layer: 17 F² for query, key, values, output and the map of the vectors; the first layer, whose vectors
    are zero, does without 9 F² of them. 2 F² for the neighbour embedding. An edge and layer: 20 F, of them 8 to
    interpolate four gates (once for both directions), 2 for the score, 10 for the sums.
    """
    channels, layers = settings.channels, settings.layers
    return (17 * layers - 9 + 2) * channels**2, layers * 20 * channels


def egnn(settings):
    """Multiply-adds of the forward pass: per atom, per edge.

    An atom and layer: 2 F² for its parts of the messages' first map, 3 F² for the update; 2 F² at the end. An edge and
    layer: F² for the second map, 4 F for distance, gate and sum; for vectors 2 F² and 3 F at the end.
    """
    channels, layers = settings.channels, settings.layers
    per_edge = layers * (channels**2 + 4 * channels) + settings.vectors * (2 * channels**2 + 3 * channels)
    return (5 * layers + 2) * channels**2, per_edge


def painn(settings):
    """Multiply-adds of the forward pass: per atom, per edge.

    An atom and layer: 4 F² for what it sends, 6 F² for the maps of the vectors, 5 F² for the scales of the update. An
    edge and layer: 1.5 K F for the filters (once for both directions), 3 F for their products, 7 F for the sums, of
    which the first layer, whose vectors are zero, does without 3 F.
    """
    channels, layers = settings.channels, settings.layers
    per_edge = layers * (3 * settings.radial_functions // 2 + 10) * channels - 3 * channels
    return 15 * layers * channels**2, per_edge


def transformer_m(settings):
    """Multiply-adds of the forward pass: per atom, per ordered pair of atoms; neither padding nor the token counts.

    An atom and layer: 4 F² for the attention's maps and 2 F times the inner width; 3 F² for the head, K F for the sum
    of its K functions. A pair: K² + K H for its bias; 2 F a layer for score and value, 4 F for the head.
    """
    channels, layers, functions = settings.channels, settings.layers, settings.gaussians
    per_atom = layers * (4 * channels**2 + 2 * channels * settings.feed_forward) + 3 * channels**2
    return per_atom + functions * channels, functions * (functions + settings.heads) + (2 * layers + 4) * channels


# SphereNet's triplets are not counted: a run of it does not say its utilisation.
ENCODERS = {"torchmd_et": torchmd_et, "egnn": egnn, "painn": painn, "transformer_m": transformer_m}


def specformer(settings, width):
    """Multiply-adds of the forward pass per molecule with all spectra; width: of the readout."""
    d = settings.channels
    counts = {name: patching.count(GRIDS[name].length) for name, patching in settings.patches.items()}
    tokens = sum(counts.values())
    layer = tokens * (4 * d**2 + 2 * d * settings.feed_forward) + 2 * tokens**2 * d
    patches = 2 * d * sum(counts[name] * patching.length for name, patching in settings.patches.items())
    return settings.layers * layer + patches + tokens * d * width


def vector_head(channels):
    """Multiply-adds of the forward pass per atom: two gated blocks, F -> F / 2 -> 1."""

    def block(inputs, outputs):
        return 3 * inputs**2 + 3 * inputs * outputs + 2 * inputs**2 + 2 * inputs * outputs

    return block(channels, channels // 2) + block(channels // 2, 1)


def spectrum_heads(settings, channels):
    """Multiply-adds of the forward pass per molecule with all the spectra that are predicted."""
    points = sum(GRIDS[name].length for name in settings.spectra)
    return len(settings.spectra) * (channels + settings.hidden) * settings.hidden + settings.hidden * points


def pair_scores(channels, molecules, atoms):
    """Multiply-adds of SE(3)-DDM's two heads over all pairs of atoms, of molecules of one size."""
    pairs = atoms * (atoms / max(molecules, 1) - 1) / 2
    return 2 * pairs * (2 * channels + channels * (channels + 1) + channels * channels // 2)


def training_step(model, objectives, molecules, atoms, edges):
    """Floating-point operations of a training step over m molecules with n atoms and e edges, as `edges` counts them.

    model: NetworkSettings, objectives: ObjectivesSettings, the encoder one of ENCODERS.
    """
    per_atom, per_edge = ENCODERS[model.encoder.name](model.encoder)
    passes, heads, channels = 1, 0, model.encoder.channels
    vectors = [objectives.coord, objectives.frad, objectives.property, objectives.forces]
    heads += sum(each is not None for each in vectors) * atoms * vector_head(channels)
    if objectives.se3_ddm is not None:
        passes, heads = 2, heads + pair_scores(channels, molecules, atoms)
    if objectives.emgp is not None or objectives.forces is not None:
        # Of EMGP's two structures the noisy one counts twice: forward, the gradient to its positions, and backward
        # through both. Forces are a backward pass of their own, and training goes back through it as well.
        passes = 3
    per_molecule = specformer(model.specformer, model.encoder.channels) if model.specformer is not None else 0
    if objectives.spectrum_prediction is not None:
        per_molecule += spectrum_heads(objectives.spectrum_prediction, channels)
    return 2 * 3 * (molecules * per_molecule + passes * (atoms * per_atom + edges * per_edge) + heads)


def edges(batch, settings):
    """The number of edges of a MoleculeBatch for an encoder; the equivariant transformer's self-loops among them."""
    if settings.cutoff is None:
        sizes = batch.ptr.diff()
        return int((sizes * (sizes - 1)).sum())
    loop = settings.name == "torchmd_et"
    graph = kernels.radius_graph(batch.positions, batch.ptr, settings.cutoff, settings.max_neighbours, loop=loop)
    return len(graph.source)


def matmul_rate(device, dtype):
    """Floating-point operations a second of a large matrix product on a device, the best of a few."""
    device = torch.device(device)
    side = SIDE[device.type]
    # Of its own: a run's random state must not depend on what is measured.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        product = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    del left, right, product
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # a run's peak is not this
    return 2 * side**3 / min(times)


class Utilisation:
    """The share of the machine's matrix products that a run gets, the machine being world_size times this rank's.

    Edges are not counted at every step: the first micro-batch's number an atom stands for all.
    """

    def __init__(self, config, process):
        self.model, self.objectives = config.model, config.objectives
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        self.rate = process.world_size * matmul_rate(process.device, dtype)
        self.edges_per_atom = None

    def observe(self, batch):
        """Take the number of edges from a MoleculeBatch, if there is none yet."""
        encoder = self.model.encoder
        if self.edges_per_atom is None and len(batch.numbers) and encoder.name in ENCODERS:
            self.edges_per_atom = edges(batch, encoder) / len(batch.numbers)

    def share(self, molecules, atoms, seconds):
        """Of so many molecules and atoms over all ranks in these seconds; None where it is not known."""
        if self.edges_per_atom is None:
            return None
        counted = training_step(self.model, self.objectives, molecules, atoms, self.edges_per_atom * atoms)
        return counted / (seconds * self.rate)
