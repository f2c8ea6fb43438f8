"""SpecFormer: one transformer over the patches of all spectra of a molecule (MolSpectra, ICLR 2025).

Legend: m molecules, N patches of a spectrum, P points a patch, T tokens of all spectra, d channels, H heads.
"""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn.functional import gelu

from mspt import kernels
from mspt.chemistry.spectra import GRIDS, SPECTRA
from mspt.kernels import reference
from mspt.models.layers import Linear
from mspt.settings import Settings


class Patching(Settings):
    """length P and stride D of the windows over a spectrum, in grid points."""

    length: int = Field(ge=1)
    stride: int = Field(ge=1)

    def count(self, points):
        """N = floor((L − P) / D) + 1."""
        return (points - self.length) // self.stride + 1


PUBLISHED_PATCHES = {
    "uv_vis": Patching(length=20, stride=10),
    "ir": Patching(length=50, stride=25),
    "raman": Patching(length=50, stride=25),
}


class SpecFormerSettings(Settings):
    """norm: `layer`, or `batch` over the tokens of a micro-batch as in the public code; the latter makes a molecule's
    result depend on its company."""

    layers: int = Field(3, ge=1)
    channels: int = Field(128, ge=1)
    heads: int = Field(16, ge=1)
    feed_forward: int = Field(256, ge=1)
    norm: Literal["layer", "batch"] = "layer"
    patches: dict[Literal["uv_vis", "ir", "raman"], Patching] = PUBLISHED_PATCHES

    @model_validator(mode="after")
    def _fits(self):
        if self.channels % self.heads or self.channels % 2:
            raise ValueError(f"channels ({self.channels}) must be even and a multiple of heads ({self.heads})")
        for name in SPECTRA:
            if name not in self.patches:
                raise ValueError(f"patches lacks {name}; give its length and stride")
            if self.patches[name].length > GRIDS[name].length:
                raise ValueError(f"patches.{name}.length is longer than the grid of {GRIDS[name].length} points")
        return self


class SpecFormer(nn.Module):
    """width: of the readout, the encoder's channels F."""

    def __init__(self, settings, width):
        super().__init__()
        self.settings = settings
        self.patch_counts = {name: settings.patches[name].count(GRIDS[name].length) for name in SPECTRA}
        d = settings.channels
        self.embed = nn.ModuleDict({name: nn.Linear(settings.patches[name].length, d) for name in SPECTRA})
        tokens = sum(self.patch_counts.values())
        self.positions = nn.Parameter(waves(tokens, d))  # of all spectra, end to end
        self.layers = nn.ModuleList(Layer(settings) for _ in range(settings.layers))
        self.readout = nn.Linear(tokens * d, width)
        self.readout_norm = nn.LayerNorm(width)
        self.predict = nn.ModuleDict({name: nn.Linear(d, settings.patches[name].length) for name in SPECTRA})
        self._initialise()

    def _initialise(self):
        """Initial values from which reading a masked patch off its neighbours is soon learnt.

        Positions are waves, and half of the heads look one patch back, half one ahead: keys see a position turned by
        one patch. Patches are small numbers, so their embedding starts larger than is usual, the prediction near zero.
        """
        for layer in self.layers:
            layer.look_beside()
        for name in SPECTRA:
            for linear, deviation in ((self.embed[name], 0.2), (self.predict[name], 0.02)):
                nn.init.normal_(linear.weight, std=deviation)
                nn.init.zeros_(linear.bias)

    def unfold(self, name, values):
        """Windows over values [m, L] of a spectrum -> [m, N, P]."""
        patching = self.settings.patches[name]
        return values.unfold(1, patching.length, patching.stride)

    def centres(self, name):
        """Where the middles of a spectrum's patches lie, [N] in the grid's unit."""
        points = GRIDS[name].points(dtype=torch.float64)
        return self.unfold(name, points[None])[0].mean(1)

    def patches(self, spectra):
        """Spectra (name -> [m, L], non-negative) -> patches of log10(1 + y) (name -> [m, N, P])."""
        return {name: self.unfold(name, torch.log1p(spectra[name]) / math.log(10)) for name in SPECTRA}

    def hidden_points(self, name, masked):
        """Which points of all windows lie in a masked patch: masked bool [m, N] -> bool [m, N, P]."""
        patching = self.settings.patches[name]
        points = torch.zeros(len(masked), GRIDS[name].length, dtype=torch.bool, device=masked.device)
        starts = patching.stride * torch.arange(masked.shape[1], device=masked.device)
        window = (starts[:, None] + torch.arange(patching.length, device=masked.device)).flatten()
        inside = masked.repeat_interleave(patching.length, dim=1)
        points = points.int().index_add(1, window, inside.int()) > 0
        return self.unfold(name, points)

    def forward(self, patches, present):
        """patches (name -> [m, N, P]), present (name -> bool [m]) -> tokens (name -> [m, N, d]), readout [m, width].

        The rows of a spectrum that a molecule lacks are ignored, whatever they hold: its tokens are zeros that no
        token attends to. A molecule without any spectrum has a readout of zeros.
        """
        x, mask, _, _ = self._encode(patches, present)
        tokens = dict(zip(SPECTRA, x.split(list(self.patch_counts.values()), dim=1), strict=True))
        readout = self.readout_norm(self.readout(x.flatten(1)))
        return tokens, readout if mask is None else torch.where(mask.any(1)[:, None], readout, 0.0)

    def attention(self, patches, present):
        """The attention weights of every layer, [m, H, T, T] each; arguments as of forward. To be looked at.

        Rows are the tokens that attend, of all spectra end to end. Nobody attends to the tokens of a spectrum that is
        not there; what theirs attend to means nothing.
        """
        _, mask, queries, keys = self._encode(patches, present)
        ends = range(1, len(self.layers) + 1)
        return [reference.carried_score_weights(queries[:end], keys[:end], mask) for end in ends]

    def _encode(self, patches, present):
        """All tokens [m, T, d], which of them are there (bool [m, T]; None: all), queries and keys of every layer."""
        masks = [present[name][:, None].expand(-1, self.patch_counts[name]) for name in SPECTRA]
        mask = torch.cat(masks, 1)
        if mask.all():  # no mask is faster
            masks, mask = [None] * len(SPECTRA), None
        parts = [
            self.embed[name](only(own, patches[name]).to(self.positions.dtype))
            for name, own in zip(SPECTRA, masks, strict=True)
        ]
        x = only(mask, torch.cat(parts, 1) + self.positions)
        queries, keys = [], []
        for layer in self.layers:
            x, queries, keys = layer(x, queries, keys, mask)
        return only(mask, x), mask, queries, keys

    def reconstruct(self, tokens):
        """Tokens (name -> [m, N, d]) -> predicted patches (name -> [m, N, P])."""
        return {name: self.predict[name](tokens[name]) for name in SPECTRA}


def only(mask, x):
    """x [m, N, d], with zeros where mask bool [m, N] is false; without a mask x itself."""
    return x if mask is None else torch.where(mask[..., None], x, 0.0)


def frequencies(d):
    """Of waves over patches, [d / 2] in radians a patch: from one that tells neighbours apart to one of 126 patches."""
    return 1.5 * 30.0 ** -torch.arange(0, 1, 2 / d)


def waves(tokens, d):
    """Sines and cosines of the token's number, [tokens, d]."""
    angle = torch.arange(tokens)[:, None] * frequencies(d)
    return torch.cat([torch.sin(angle), torch.cos(angle)], 1)


def turned(d, patches):
    """The matrix [d, d] that takes the waves of token t to those of token t − patches."""
    angle = frequencies(d) * patches
    cos, sin = torch.diag(torch.cos(angle)), torch.diag(torch.sin(angle))
    return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])


class Layer(nn.Module):
    """Post-norm transformer layer whose attention scores add to those of the layers before."""

    def __init__(self, settings):
        super().__init__()
        d = settings.channels
        self.heads = settings.heads
        self.qkv = Linear(d, 3 * d, heads=3)
        self.out = Linear(d, d)
        self.up = Linear(d, settings.feed_forward)
        self.down = Linear(settings.feed_forward, d)
        norm = TokenLayerNorm if settings.norm == "layer" else TokenBatchNorm
        self.attention_norm, self.feed_norm = norm(d), norm(d)

    @torch.no_grad()
    def look_beside(self):
        """Start with heads that attend to the token before (even ones) or after (odd ones) their own."""
        d = self.qkv.in_features
        q, k, _ = self.qkv.weight.view(3, self.heads, d // self.heads, d)
        for head in range(self.heads):
            # Scores of the order of 10 between tokens that match: sharp, and not yet saturated.
            q[head] = 3.0 / math.sqrt(d) * torch.randn(d // self.heads, d)
            k[head] = q[head] @ turned(d, 1 if head % 2 else -1)
        nn.init.zeros_(self.qkv.bias)

    def forward(self, x, queries, keys, mask):
        """x [m, T, d]; queries and keys: lists of the layers before; mask bool [m, T] of the tokens that are there,
        None where all are -> x, and the lists with this layer's at the end. (ZeRO 3 hands a module copies of lists.)
        """
        m, t, d = x.shape
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).unbind(2))
        queries, keys = [*queries, q], [*keys, k]
        attended = kernels.carried_score_attention(queries, keys, v, mask)
        x = self.attention_norm(x + self.out(attended.view(m, t, d)), mask)
        return self.feed_norm(x + self.down(gelu(self.up(x))), mask), queries, keys


class TokenLayerNorm(nn.LayerNorm):
    """Layer norm of every token by itself, whether it is there or not: x [m, T, d], mask bool [m, T] or None."""

    def forward(self, x, mask):
        return super().forward(x)


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm over the tokens of a micro-batch that are there: x [m, T, d], mask bool [m, T] or None."""

    def forward(self, x, mask):
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        there = x[mask]
        if not len(there):
            return x * self.weight + self.bias  # nothing to take statistics of
        return torch.zeros_like(x).masked_scatter(mask[..., None], super().forward(there))
