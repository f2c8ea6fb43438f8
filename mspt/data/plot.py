"""Pictures of a shard set and of one of its records, as matplotlib Figures without any global state."""

import io
import math

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon

from mspt import files
from mspt.chemistry.elements import COVALENT_RADII, NUMBERS, SYMBOLS
from mspt.chemistry.spectra import GRIDS, LINE_SHAPES, STRENGTHS
from mspt.data import look
from mspt.data.batch import MoleculeBatch
from mspt.data.schema import Lines
from mspt.errors import UserError

# Okabe & Ito's colours, told apart with any colour vision.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#7F7F7F"
TITLES = {"uv_vis": "UV-Vis", "ir": "IR", "raman": "Raman"}
ABSCISSAS = {"eV": "energy (eV)", "cm^-1": "wavenumber (cm⁻¹)"}
# Colours of elements as chemists know them, after Corey, Pauling and Koltun; all others are OTHER.
COLOURS = {
    "H": "#F2F2F2", "B": "#FFB5B5", "C": "#555555", "N": "#3050F8", "O": "#E8200D", "F": "#90E050", "Na": "#AB5CF2",
    "Mg": "#8AFF00", "Si": "#F0C8A0", "P": "#FF8000", "S": "#E6C82C", "Cl": "#1FD01F", "Fe": "#E06633",
    "Zn": "#7D80B0", "Br": "#A62929", "I": "#940094",
}  # fmt: skip
OTHER = "#E07FC0"
# Without a list of bonds, a bond is a distance below this multiple of the sum of covalent radii.
BOND = 1.25
# A ball's radius over its covalent radius; half the width of a stick, Å.
BALL, STICK = 0.5, 0.08
# Code of Record.bond_types -> the sticks that show it, their widths over STICK, and how far apart they are, Å.
STICKS = {1: (1.0,), 2: (0.7, 0.7), 3: (0.6, 0.6, 0.6), 4: (0.9, 0.35)}
APART = 0.19
# With more atoms than this, symbols hide what they name.
MOST_SYMBOLS = 60
MOST_ELEMENTS, MOST_TARGETS = 20, 24


def record(shardset, number):
    """One record of a set: its molecule as balls and sticks, and its three spectra."""
    one = next(shardset.records([number]))
    figure = Figure(figsize=(11.5, 6.6), layout="constrained")
    grid = figure.add_gridspec(len(GRIDS), 2, width_ratios=[1, 1.2])
    _molecule(figure.add_subplot(grid[:, 0]), one)
    values = MoleculeBatch.from_records([one]).broadened(LINE_SHAPES).spectra
    for place, name in enumerate(GRIDS):
        _spectrum(figure.add_subplot(grid[place, 1]), shardset, one, name, values[name][0].numpy())
    return figure


def _molecule(axes, one):
    """Draw a Record's molecule from the side that shows most of it; what is nearer hides what is behind it."""
    radii = BALL * np.array(COVALENT_RADII)[one.numbers]
    place = _turned(one.positions.astype(float))
    depth = place[:, 2]
    # Far atoms fade, less where the molecule is flat.
    fog = 0.35 * (depth.max() - depth) / max(np.ptp(depth), 4.0)
    plain = np.array([to_rgb(COLOURS.get(SYMBOLS[z], OTHER)) for z in one.numbers])
    colours = plain + fog[:, None] * (1 - plain)
    known = one.bonds is not None
    for i, j, kind in zip(*one.bonds.T, one.bond_types, strict=True) if known else _near(one):
        for start, end in ((i, j), (j, i)):
            _half_bond(axes, place[start], place[end], radii[start], colours[start], STICKS.get(int(kind), (1.0,)))
    for i, z in enumerate(one.numbers):
        _ball(axes, place[i], radii[i], colours[i], SYMBOLS[z] if z > 1 and len(place) <= MOST_SYMBOLS else "")
    _frame(axes, place, radii.max())
    shown = np.unique(one.numbers)
    handles = [
        axes.scatter([], [], s=90, color=COLOURS.get(SYMBOLS[z], OTHER), edgecolors="#222222", label=SYMBOLS[z])
        for z in shown
    ]
    axes.legend(
        handles=handles,
        title=None if known else "bonds by distance",
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=min(len(shown), 6),
        frameon=False,
        handletextpad=0.1,
    )
    charge = f", charge {one.charge:+d}" if one.charge else ""
    smiles = one.smiles if len(one.smiles) <= 44 else f"{one.smiles[:43]}…"
    formula = look.formula(one.numbers).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))
    axes.set_title(f"{one.key}: {formula}{charge}\n{smiles}", parse_math=False)


def _turned(positions):
    """Positions [n, 3] turned (never mirrored): the widest direction along x, the thinnest near the line of sight."""
    centred = positions - positions.mean(0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, ::-1]
    axes[:, 2] *= np.sign(np.linalg.det(axes))
    # A little aslant: bonds along the line of sight come out from behind each other.
    a, b = math.radians(20), math.radians(12)
    about_x = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    about_y = np.array([[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]])
    return centred @ axes @ about_x @ about_y


def _near(one):
    """Bonds of a Record that has no list of them: yields (i, j, 1) of atoms that are near each other."""
    radii, positions = np.array(COVALENT_RADII)[one.numbers], one.positions
    for i in range(len(radii) - 1):
        distances = np.linalg.norm(positions[i + 1 :] - positions[i], axis=1)
        for j in np.flatnonzero(distances < BOND * (radii[i] + radii[i + 1 :])):
            yield i, i + 1 + int(j), 1


def _half_bond(axes, start, end, radius, colour, widths):
    """From the ball at start to the middle: sticks side by side, in the ball's colour."""
    along = (end - start) / np.linalg.norm(end - start)
    begin, middle = start + 0.96 * radius * along, (start + end) / 2
    across = np.array([-along[1], along[0]]) / max(1e-9, math.hypot(along[0], along[1]))
    # To the same side from both ends, towards the molecule's centre: of an aromatic bond the thin stick lies there.
    across *= -1 if across @ middle[:2] > 0 else 1
    for place, width in enumerate(widths):
        shift = (place - (len(widths) - 1) / 2) * APART * across
        side = STICK * width * across
        corners = [begin[:2] - side, middle[:2] - side, middle[:2] + side, begin[:2] + side]
        nearness = (begin[2] + middle[2]) / 2
        axes.add_patch(
            Polygon(np.array(corners) + shift, facecolor=colour, edgecolor="#222222", linewidth=0.5, zorder=nearness)
        )


def _ball(axes, centre, radius, colour, symbol):
    x, y, nearness = centre
    axes.add_patch(Circle((x, y), radius, facecolor=colour, edgecolor="#222222", linewidth=0.8, zorder=nearness))
    shine = (x - 0.38 * radius, y + 0.38 * radius)
    axes.add_patch(Circle(shine, 0.22 * radius, facecolor="white", alpha=0.6, linewidth=0, zorder=nearness))
    if symbol:
        ink = "white" if colour @ [0.30, 0.59, 0.11] < 0.6 else "black"
        axes.text(x, y, symbol, color=ink, fontsize=9, ha="center", va="center", zorder=nearness)


def _frame(axes, place, margin):
    """Limits around all balls, the same scale both ways, and a bar of 1 Å instead of axes."""
    # Atoms and diatomics do not fill the picture.
    left, bottom = np.minimum(place[:, :2].min(0) - margin - 0.2, -2)
    right, top = np.maximum(place[:, :2].max(0) + margin + 0.2, 2)
    bottom -= 0.5
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    axes.set_axis_off()
    axes.plot([left, left + 1], [bottom, bottom], color="black", linewidth=2.5, clip_on=False, label="1 Å")
    axes.text(left + 0.5, bottom + 0.08, "1 Å", ha="center", va="bottom")


def _spectrum(axes, shardset, one, name, values):
    """A record's spectrum on its grid, values [L]; its lines as sticks on an ordinate of their own."""
    spectrum, grid = one.spectra.get(name), GRIDS[name]
    _abscissa(axes, grid)
    if spectrum is None:
        _say(axes, f"no {TITLES[name]} spectrum in this record")
        return
    lines = isinstance(spectrum, Lines)
    axes.plot(grid.points(), values, color=BLUE, linewidth=1.3)
    axes.set_ylim(0, 1.08 * values.max() or 1)
    axes.set_ylabel(look.unit_of(shardset, name, lines), color=BLUE)
    title = f"{TITLES[name]}, {one.methods.get(name, 'method not stated')}"
    if lines:
        shape, sticks = LINE_SHAPES[name], axes.twinx()
        shown = (spectrum.positions >= grid.start) & (spectrum.positions <= grid.start + grid.step * (grid.length - 1))
        heights = spectrum.strengths[shown]
        sticks.vlines(spectrum.positions[shown], 0, heights, color=ORANGE, linewidth=1.1)
        # The curve lies over the sticks.
        axes.set_zorder(sticks.get_zorder() + 1)
        axes.patch.set_visible(False)
        sticks.set_ylim(0, 1.08 * heights.max(initial=0) or 1)
        sticks.set_ylabel(f"lines: {STRENGTHS[name]}", color=ORANGE)
        count = f"{len(heights)} lines" if shown.all() else f"{len(heights)} of {len(shown)} lines"
        title += f": {count}, broadened ({shape.shape.capitalize()}, {shape.width:.3g} {look.UNITS[grid.unit]} wide)"
    axes.set_title(title, fontsize=10, parse_math=False)


def _abscissa(axes, grid):
    axes.set_xlim(grid.start, grid.start + grid.step * (grid.length - 1))
    axes.set_xlabel(ABSCISSAS[grid.unit])
    axes.grid(alpha=0.3)


def _say(axes, text):
    """Words where a picture would be."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_yticks([])


def overview(shardset):
    """A whole set: sizes and elements of all records; spectra and targets of a sample of evenly spread blocks."""
    numbers = look.sample(shardset)
    batches = [look.batch(shardset.block(number)) for number in numbers]
    names = shardset.manifest["targets"][:MOST_TARGETS]
    rows = math.ceil(len(names) / 6)
    figure = Figure(figsize=(15, 7 + 2 * rows), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[7, 2 * rows]) if rows else (figure, None)
    grid = upper.add_gridspec(2, 6)
    _sizes(upper.add_subplot(grid[0, :3]), look.sizes(shardset))
    _elements(upper.add_subplot(grid[0, 3:]), shardset.manifest["elements"])
    for place, name in enumerate(GRIDS):
        own = [batch.spectra[name][batch.present[name]].numpy() for batch in batches]
        lines = shardset.manifest["spectra"].get(name, {}).get("lines_per_record", 0) > 0
        unit = look.unit_of(shardset, name, lines)
        _mean_spectrum(upper.add_subplot(grid[1, 2 * place : 2 * place + 2]), name, np.concatenate(own), unit)
    for place, name in enumerate(names):
        parts = [batch.targets[name].numpy() for batch in batches if name in batch.targets]
        values = np.concatenate([np.zeros(0), *parts])
        _target(lower.add_subplot(rows, 6, place + 1), name, values, look.unit_of(shardset, name))
    records = sum(len(batch.keys) for batch in batches)
    read = f"{len(numbers)} of {len(shardset.block_records)} blocks, {records:,} records"
    left_out = len(shardset.manifest["targets"]) - len(names)
    figure.suptitle(
        f"{shardset.folder}: {len(shardset):,} records; spectra and targets of {read}"
        + (f"; {left_out} more targets are not shown" if left_out else ""),
        parse_math=False,
    )
    return figure


def _sizes(axes, counts):
    there = np.flatnonzero(counts)
    first, last = int(there[0]), int(there[-1])
    axes.stairs(counts[first:], np.arange(first, last + 2) - 0.5, fill=True, color=BLUE)
    axes.set_title(f"sizes: {first} to {last} atoms, mean {counts @ np.arange(len(counts)) / counts.sum():.1f}")
    axes.set_xlabel("atoms of a molecule")
    axes.set_ylabel("records")
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)


def _elements(axes, counts):
    ordered = sorted(counts, key=lambda symbol: -counts[symbol])
    shown, total = ordered[:MOST_ELEMENTS], sum(counts.values())
    shown.sort(key=NUMBERS.get)
    shares = [100 * counts[symbol] / total for symbol in shown]
    bars = axes.bar(shown, shares, color=BLUE)
    axes.bar_label(bars, [f"{share:.2g} %" for share in shares], fontsize=9 if len(shown) <= 10 else 7, padding=2)
    axes.set_title("elements" + (f": {len(shown)} of {len(counts)}" if len(shown) < len(counts) else ""))
    axes.set_ylabel("share of atoms (%)")
    axes.set_ylim(0, 1.12 * max(shares))
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)


def _mean_spectrum(axes, name, values, unit):
    """values: [r, L] of the records that were read and have the spectrum."""
    _abscissa(axes, GRIDS[name])
    axes.set_title(f"{TITLES[name]}, {len(values):,} records")
    if not len(values):
        _say(axes, f"no {TITLES[name]} spectra in what was read")
        return
    x = GRIDS[name].points().numpy()
    low, high = np.quantile(values, [0.1, 0.9], axis=0)
    axes.fill_between(x, low, high, color=BLUE, alpha=0.25, linewidth=0, label="10 to 90 % of records")
    axes.plot(x, values.mean(0), color=BLUE, linewidth=1.2, label="mean")
    axes.set_ylim(0, 1.3 * high.max() or 1)
    axes.set_ylabel(unit)
    axes.legend(fontsize=8, loc="upper left", ncols=2)


def _target(axes, name, values, unit):
    values = values[np.isfinite(values)]
    axes.set_title(name, fontsize=10, parse_math=False)
    if not len(values):
        _say(axes, "no values in what was read")
        return
    axes.hist(values, bins=30, color=BLUE)
    axes.set_xlabel(unit, fontsize=8, parse_math=False)
    axes.set_ylabel("records", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", nbins=4)


def check_png(path, option="--out"):
    """Raise UserError where a picture is to be anything but a PNG."""
    if path.suffix != ".png":
        raise UserError(f"{option} is {path}; the picture is a PNG: give a name that ends with .png")


def save(figure, path):
    """Write a Figure as PNG, whole or not at all."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    files.write(path, data.getvalue())
