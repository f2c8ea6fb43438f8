"""Pictures show the numbers that they are given."""

import math

import matplotlib.image
import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from mspt.chemistry.spectra import GRIDS
from mspt.data import plot
from mspt.downstream import ranking
from mspt.training import figures
from mspt.training.evaluation import Example

LENGTHS = {"uv_vis": 20, "ir": 100, "raman": 100}


def example(key="qm9-000042", seed=0):
    """Smooth spectra cut into patches; the model is right but for masked patches, where it is off by one."""
    made, generator = Example(key), torch.Generator().manual_seed(seed)
    for name, grid in GRIDS.items():
        x = torch.linspace(0, 6, grid.length)
        patches = (1 + x.sin() ** 2).unfold(0, LENGTHS[name], LENGTHS[name] // 2)
        masked = torch.zeros(len(patches), dtype=torch.bool)
        masked[torch.randperm(len(patches), generator=generator)[:7]] = True
        made.true[name], made.masked[name] = patches, masked
        made.predicted[name] = patches + masked[:, None].float()
    return made


def texts(axes):
    return axes.get_title(), axes.get_xlabel(), axes.get_ylabel()


def line(axes, label):
    return next(each for each in axes.get_lines() if each.get_label() == label)


def test_losses_of_every_term_in_the_rows():
    rows = [{"step": t, "loss": 3.0 / t, "coord": 1.0 / t, "contrast": 2.0 / t, "grad_norm": 1.0} for t in (10, 20, 30)]
    panels = figures.losses(rows).axes
    assert [axes.get_title() for axes in panels] == ["joint loss", "denoising", "contrast"]
    assert all(all(texts(axes)) for axes in panels)
    for axes, factor in zip(panels, (3.0, 1.0, 2.0), strict=True):
        x, y = axes.get_lines()[0].get_data()
        assert list(x) == [10, 20, 30]
        assert list(y) == pytest.approx([factor / t for t in (10, 20, 30)])


def test_losses_leave_out_what_is_not_finite():
    rows = [{"step": t, "loss": value} for t, value in ((1, 1.0), (2, math.nan), (3, 0.001))]
    [axes] = figures.losses(rows).axes
    assert list(axes.get_lines()[0].get_xdata()) == [1, 3]
    assert axes.get_yscale() == "log"


def test_losses_of_nothing(tmp_path):
    plot.save(figures.losses([]), tmp_path / "empty.png")
    plot.save(figures.losses([{"step": 1, "loss": math.nan}]), tmp_path / "nan.png")
    assert len(list(tmp_path.iterdir())) == 2


def test_reconstructions_show_true_and_filled_in_spectra_on_their_grids():
    examples = [example("qm9-000042"), example("qm9-000043", seed=1)]
    panels = figures.reconstructions(examples).axes
    assert len(panels) == 6
    for axes, (made, name) in zip(panels, ((made, name) for made in examples for name in GRIDS), strict=True):
        title, abscissa, ordinate = texts(axes)
        assert title.startswith(made.key)
        assert ("eV" in abscissa) == (name == "uv_vis")
        assert "log₁₀" in ordinate
        grid = GRIDS[name]
        x, true = line(axes, "true").get_data()
        np.testing.assert_allclose(x, grid.points(), rtol=1e-6)
        covered = np.isfinite(true)
        assert covered.sum() > grid.length - LENGTHS[name]
        expected = 1 + np.sin(np.linspace(0, 6, grid.length)) ** 2
        np.testing.assert_allclose(true[covered], expected[covered], atol=1e-4)
        hidden = np.zeros(grid.length, bool)
        for patch in made.masked[name].nonzero()[:, 0].tolist():
            start = patch * LENGTHS[name] // 2
            hidden[start : start + LENGTHS[name]] = True
        filled_in = line(axes, "model, masked patches").get_ydata()
        visible = line(axes, "model, visible patches").get_ydata()
        np.testing.assert_array_equal(np.isfinite(filled_in), hidden)
        np.testing.assert_allclose(filled_in[hidden], expected[hidden] + 1, atol=1e-4)
        np.testing.assert_allclose(visible[~hidden & covered], expected[~hidden & covered], atol=1e-4)


def test_reconstructions_have_one_legend():
    [legend] = figures.reconstructions([example(), example()]).legends
    assert {text.get_text() for text in legend.get_texts()} == {
        "true",
        "masked",
        "model, visible patches",
        "model, masked patches",
    }


def pairs(p):
    """Ranks and similarities of p pairs that are more alike than others, most of them."""
    generator = torch.Generator().manual_seed(0)
    molecules = normalize(torch.randn(p, 8, generator=generator), dim=1)
    spectra = normalize(molecules + 0.4 * torch.randn(p, 8, generator=generator), dim=1)
    return ranking.ranks(molecules, spectra), molecules @ spectra.T


def test_retrieval_shows_the_recall_that_evaluation_reports():
    ranks, similarities = pairs(40)
    curves, picture, _ = figures.retrieval(ranks, similarities).axes
    reported = ranking.recalls(ranks)
    assert 0 < reported["recall_at_1_molecule_to_spectrum"] < 1
    for label, name in (
        ("molecule → spectrum", "molecule_to_spectrum"),
        ("spectrum → molecule", "spectrum_to_molecule"),
    ):
        k, recall = line(curves, label).get_data()
        assert (k[0], k[-1], recall[-1]) == (1, 40, 1.0)
        for at in (1, 5, 10):
            assert recall[at - 1] == pytest.approx(reported[f"recall_at_{at}_{name}"])
    chance = line(curves, "chance").get_ydata()
    assert chance[[0, 4, 9]].tolist() == pytest.approx([reported[f"recall_at_{k}_chance"] for k in (1, 5, 10)])
    np.testing.assert_array_equal(picture.get_images()[0].get_array(), similarities.numpy())


def test_retrieval_of_many_shows_the_first():
    ranks, similarities = pairs(300)
    curves, picture, _ = figures.retrieval(ranks, similarities[:200, :200]).axes
    assert "300 held-out" in curves.get_title()
    assert picture.get_images()[0].get_array().shape == (200, 200)
    assert "first 200" in picture.get_title()


def test_a_saved_picture_is_whole(tmp_path):
    path = tmp_path / "figures" / "retrieval.png"
    plot.save(figures.retrieval(*pairs(1)), path)
    assert matplotlib.image.imread(path).shape[:2] == (506, 1210)
    assert [file.name for file in path.parent.iterdir()] == ["retrieval.png"]


def test_nothing_is_left_in_pyplot():
    import matplotlib.pyplot

    figures.losses([{"step": 1, "loss": 1.0}])
    figures.retrieval(*pairs(3))
    assert matplotlib.pyplot.get_fignums() == []
