"""Baselines of predicted spectra, by hand."""

import numpy as np
import pytest

from mspt.chemistry.spectra import GRIDS, LINE_SHAPES
from mspt.data.batch import MoleculeBatch
from mspt.downstream.spectra import SCORES, Training, means, report
from tests.data.molecules import record

WATER, AMMONIA, METHANE = [8, 1, 1], [7, 1, 1, 1], [6, 1, 1, 1, 1]


def molecules(*made):
    """(numbers, height of a flat IR spectrum or None) each -> a MoleculeBatch."""
    records = []
    for place, (numbers, height) in enumerate(made):
        spectra = {} if height is None else {"ir": np.full(GRIDS["ir"].length, height, np.float32)}
        records.append(record(f"m{place}", len(numbers), numbers=np.array(numbers, np.uint8), spectra=spectra))
    return MoleculeBatch.from_records(records).broadened(LINE_SHAPES)


def test_means_of_all_and_of_one_composition():
    """Learnt from two batches; the order of atoms does not matter, nor a molecule without the spectrum."""
    training = Training(["ir", "raman"])
    training.learn(molecules((WATER, 1.0), (AMMONIA, 5.0), (METHANE, None)))
    training.learn(molecules((WATER[::-1], 2.0), (METHANE, 4.0)))
    assert (training.mean("ir") == 3).all() and (training.mean("raman") == 0).all()
    asked = molecules((WATER, None), (METHANE, None), ([9, 1], None), ([1], None))
    found = training.composition("ir", asked)[:, 0].tolist()
    # HF is 3 atoms away from water and 4 or more from the others; H is 2 from water.
    assert found == [1.5, 4, 1.5, 1.5]
    assert (training.composition("raman", asked) == 0).all()


def test_of_several_nearest_all_count():
    training = Training(["ir"])
    training.learn(molecules((WATER, 1.0), ([8, 1], 7.0), ([8, 1], 7.0)))
    # Two atoms more than the one, two fewer than the other: each molecule weighs the same.
    assert training.composition("ir", molecules(([8, 6, 1], None), ([7, 1, 1], None)))[:, 0].tolist() == [7, 1]
    assert (
        training.composition(
            "ir",
            molecules(
                ([8, 8, 1, 1], None),
            ),
        )[0, 0].item()
        == 1
    )
    halfway = Training(["ir"])
    halfway.learn(molecules(([6, 1], 1.0), ([6, 1, 1, 1], 4.0), ([1, 6, 1, 1], 4.0)))
    assert halfway.composition(
        "ir",
        molecules(
            ([6, 1, 1], None),
        ),
    )[0, 0].item() == pytest.approx(3)


def test_means_of_scores_leave_out_what_was_not_compared():
    values = np.array([0.5, np.nan, 1.0])
    one = {who: dict.fromkeys(SCORES, values) for who in ("model", "composition", "mean")}
    none = {who: dict.fromkeys(SCORES, values * np.nan) for who in ("model", "composition", "mean")}
    found = means({"ir": one, "raman": none})
    assert found["ir"]["molecules"] == 2 and found["ir"]["model"]["sis"] == 0.75
    assert found["raman"] == {"molecules": 0} | {who: dict.fromkeys(SCORES) for who in one}
    assert "raman" not in report(found) and "0.750" in report(found)
    assert report({"raman": found["raman"]}) == "nothing to compare with: the set has no spectra"
