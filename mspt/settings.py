"""Base of all typed settings: unknown keys are refused, values are not coerced silently, numbers are finite, instances
are frozen.
"""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Each component's settings class derives from this and stands beside the component."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
