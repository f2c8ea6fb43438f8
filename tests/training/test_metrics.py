"""A run's numbers on disk."""

import io
import json
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mspt.training import metrics
from mspt.training.metrics import Metrics


def log(folder, steps, start=0, scale=1.0):
    written = Metrics(folder, enabled=True, start=start)
    for step in steps:
        written.scalars(step, {"loss": scale / step, "molecules": 64})
    written.close()


def curve(folder):
    """What TensorBoard shows of the loss."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


def test_what_is_logged_is_read(tmp_path):
    log(tmp_path, (10, 20))
    assert metrics.read(tmp_path) == [
        {"step": 10, "loss": 0.1, "molecules": 64},
        {"step": 20, "loss": 0.05, "molecules": 64},
    ]
    assert curve(tmp_path) == pytest.approx({10: 0.1, 20: 0.05})


def test_a_resumed_run_has_no_double_points(tmp_path):
    """Steps 30 and 40 come after the checkpoint of step 20: the resumed run takes them again."""
    log(tmp_path, (10, 20, 30, 40))
    log(tmp_path, (), start=20)
    assert [row["step"] for row in metrics.read(tmp_path)] == [10, 20]
    assert curve(tmp_path) == pytest.approx({10: 0.1, 20: 0.05})
    log(tmp_path, (30, 40, 50), start=20, scale=2.0)
    rows = metrics.read(tmp_path)
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50]
    assert [row["loss"] * row["step"] for row in rows] == pytest.approx([1, 1, 2, 2, 2])
    assert curve(tmp_path) == pytest.approx({10: 0.1, 20: 0.05, 30: 2 / 30, 40: 0.05, 50: 0.04})


def test_a_torn_last_line_is_left_out(tmp_path):
    log(tmp_path, (10, 20, 30))
    path = tmp_path / metrics.FILE
    path.write_bytes(path.read_bytes()[:-5])
    assert [row["step"] for row in metrics.read(tmp_path)] == [10, 20]
    log(tmp_path, (30,), start=20)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]


def test_what_is_not_finite_stays_valid_json(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    written = Metrics(tmp_path, enabled=True)
    written.scalars(1, {"loss": math.nan, "grad_norm": math.inf, "coord": 0.5})
    written.close()
    log(tmp_path, (2,), start=1)  # rewrites what is kept
    for line in (tmp_path / metrics.FILE).read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    row = metrics.read(tmp_path)[0]
    assert math.isnan(row["loss"])
    assert math.isnan(row["grad_norm"])
    assert row["coord"] == 0.5


def test_pictures_reach_tensorboard(tmp_path):
    figure = Figure(figsize=(2, 1))
    figure.add_subplot().plot([0, 1], [1, 0])
    figure.savefig(tmp_path / "losses.png", dpi=100)
    written = Metrics(tmp_path, enabled=True)
    written.picture(5, "losses", tmp_path / "losses.png")
    written.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    [image] = events.Images("losses")
    assert (image.step, image.width, image.height) == (5, 200, 100)
    assert np.array_equal(imread(io.BytesIO(image.encoded_image_string)), imread(tmp_path / "losses.png"))


def test_other_ranks_write_nothing(tmp_path):
    silent = Metrics(tmp_path / "run", enabled=False)
    silent.scalars(1, {"loss": 1.0})
    silent.picture(1, "losses", tmp_path / "losses.png")
    silent.close()
    assert not (tmp_path / "run").exists()
    assert metrics.read(tmp_path / "run") == []
