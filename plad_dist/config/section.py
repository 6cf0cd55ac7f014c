"""Base class of all config sections."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

# Marks a key that controls how a run is carried out but not what it produces. Such a key may
# change between resumes.
OPERATIONAL: dict[str, Any] = {"operational": True}


class Section(BaseModel):
    """Config section: immutable, with checked values and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())
