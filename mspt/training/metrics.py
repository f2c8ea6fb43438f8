"""A run's numbers on disk: metrics.jsonl, one line a logged step, and TensorBoard files beside it."""

import json
import math
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from mspt import files

FILE = "metrics.jsonl"


class Metrics:
    """run_dir: the run folder. enabled: on the rank that writes. start: steps done; what was logged after them by a
    run that was interrupted is dropped, so that a curve has no double points.
    """

    def __init__(self, run_dir, enabled, start=0):
        self.writer = None
        if not enabled:
            return
        self.path = Path(run_dir) / FILE
        kept = [row for row in read(run_dir) if row["step"] <= start]
        files.write(self.path, "".join(_line(row) for row in kept))
        self.writer = SummaryWriter(Path(run_dir) / "tensorboard", purge_step=start + 1)

    def scalars(self, step, values):
        """Log name -> number of a step."""
        if self.writer is None:
            return
        with self.path.open("a") as file:
            file.write(_line({"step": step, **values}))
        for name, value in values.items():
            self.writer.add_scalar(f"train/{name}", value, step)

    def picture(self, step, name, path):
        """Log a PNG file."""
        if self.writer is not None:
            from matplotlib.image import imread  # where pictures are made, matplotlib is loaded already

            self.writer.add_image(name, imread(path), step, dataformats="HWC")

    def close(self):
        if self.writer is not None:
            self.writer.close()


def read(run_dir):
    """The rows of metrics.jsonl, without a last one that a kill has torn. What was not finite is NaN."""
    path = Path(run_dir) / FILE
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()]
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def _line(row):
    """A row as JSON, which knows no NaN or infinity: null stands for them."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in row.items()}) + "\n"
