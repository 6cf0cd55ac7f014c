"""Base class of all config sections."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator

from plad_dist.config.secrets import ADVICE, secret_location

# Marks a key that controls how a run is carried out but not what it produces. Such a key may
# change between resumes.
OPERATIONAL: dict[str, Any] = {"operational": True}


class Section(BaseModel):
    """Config section: immutable, with checked values and without unknown keys.

    Values are strict: a number is no boolean and no string, and is finite.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        serialize_by_alias=True,  # a key that is a word of Python has another name in the code
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_secrets(cls, values: Any) -> Any:
        if isinstance(values, dict):
            # Sections check their own values, and messages then name the whole key. The checks of
            # addresses and names of variables give better advice.
            checked = {
                name: value
                for name, value in values.items()
                if not isinstance(value, dict) and name != "url" and not str(name).endswith("_env")
            }
            if location := secret_location(checked):
                raise ValueError(f"{location}: looks like a secret; {ADVICE}")
        return values

    @model_validator(mode="before")
    @classmethod
    def _read_whole_numbers(cls, values: Any) -> Any:
        """Return a number such as 1e5 as an integer if its key takes integers only."""
        if not isinstance(values, dict):
            return values
        return {
            name: int(value) if _is_whole(value) and cls._is_integer(name) else value for name, value in values.items()
        }

    @classmethod
    def _is_integer(cls, name: str) -> bool:
        types = _types_in(cls.model_fields[name].annotation) if name in cls.model_fields else set()
        return int in types and float not in types


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _types_in(annotation: Any) -> set[Any]:
    """Return the types that an annotation names directly or as a member of a union."""
    members = [item for item in get_args(annotation) if isinstance(item, type) or get_args(item)]
    return {annotation}.union(*map(_types_in, members)) if members else {annotation}
