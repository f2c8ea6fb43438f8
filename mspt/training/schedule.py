"""Learning rate by the count of steps."""

import math
from typing import Literal

from pydantic import Field

from mspt.settings import Settings


class ScheduleSettings(Settings):
    """warmup: steps of linear rise to peak. After it constant stays at peak; linear and cosine fall to final at the
    run's last step.

    Published: cosine, warmup 10 000, final 1e-7, over 400 000 steps.
    """

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: int = Field(0, ge=0)
    peak: float = Field(gt=0)
    final: float = Field(0.0, ge=0)


def learning_rate(settings, step, steps):
    """Learning rate of the update number step (the first is 0) of a run of so many steps."""
    if step < settings.warmup:
        return settings.peak * (step + 1) / settings.warmup
    if settings.kind == "constant":
        return settings.peak
    progress = min(1.0, (step - settings.warmup) / max(1, steps - 1 - settings.warmup))
    remaining = 1 - progress if settings.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return settings.final + (settings.peak - settings.final) * remaining
