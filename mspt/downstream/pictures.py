"""Pictures of predicted spectra and of attention, as matplotlib Figures without any global state."""

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from mspt.chemistry.spectra import GRIDS
from mspt.data.batch import MoleculeBatch
from mspt.data.plot import ABSCISSAS, BLUE, GREY, ORANGE, TITLES
from mspt.data.zarr_arrays import open_arrays
from mspt.downstream.spectra import KIND, SCORES

RANKS = ("best", "middling", "worst")


def predictions(molecules, store, found, training, settings):
    """True and predicted spectra of three molecules: those of the highest, the median and the lowest mean score, over
    the spectra that a molecule has.

    molecules: the set. store: of spectra.compare, and found what it gave. training: a spectra.Training.
    settings: DataSettings.
    """
    names = list(found)
    scores = np.array([found[name]["model"][score] for name in names for score in SCORES])
    rated = np.nansum(scores, 0) / np.maximum(1, np.isfinite(scores).sum(0))
    rated[np.isnan(scores).all(0)] = np.nan
    order = np.argsort(-rated)[: np.isfinite(rated).sum()]  # NaN, a molecule without a spectrum, comes last
    if len(order):
        chosen = dict(zip(RANKS, (order[0], order[len(order) // 2], order[-1]), strict=True))
    else:
        chosen = dict.fromkeys(RANKS[:1], 0)
    _, arrays = open_arrays(store, KIND)
    figure = Figure(figsize=(5 * len(names), 3.1 * len(chosen) + 0.5), layout="constrained")
    panels = figure.subplots(len(chosen), len(names), squeeze=False)
    for row, (rank, number) in zip(panels, chosen.items(), strict=True):
        one = next(molecules.records([int(number)]))
        true = MoleculeBatch.from_records([one]).broadened(settings.line_shapes, settings.spectra)
        for axes, name in zip(row, names, strict=True):
            x = GRIDS[name].points().numpy()
            if true.present[name]:
                axes.fill_between(x, true.spectra[name][0].numpy(), color=GREY, alpha=0.45, linewidth=0, label="true")
            axes.plot(
                x, training.mean(name).numpy(), color=ORANGE, linewidth=0.9, linestyle=":", label="mean of training set"
            )
            axes.plot(x, arrays[f"spectra/{name}"][[number]][0], color=BLUE, linewidth=1.2, label="predicted")
            cosine, sis = (found[name]["model"][score][number] for score in ("cosine", "sis"))
            said = f": cosine {cosine:.2f}, SIS {sis:.2f}" if np.isfinite(cosine) else ""
            axes.set_title(f"{rank}, {one.key}, {TITLES[name]}{said}", fontsize=10, parse_math=False)
            axes.set_xlim(x[0], x[-1])
            axes.set_ylim(0)
            axes.set_xlabel(ABSCISSAS[GRIDS[name].unit])
            axes.set_ylabel("intensity, as in training")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def attention(maps):
    """Attention of every layer, the mean over heads, between the patches of all spectra of one molecule.

    maps: of attention.maps. A row is the patch that attends, a column the one attended to; the molecule's spectra lie
    along both axes, the abscissa of each under its own block.
    """
    layers = maps.weights
    figure = Figure(figsize=(6.4 * len(layers) + 0.6, 6.6), layout="constrained")
    figure.suptitle(f"{maps.key}: attention, mean over heads; rows attend to columns", parse_math=False)
    kept = torch.cat([torch.arange(own.start, own.stop) for own in maps.blocks.values()])
    shown = [layer[kept][:, kept].numpy() for layer in layers]
    panels = figure.subfigures(1, len(layers), squeeze=False)[0]
    sizes = [own.stop - own.start for own in maps.blocks.values()]
    for number, (whole, panel) in enumerate(zip(shown, panels, strict=True), 1):
        grid = panel.add_gridspec(2, 2, width_ratios=[1, 7], height_ratios=[1, 7])
        axes = panel.add_subplot(grid[1, 1])
        # Weights range over decades; the same colours for all layers.
        image = axes.imshow(
            whole, cmap="magma", norm=LogNorm(1e-4, 1, clip=True), aspect="auto", interpolation="nearest"
        )
        panel.colorbar(image, ax=axes, extend="min", fraction=0.05)
        above, beside = panel.add_subplot(grid[0, 1], sharex=axes), panel.add_subplot(grid[1, 0], sharey=axes)
        _blocks(axes, above, beside, maps, np.cumsum([0, *sizes]) - 0.5)
        above.set_title(f"layer {number}")
    return figure


def _blocks(axes, above, beside, maps, edges):
    """Mark the blocks of the spectra on a map, and draw the spectra along it; edges: of the blocks, in tokens."""
    ticks, labels = [], []
    for name, start, stop in zip(maps.blocks, edges[:-1], edges[1:], strict=True):
        grid, centres = GRIDS[name], maps.centres[name].numpy()
        places = start + 0.5 + np.arange(len(centres))
        x = np.interp(grid.points().numpy(), centres, places)
        height = np.log10(1 + maps.values[name].numpy())
        height = height / max(height.max(), 1e-12)
        above.fill_between(x, height, color=BLUE, linewidth=0)
        beside.fill_betweenx(x, -height, color=BLUE, linewidth=0)
        above.text((start + stop) / 2, 1.05, TITLES[name], ha="center", va="bottom", fontsize=9)
        for at in np.linspace(grid.start, grid.start + grid.step * (grid.length - 1), 5)[1:-1]:
            ticks.append(np.interp(at, centres, places))
            labels.append(f"{at:.4g}")
    for edge in edges[1:-1]:
        axes.axhline(edge, color="white", linewidth=0.8)
        axes.axvline(edge, color="white", linewidth=0.8)
    axes.set_xticks(ticks, labels, rotation=60, fontsize=7)
    axes.set_xlabel(", ".join(f"{TITLES[name]}: {ABSCISSAS[GRIDS[name].unit]}" for name in maps.blocks), fontsize=8)
    axes.tick_params(labelleft=False)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(edges[-1], edges[0])
    above.set_ylim(0, 1.3)
    for side in (above, beside):
        side.set_axis_off()
