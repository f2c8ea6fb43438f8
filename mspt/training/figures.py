"""Pictures of a run, as matplotlib Figures without any global state."""

import io

import numpy as np
from matplotlib.figure import Figure

from mspt import files
from mspt.chemistry.spectra import GRIDS

# Okabe & Ito's colours, told apart with any colour vision.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7F7F7F"
LABELS = {
    "uv_vis": ("UV-Vis", "energy (eV)"),
    "ir": ("IR", "wavenumber (cm⁻¹)"),
    "raman": ("Raman", "wavenumber (cm⁻¹)"),
}
TERMS = {
    "loss": "joint loss",
    "coord": "denoising",
    "masked_uv_vis": "masked UV-Vis",
    "masked_ir": "masked IR",
    "masked_raman": "masked Raman",
    "contrast": "contrast",
}


def losses(rows):
    """The joint loss and its terms over steps; rows as metrics.read gives them."""
    names = [name for name in TERMS if rows and name in rows[-1]]
    columns = min(3, max(1, len(names)))
    lines = -(-len(names) // columns) or 1
    figure = Figure(figsize=(4.2 * columns, 3.0 * lines), layout="constrained")
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(lines, columns, place)
        steps = [row["step"] for row in rows if name in row]
        values = [row[name] for row in rows if name in row]
        axes.plot(steps, values, color=BLUE, linewidth=1.4)
        if min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        axes.set_title(TERMS[name])
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    return figure


def reconstructions(examples):
    """True and reconstructed spectra of held-out molecules, the masked patches shaded.

    examples: of evaluation.Example. Patches are put back as the mean over the windows that cover a point; the masked
    stretches show what the model filled in.
    """
    figure = Figure(figsize=(15, 3.0 * len(examples)), layout="constrained")
    for row, example in enumerate(examples):
        for column, (name, grid) in enumerate(GRIDS.items()):
            axes = figure.add_subplot(len(examples), len(GRIDS), row * len(GRIDS) + column + 1)
            x = grid.points().numpy()
            true, masked = example.true[name].numpy(), example.masked[name].numpy()
            stride = (grid.length - true.shape[1]) // max(1, true.shape[0] - 1)
            axes.plot(x, _joined(true, stride, grid.length), color=GREY, linewidth=2.2, label="true")
            axes.plot(
                x, _joined(example.predicted[name].numpy(), stride, grid.length), color=BLUE, linewidth=0.9,
                label="model, all patches",
            )
            for number, patch in enumerate(np.flatnonzero(masked)):
                span = slice(patch * stride, patch * stride + true.shape[1])
                axes.axvspan(x[span][0], x[span][-1], color=ORANGE, alpha=0.15, label=None if number else "masked")
                axes.plot(
                    x[span], example.predicted[name][patch].numpy(), color=ORANGE, linewidth=1.4,
                    label=None if number else "model, masked patch",
                )
            title, label = LABELS[name]
            axes.set_title(f"{example.key}: {title}" if column == 0 else title)
            axes.set_xlabel(label)
            axes.set_ylabel("log₁₀(1 + intensity)")
            axes.set_xlim(x[0], x[-1])
            if row == 0 and column == 0:
                axes.legend(fontsize=8)
    return figure


def _joined(patches, stride, length):
    """Overlapping patches [N, P] -> the mean over them at each of length points; NaN where none lies."""
    total, count = np.zeros(length), np.zeros(length)
    for index, patch in enumerate(patches):
        span = slice(index * stride, index * stride + len(patch))
        total[span] += patch
        count[span] += 1
    return np.divide(total, count, out=np.full(length, np.nan), where=count > 0)


def retrieval(similarities):
    """Recall at k both ways against chance, and the similarities themselves [p, p] (molecule, spectrum)."""
    matrix = similarities.numpy()
    p = len(matrix)
    ks = np.arange(1, min(p, 50) + 1)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.add_subplot(1, 2, 1)
    for name, values, color in (
        ("molecule → spectrum", matrix, BLUE),
        ("spectrum → molecule", matrix.T, ORANGE),
    ):
        ranks = (values >= np.diag(values)[:, None]).sum(1)
        axes.plot(ks, [(ranks <= k).mean() for k in ks], color=color, label=name)
    axes.plot(ks, ks / p, color=GREY, linestyle="--", label="chance")
    axes.set_xlabel("k")
    axes.set_ylabel("share of matches among the first k")
    axes.set_ylim(0, 1)
    axes.set_title(f"retrieval among {p} held-out molecules")
    axes.grid(alpha=0.3)
    axes.legend()
    axes = figure.add_subplot(1, 2, 2)
    image = axes.imshow(matrix, cmap="cividis", interpolation="nearest")
    axes.set_xlabel("spectrum")
    axes.set_ylabel("molecule")
    axes.set_title("cosine similarity; matches on the diagonal")
    figure.colorbar(image, ax=axes)
    return figure


def save(figure, path):
    """Write a Figure as PNG, whole or not at all."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    files.write(path, data.getvalue())
