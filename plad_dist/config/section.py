"""What all sections of the config have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

# Marks a key that changes how a run is carried out but not what it produces, so that it may change between resumes.
OPERATIONAL: dict[str, Any] = {"operational": True}


class Section(BaseModel):
    """A part of the config: unknown keys are refused, values are checked, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())
