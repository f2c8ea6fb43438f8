"""Pictures of a run, as matplotlib Figures without any global state."""

import math

import numpy as np
from matplotlib.figure import Figure

from mspt.chemistry.spectra import BROADENED, GRIDS
from mspt.data.plot import ABSCISSAS, BLUE, GREY, ORANGE, TITLES

# Term of the loss -> title, ordinate.
SQUARES = "mean square error of log₁₀(1 + intensity)"
TERMS = {
    "loss": ("joint loss", "weighted sum"),
    "coord": ("denoising", "mean square error (σ²)"),
    "se3_ddm": ("distances' scores", "square error a molecule"),
    "emgp": ("forces of the noise", "square error a molecule"),
    "emgp_level": ("noise level", "cross-entropy (nats)"),
    "frad": ("denoising", "mean square error (σ²)"),
    "masked_uv_vis": ("masked UV-Vis", SQUARES),
    "masked_ir": ("masked IR", SQUARES),
    "masked_raman": ("masked Raman", SQUARES),
    "contrast": ("contrast", "InfoNCE (nats)"),
    "property": ("property", "error of the standardised target"),
    "energy": ("energy", "mean square error ((kcal/mol)²)"),
    "forces": ("forces", "mean square error ((kcal/mol/Å)²)"),
    "spectrum_uv_vis": ("predicted UV-Vis", "mean square error over variance"),
    "spectrum_ir": ("predicted IR", "mean square error over variance"),
    "spectrum_raman": ("predicted Raman", "mean square error over variance"),
}


def losses(rows):
    """The joint loss and its terms over steps; rows as metrics.read gives them."""
    names = [name for name in TERMS if any(name in row for row in rows)]
    columns = min(3, max(1, len(names)))
    lines = math.ceil(len(names) / columns) or 1
    figure = Figure(figsize=(4.6 * columns, 3.2 * lines), layout="constrained")
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(lines, columns, place)
        points = [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]
        steps, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(steps, values, color=BLUE, linewidth=1.4, marker="o" if len(points) < 20 else None, markersize=3)
        if points and min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        title, ordinate = TERMS[name]
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylabel(ordinate, fontsize=8)
        axes.grid(alpha=0.3)
    return figure


def reconstructions(examples):
    """True and reconstructed spectra of held-out molecules, the masked patches shaded.

    examples: of evaluation.Example. Patches are put back as the mean over those that cover a point; the masked
    stretches show what the model filled in.
    """
    figure = Figure(figsize=(15, 3.2 * len(examples) + 0.5), layout="constrained")
    panels = figure.subplots(len(examples), len(GRIDS), squeeze=False)
    for row, example in zip(panels, examples, strict=True):
        for axes, (name, grid) in zip(row, GRIDS.items(), strict=True):
            _reconstruction(axes, example, name, grid)
    if examples:
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def _reconstruction(axes, example, name, grid):
    x = grid.points().numpy()
    true, predicted, masked = (part[name].numpy() for part in (example.true, example.predicted, example.masked))
    filled_in = _joined(predicted, masked, grid.length)
    axes.fill_between(
        x,
        0,
        1,
        where=np.isfinite(filled_in),
        transform=axes.get_xaxis_transform(),
        color=ORANGE,
        alpha=0.15,
        linewidth=0,
        label="masked",
    )
    everything = np.ones_like(masked)
    axes.plot(x, _joined(true, everything, grid.length), color=GREY, linewidth=2.4, alpha=0.6, label="true")
    visible = np.where(np.isfinite(filled_in), np.nan, _joined(predicted, everything, grid.length))
    axes.plot(x, visible, color=BLUE, linewidth=0.9, label="model, visible patches")
    axes.plot(x, filled_in, color=ORANGE, linewidth=1.4, label="model, masked patches")
    axes.set_title(f"{example.key}: {TITLES[name]}")
    axes.set_xlabel(ABSCISSAS[grid.unit])
    axes.set_ylabel(f"log₁₀(1 + intensity)\n{BROADENED[name]}", fontsize=9)
    axes.set_xlim(x[0], x[-1])


def _joined(patches, chosen, length):
    """Chosen [N] of overlapping patches [N, P] -> their mean at each of length points; NaN where none lies."""
    stride = (length - patches.shape[1]) // max(1, len(patches) - 1)
    total, count = np.zeros(length), np.zeros(length)
    for index in np.flatnonzero(chosen):
        span = slice(index * stride, index * stride + patches.shape[1])
        total[span] += patches[index]
        count[span] += 1
    return np.divide(total, count, out=np.full(length, np.nan), where=count > 0)


def retrieval(ranks, similarities):
    """Recall at k both ways against chance, and the similarities [k, k] (molecule, spectrum) of the first pairs.

    ranks: of ranking.ranks.
    """
    p = len(ranks["molecule_to_spectrum"])
    ks = np.arange(1, min(p, 100) + 1)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes, picture = figure.subplots(1, 2)
    for name, color, style in (("molecule_to_spectrum", BLUE, "-"), ("spectrum_to_molecule", ORANGE, "-.")):
        own = ranks[name].cpu().numpy()
        axes.plot(ks, [(own <= k).mean() for k in ks], style, color=color, label=name.replace("_to_", " → "))
    axes.plot(ks, ks / p, color=GREY, linestyle=":", label="chance")
    axes.set_xscale("log")
    ticks = [k for k in (1, 2, 5, 10, 20, 50, 100) if k <= p]
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.minorticks_off()
    axes.set_xlabel("k")
    axes.set_ylabel("recall at k")
    axes.set_ylim(0, 1.02)
    axes.set_title(f"retrieval among {p} held-out molecules")
    axes.grid(alpha=0.3)
    axes.legend()
    image = picture.imshow(similarities.cpu().numpy(), cmap="cividis", interpolation="nearest")
    picture.set_xlabel("spectrum")
    picture.set_ylabel("molecule")
    shown = len(similarities)
    picture.set_title("cosine similarity, matches on the diagonal" + (f"; first {shown}" if shown < p else ""))
    figure.colorbar(image, ax=picture)
    return figure
