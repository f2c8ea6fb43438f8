"""A stage-2 training step written plainly, the way the published code does it: the baseline that people run today.

As there: in every layer of the equivariant transformer q, k, v and vectors are gathered into arrays [edges, F], gated
by arrays [edges, 4F] and scattered back; vectors are whitened by an SVD in float64 an atom and layer; the SpecFormer
has batch norm, and attention scores [m, H, T, T] that are kept and added to the next layer's; negatives are those of
the batch, molecule -> spectrum alone; AdamW with its default flags, fp32.

Unlike there: the neighbour search is the framework's and not torch_cluster's, and so is Coord's vector head, both a
small share of the step; no dropout; no running normalisation of the noise, which has mean 0 and variance 1 as drawn.

Parameters of the encoder have TorchMD-Net's names, so that weights can be passed on. Nothing happens when this is run.

Legend: n atoms, e edges, m molecules, F channels, H heads, D = F / H, K radial functions, N patches, T tokens,
d channels of the SpecFormer.
"""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, normalize, silu

from mspt import kernels
from mspt.chemistry.spectra import GRIDS, SPECTRA
from mspt.models.heads import VectorHead


def fade(distance, cutoff):
    """Cosine cut-off."""
    return 0.5 * (torch.cos(distance * math.pi / cutoff) + 1.0) * (distance < cutoff)


class RadialFunctions(nn.Module):
    """distance [e] -> [e, K]."""

    def __init__(self, functions, cutoff):
        super().__init__()
        self.cutoff = cutoff
        first = math.exp(-cutoff)
        self.register_buffer("means", torch.linspace(first, 1, functions))
        self.register_buffer("betas", torch.full((functions,), (2 / functions * (1 - first)) ** -2))

    def forward(self, distance):
        distance = distance[:, None]
        x = torch.exp(-5.0 / self.cutoff * distance) - self.means
        return fade(distance, self.cutoff) * torch.exp(-self.betas * x.square())


class NeighbourEmbedding(nn.Module):
    def __init__(self, channels, functions, cutoff, elements):
        super().__init__()
        self.cutoff = cutoff
        self.embedding = nn.Embedding(elements, channels)
        self.distance_proj = nn.Linear(functions, channels)
        self.combine = nn.Linear(2 * channels, channels)

    def forward(self, numbers, x, source, target, distance, radial):
        others = source != target
        source, target, distance, radial = source[others], target[others], distance[others], radial[others]
        filters = self.distance_proj(radial) * fade(distance, self.cutoff)[:, None]
        messages = self.embedding(numbers)[source] * filters
        return self.combine(torch.cat([x, torch.zeros_like(x).index_add(0, target, messages)], 1))


class Attention(nn.Module):
    def __init__(self, channels, heads, functions, cutoff):
        super().__init__()
        self.heads, self.cutoff = heads, cutoff
        self.layernorm = nn.LayerNorm(channels)
        self.q_proj, self.k_proj = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.v_proj, self.o_proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, 3 * channels)
        self.vec_proj = nn.Linear(channels, 3 * channels, bias=False)
        self.dk_proj, self.dv_proj = nn.Linear(functions, channels), nn.Linear(functions, 3 * channels)

    def forward(self, x, vec, source, target, distance, radial, direction):
        """x [n, F], vec [n, 3, F] -> their changes."""
        n, channels = x.shape
        heads, width = self.heads, channels // self.heads
        x = self.layernorm(x)
        q, k = self.q_proj(x).view(n, heads, width), self.k_proj(x).view(n, heads, width)
        v = self.v_proj(x).view(n, heads, 3 * width)
        u1, u2, u3 = self.vec_proj(vec).chunk(3, dim=-1)
        key_gate = silu(self.dk_proj(radial)).view(-1, heads, width)
        value_gate = silu(self.dv_proj(radial)).view(-1, heads, 3 * width)

        score = silu((q[target] * k[source] * key_gate).sum(-1)) * fade(distance, self.cutoff)[:, None]
        scalar, along, new = (v[source] * value_gate).split(width, dim=2)
        vectors = vec.view(n, 3, heads, width)[source] * along[:, None] + new[:, None] * direction[:, :, None, None]
        scalars = scalar * score[..., None]
        summed = x.new_zeros(n, heads, width).index_add(0, target, scalars).view(n, channels)
        message = x.new_zeros(n, 3, heads, width).index_add(0, target, vectors).view(n, 3, channels)

        o1, o2, o3 = self.o_proj(summed).chunk(3, dim=-1)
        return (u1 * u2).sum(1) * o2 + o3, u3 * o1[:, None] + message


class WhitenedNorm(nn.Module):
    """(V Vᵀ / F + ε diag(1, 2, 3))^{−1/2} V w of centred V [n, 3, F], by a singular value decomposition in float64."""

    epsilon = 1e-5

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, vec):
        wide = vec.double()
        wide = wide - wide.mean(-1, keepdim=True)
        regular = self.epsilon * torch.diag(torch.arange(1.0, 4.0, dtype=torch.float64, device=vec.device))
        left, values, right = torch.linalg.svd(wide @ wide.mT / vec.shape[-1] + regular)
        return (left * values.rsqrt()[:, None] @ right @ wide).to(vec.dtype) * self.weight


class EquivariantTransformer(nn.Module):
    """numbers [n], positions [n, 3] Å, ptr [m + 1] -> scalars [n, F], vectors [n, 3, F]."""

    def __init__(self, layers=8, channels=256, heads=8, functions=64, cutoff=5.0, neighbours=32, elements=100):
        super().__init__()
        self.cutoff, self.neighbours = cutoff, neighbours
        self.embedding = nn.Embedding(elements, channels)
        self.distance_expansion = RadialFunctions(functions, cutoff)
        self.neighbor_embedding = NeighbourEmbedding(channels, functions, cutoff, elements)
        self.attention_layers = nn.ModuleList(Attention(channels, heads, functions, cutoff) for _ in range(layers))
        self.x_norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(layers))
        self.vec_norms = nn.ModuleList(WhitenedNorm(channels) for _ in range(layers))
        self.out_norm, self.out_norm_vec = nn.LayerNorm(channels), WhitenedNorm(channels)
        for name, parameter in self.named_parameters():
            if name.endswith(("_proj.weight", "combine.weight")):
                nn.init.xavier_uniform_(parameter)
            if name.endswith(("_proj.bias", "combine.bias")):
                nn.init.zeros_(parameter)

    def forward(self, numbers, positions, ptr):
        graph = kernels.radius_graph(positions, ptr, self.cutoff, self.neighbours, loop=True)
        source, target = graph.source, graph.target
        direction = positions[source] - positions[target]
        others = source != target
        distance = torch.zeros_like(direction[:, 0])
        distance[others] = direction[others].norm(dim=1)
        direction[others] = direction[others] / distance[others][:, None]
        radial = self.distance_expansion(distance)
        x = self.neighbor_embedding(numbers, self.embedding(numbers), source, target, distance, radial)
        vec = x.new_zeros(len(x), 3, x.shape[1])
        for attention, norm, vec_norm in zip(self.attention_layers, self.x_norms, self.vec_norms, strict=True):
            dx, dvec = attention(x, vec, source, target, distance, radial, direction)
            x, vec = norm(x + dx), vec_norm(vec + dvec)
        return self.out_norm(x), self.out_norm_vec(vec)


class TokenBatchNorm(nn.BatchNorm1d):
    """x [m, T, d], over molecules and tokens."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class SpectrumLayer(nn.Module):
    def __init__(self, d, heads, feed_forward):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, feed_forward), nn.Linear(feed_forward, d)
        self.attention_norm, self.feed_norm = TokenBatchNorm(d), TokenBatchNorm(d)

    def forward(self, x, scores):
        """x [m, T, d], scores [m, H, T, T] of the layer before, or None -> x, this layer's scores."""
        m, t, d = x.shape
        q, k, v = (linear(x).view(m, t, self.heads, -1).transpose(1, 2) for linear in (self.q, self.k, self.v))
        own = q @ k.mT * (d // self.heads) ** -0.5
        scores = own if scores is None else own + scores
        attended = scores.softmax(-1) @ v
        x = self.attention_norm(x + self.out(attended.transpose(1, 2).reshape(m, t, d)))
        return self.feed_norm(x + self.down(gelu(self.up(x)))), scores


WINDOWS = {"uv_vis": (20, 10), "ir": (50, 25), "raman": (50, 25)}  # length P and stride of a spectrum's patches


class SpecFormer(nn.Module):
    """patches (name -> [m, N, P]) -> predicted patches (the same), readout [m, width]."""

    def __init__(self, width, layers=3, d=128, heads=16, feed_forward=256):
        super().__init__()
        self.counts = [(GRIDS[name].length - length) // stride + 1 for name, (length, stride) in WINDOWS.items()]
        self.embed = nn.ModuleDict({name: nn.Linear(length, d) for name, (length, _) in WINDOWS.items()})
        self.positions = nn.Parameter(0.02 * torch.randn(sum(self.counts), d))
        self.layers = nn.ModuleList(SpectrumLayer(d, heads, feed_forward) for _ in range(layers))
        self.readout, self.readout_norm = nn.Linear(sum(self.counts) * d, width), nn.LayerNorm(width)
        self.predict = nn.ModuleDict({name: nn.Linear(d, length) for name, (length, _) in WINDOWS.items()})

    def patches(self, spectra):
        """name -> [m, L] -> patches of log10(1 + y), name -> [m, N, P]."""
        return {name: torch.log10(1 + spectra[name]).unfold(1, *window) for name, window in WINDOWS.items()}

    def forward(self, patches):
        x = torch.cat([self.embed[name](patches[name]) for name in WINDOWS], 1) + self.positions
        scores = None
        for layer in self.layers:
            x, scores = layer(x, scores)
        tokens = zip(WINDOWS, x.split(self.counts, dim=1), strict=True)
        return {name: self.predict[name](part) for name, part in tokens}, self.readout_norm(self.readout(x.flatten(1)))


class Pretraining(nn.Module):
    """Encoder, SpecFormer and the three objectives, over molecules that have all spectra. sigma: of the noise, Å."""

    def __init__(self, channels=256, sigma=0.04, ratio=0.1, temperature=0.07, **encoder):
        super().__init__()
        self.sigma, self.ratio, self.temperature = sigma, ratio, temperature
        self.encoder = EquivariantTransformer(channels=channels, **encoder)
        self.specformer = SpecFormer(channels)
        self.head = VectorHead(channels)

    def draw(self, batch):
        """Noise [n, 3] and masks (name -> bool [m, N]) for a step."""
        masks = {}
        for name, count in zip(SPECTRA, self.specformer.counts, strict=True):
            draws = torch.rand(len(batch.keys), count, device=batch.positions.device)
            chosen = draws.argsort(1)[:, : round(self.ratio * count)]
            masks[name] = torch.zeros_like(draws, dtype=torch.bool).scatter(1, chosen, True)
        return torch.randn_like(batch.positions), masks

    def terms(self, batch, noise, masks):
        """The terms of the loss: coord, masked_ and a spectrum's name, contrast."""
        x, vec = self.encoder(batch.numbers, batch.positions + self.sigma * noise, batch.ptr)
        terms = {"coord": (self.head(x, vec) - noise).square().mean()}
        patches = self.specformer.patches(batch.spectra)
        hidden = {name: part.masked_fill(masks[name][..., None], 0.0) for name, part in patches.items()}
        predicted, readout = self.specformer(hidden)
        for name in SPECTRA:
            error = (predicted[name] - patches[name]).square().mean(-1)
            terms[f"masked_{name}"] = (error * masks[name]).sum() / masks[name].sum()
        molecules = x.new_zeros(len(batch.keys), x.shape[1]).index_add(0, batch.molecule, x)
        similarity = normalize(molecules, dim=-1) @ normalize(readout, dim=-1).T / self.temperature
        terms["contrast"] = cross_entropy(similarity, torch.arange(len(similarity), device=x.device))
        return terms

    def step(self, batch, optimiser):
        """One update."""
        loss = sum(self.terms(batch, *self.draw(batch)).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
