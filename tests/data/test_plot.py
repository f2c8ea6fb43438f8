"""Pictures of data show the numbers of the records, with their units."""

import itertools
import warnings

import matplotlib.image
import numpy as np
import pytest
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.patches import Circle, Polygon, StepPatch

from mspt.chemistry.elements import SYMBOLS
from mspt.chemistry.spectra import GRIDS, LINE_SHAPES
from mspt.data import plot
from mspt.data.batch import MoleculeBatch
from mspt.data.shardset import ShardSet
from shards.sources.computed import bonds
from tests.data.molecules import plain, record, write_set
from tests.data.real import BUNDLED, write_everything


@pytest.fixture(scope="module")
def bundled():
    return ShardSet.open(BUNDLED / "heldout")


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A ShardSet, and its records as they were before they were written."""
    folder = tmp_path_factory.mktemp("everything") / "set"
    records = write_everything(folder)
    return ShardSet.open(folder), records


def patches(axes, kind):
    return [patch for patch in axes.patches if type(patch) is kind]


def panels(figure, name):
    """The axes of a spectrum: its curve, and its sticks where there are some."""
    return [axes for axes in figure.axes if axes.get_title().startswith(plot.TITLES[name])]


def sticks(figure):
    """The lines drawn in each of a figure's axes that has some: positions, heights."""
    drawn = [c for axes in figure.axes for c in axes.collections if isinstance(c, LineCollection)]
    segments = [np.array(each.get_segments()) for each in drawn]
    assert all((each[:, 0, 1] == 0).all() for each in segments)
    return [(each[:, 1, 0], each[:, 1, 1]) for each in segments]


def test_a_record_is_drawn_with_its_lines_and_the_curve_of_them(bundled):
    number = 17
    one = next(bundled.records([number]))
    figure = plot.record(bundled, number)
    assert len(figure.axes) == 1 + 2 * len(GRIDS)
    curves = MoleculeBatch.from_records([one]).broadened(LINE_SHAPES).spectra
    for (name, grid), (positions, heights) in zip(GRIDS.items(), sticks(figure), strict=True):
        [axes] = panels(figure, name)
        x, y = axes.get_lines()[0].get_data()
        np.testing.assert_allclose(x, grid.points())
        np.testing.assert_array_equal(y, curves[name][0])
        lines, end = one.spectra[name], grid.start + grid.step * (grid.length - 1)
        inside = (lines.positions >= grid.start) & (lines.positions <= end)
        np.testing.assert_allclose(positions, lines.positions[inside])
        np.testing.assert_allclose(heights, lines.strengths[inside])
        assert f"{inside.sum()} of {len(inside)} lines" in axes.get_title()
        assert one.methods[name] in axes.get_title()
        assert axes.get_xlim() == (grid.start, end)
    labels = {text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel())}
    assert {"energy (eV)", "wavenumber (cm⁻¹)", "oscillator strength", "km/mol per cm⁻¹", "Å⁴/amu per cm⁻¹"} <= labels
    assert {"lines: oscillator strength", "lines: km/mol", "lines: Å⁴/amu"} <= labels


def test_values_and_missing_spectra(everything):
    shardset, records = everything
    figure = plot.record(shardset, 0)
    assert len(figure.axes) == 1 + 3 + 1  # UV-Vis is missing, IR has values, Raman lines
    [ir] = panels(figure, "ir")
    np.testing.assert_array_equal(ir.get_lines()[0].get_ydata(), records[0].spectra["ir"])
    assert ir.get_ylabel() == "unit not stated"
    assert ir.get_title() == "IR, GFN2-xTB"
    assert [len(positions) for positions, _ in sticks(figure)] == [(records[0].spectra["raman"].positions >= 500).sum()]
    words = [text.get_text() for axes in plot.record(shardset, 5).axes for text in axes.texts]
    assert [text for text in words if text.startswith("no ")] == [
        f"no {title} spectrum in this record" for title in ("UV-Vis", "IR", "Raman")
    ]


def test_balls_and_sticks_of_the_bonds_that_are_known(everything):
    shardset, records = everything
    one = records[0]
    axes = plot.record(shardset, 0).axes[0]
    assert axes.get_title() == f"qm9-020497: C₅H₅N₃\n{one.smiles}"
    balls = patches(axes, Circle)[::2]  # every second is the light on a ball
    assert len(balls) == 13
    assert [text.get_text() for text in axes.texts] == [*(SYMBOLS[z] for z in one.numbers if z > 1), "1 Å"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["H", "C", "N"]
    count = {1: 1, 2: 2, 3: 3, 4: 2}
    assert len(patches(axes, Polygon)) == sum(2 * count[code] for code in one.bond_types)
    assert "charge +1" in plot.record(shardset, 5).axes[0].get_title()
    nearest = max(balls, key=lambda ball: ball.get_zorder())
    element = SYMBOLS[one.numbers[balls.index(nearest)]]
    assert nearest.get_facecolor()[:3] == pytest.approx(to_rgb(plot.COLOURS[element]))


def test_bonds_by_distance_where_none_are_known(bundled):
    for one in bundled.records(range(0, 223, 20)):
        near = {(i, j) for i, j, _ in plot._near(one)}
        assert near == bonds(one.numbers, one.positions)
    axes = plot.record(bundled, 17).axes[0]
    assert axes.get_legend().get_title().get_text() == "bonds by distance"
    assert len(patches(axes, Polygon)) == 2 * len(list(plot._near(next(bundled.records([17])))))


def test_a_molecule_is_turned_and_never_mirrored(bundled):
    for one in bundled.records(range(0, 223, 20)):
        before = one.positions - one.positions.mean(0, dtype=float)
        after = plot._turned(one.positions.astype(float))
        rotation, *_ = np.linalg.lstsq(before, after)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
        assert np.linalg.det(rotation) == pytest.approx(1)
        width, height, depth = np.ptp(after, axis=0)
        assert width > depth and height > 0


@pytest.mark.parametrize("numbers", [[18], [1, 1], [118] * 3])
def test_small_and_heavy_molecules(tmp_path, numbers):
    positions = np.arange(len(numbers))[:, None] * np.float32([0, 0, 1.5])
    write_set(tmp_path / "set", [record("$odd_{key$", numbers=np.array(numbers, np.uint8), positions=positions)])
    shardset = ShardSet.open(tmp_path / "set")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.save(plot.record(shardset, 0), tmp_path / "one.png")
        plot.save(plot.overview(shardset), tmp_path / "all.png")
    assert matplotlib.image.imread(tmp_path / "one.png").std() > 0


def test_overview_counts_everything_and_says_what_was_read(bundled, monkeypatch):
    records = list(bundled.records(range(223)))
    monkeypatch.setattr(plot.look.sample, "__defaults__", (3,))
    figure = plot.overview(bundled)
    chosen = [r for i, r in enumerate(records) if i // 32 in (0, 3, 6)]
    assert figure.get_suptitle().endswith(f"223 records; spectra and targets of 3 of 7 blocks, {len(chosen)} records")
    sizes, elements, *rest = figure.axes
    [stairs] = patches(sizes, StepPatch)
    atoms = [len(r.numbers) for r in records]
    values, edges, _ = stairs.get_data()
    assert edges[0] == min(atoms) - 0.5
    np.testing.assert_array_equal(values, np.bincount(atoms)[min(atoms) :])
    shares = [bar.get_height() for bar in elements.patches]
    together = np.concatenate([r.numbers for r in records])
    assert shares == pytest.approx([100 * np.mean(together == z) for z in (1, 6, 7, 8, 9)])
    assert [label.get_text() for label in elements.get_xticklabels()] == ["H", "C", "N", "O", "F"]
    spectra, targets = rest[:3], rest[3:]
    curves = MoleculeBatch.from_records(chosen).broadened(LINE_SHAPES).spectra
    for axes, (name, grid) in zip(spectra, GRIDS.items(), strict=True):
        x, mean = axes.get_lines()[0].get_data()
        np.testing.assert_allclose(x, grid.points())
        np.testing.assert_allclose(mean, curves[name].numpy().mean(0), rtol=1e-4, atol=1e-7)
        [band] = [c for c in axes.collections if isinstance(c, PolyCollection)]
        drawn = band.get_paths()[0].vertices
        at = grid.length // 2
        expected = np.quantile(curves[name].numpy()[:, at], [0.1, 0.9])
        there = drawn[np.isclose(drawn[:, 0], x[at])][:, 1]
        assert sorted(there) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert axes.get_xlabel() and axes.get_ylabel()
    assert [axes.get_title() for axes in targets] == bundled.manifest["targets"]
    for axes in targets:
        assert sum(bar.get_height() for bar in axes.patches) == len(chosen)
        low, high = axes.patches[0].get_x(), axes.patches[-1].get_x() + axes.patches[-1].get_width()
        values = [r.targets[axes.get_title()] for r in chosen]
        assert (low, high) == pytest.approx((min(values), max(values)))


def test_overview_of_targets_in_their_units_and_without_spectra():
    geometries = ShardSet.open(BUNDLED.parent / "qm9-geometries" / "heldout")
    figure = plot.overview(geometries)
    units = {axes.get_title(): axes.get_xlabel() for axes in figure.axes}
    assert (units["alpha"], units["gap"], units["mu"]) == ("a0^3", "eV", "D")
    assert [text.get_text() for axes in figure.axes for text in axes.texts if text.get_text().startswith("no ")] == [
        f"no {title} spectra in what was read" for title in plot.TITLES.values()
    ]


def test_overview_of_a_target_that_no_block_read_has(tmp_path, monkeypatch):
    monkeypatch.setattr(plot.look.sample, "__defaults__", (2,))
    records = [record(f"r-{i}", seed=i, targets={"mu": 1.0, **({"gap": 2.0} if i == 4 else {})}) for i in range(12)]
    write_set(tmp_path / "set", records, block=4)
    figure = plot.overview(ShardSet.open(tmp_path / "set"))
    [axes] = [axes for axes in figure.axes if axes.get_title() == "gap"]
    assert [text.get_text() for text in axes.texts] == ["no values in what was read"]


def test_overview_of_many_targets_and_elements_says_what_it_leaves_out(tmp_path):
    targets = {f"t{i:02d}": float(i) for i in range(30)}
    everyone = np.arange(1, 41, dtype=np.uint8)
    write_set(tmp_path / "set", [record("a", numbers=everyone, atoms=40, targets=targets), *plain([2, 3])])
    figure = plot.overview(ShardSet.open(tmp_path / "set"))
    assert "6 more targets are not shown" in figure.get_suptitle()
    assert len(figure.axes) == 2 + 3 + plot.MOST_TARGETS
    assert figure.axes[1].get_title().startswith("elements: 20 of 4")
    assert len(figure.axes[1].patches) == 20


def boxes(figure):
    """Where the words of a drawn figure lie, in pixels."""
    figure.draw_without_rendering()
    renderer = figure._get_renderer()
    for axes in figure.axes:
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            if text.get_text():
                yield text.get_text(), text.get_window_extent(renderer)


@pytest.mark.parametrize("number", [None, 17])
def test_no_words_overlap(bundled, number):
    figure = plot.overview(bundled) if number is None else plot.record(bundled, number)
    for (one, first), (other, second) in itertools.combinations(boxes(figure), 2):
        assert not first.overlaps(second), (one, other)
