"""Queries of a user's own, brought to the scale of a library."""

from types import SimpleNamespace

import numpy as np
import pytest

from mspt.chemistry.spectra import GRIDS
from mspt.downstream.identification import scaled
from mspt.errors import UserError


def query(points):
    values = np.zeros(GRIDS["ir"].length)
    values[points] = 5.0
    return {"ir": values}


@pytest.mark.parametrize("points", [[100], [100, 101], [100, 700]])
def test_a_query_gets_the_area_of_its_range(points):
    """Of one point too, such as the single line of a diatomic."""
    library = SimpleNamespace(mean={"ir": np.arange(GRIDS["ir"].length, dtype=float)})
    found = scaled(query(points), library)["ir"]
    assert found.sum() == pytest.approx(np.arange(points[0], points[-1] + 1).sum())
    assert (found > 0).sum() == len(points)


def test_a_library_without_such_spectra():
    with pytest.raises(UserError, match="--query ir: cannot be scaled"):
        scaled(query([3]), SimpleNamespace(mean={"ir": np.zeros(GRIDS["ir"].length)}))
