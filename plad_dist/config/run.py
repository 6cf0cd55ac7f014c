"""Location, cluster and rounds of a run."""

from __future__ import annotations

import datetime as dt
import re
from typing import Literal

from pydantic import Field, field_validator

from plad_dist.config.section import OPERATIONAL, Section
from plad_dist.config.values import PathText


class Run(Section):
    """Location of the run, and the seed that makes it repeatable."""

    dir: PathText = Field(description="Run directory: a path, or a file://, s3://, gs:// or az:// URI.", min_length=1)
    seed: int = Field(17, ge=0, lt=2**31, description="Seed of all random choices in the run.")
    date: str | None = Field(
        None,
        description="Date that templates read from the clock (`strftime_now`), such as 2026-01-31. If unset, the day "
        "on which the run begins, which run.yaml keeps.",
    )
    reuse: PathText | None = Field(
        None,
        min_length=1,
        description="Directory of another run. A new run takes over the prompts, models, samples and pairs that both "
        "runs would produce identically. If unset, the run produces everything itself.",
        json_schema_extra=OPERATIONAL,
    )

    @field_validator("date")
    @classmethod
    def _check_date(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                if not re.fullmatch(r"\d{4}-\d\d-\d\d", value, re.ASCII):
                    raise ValueError("year, month and day have 4, 2 and 2 digits")
                dt.date.fromisoformat(value)
            except ValueError as error:
                raise ValueError(f"{value!r:.40}: expected a date such as 2026-01-31: {error}") from None
        return value


class Cluster(Section):
    """Ray cluster that carries out the run."""

    address: str | None = Field(
        None,
        description="Address of the Ray cluster to join, such as `auto` or `host:port`. If unset, the address in the "
        "environment variable RAY_ADDRESS, or else a local Ray.",
        json_schema_extra=OPERATIONAL,
    )
    start_timeout_s: int = Field(
        600,
        ge=10,
        description="Seconds to wait for the resources of actors and of a fixed number of workers. An elastic group "
        "waits without a limit.",
        json_schema_extra=OPERATIONAL,
    )
    unfit: Literal["refuse", "warn"] = Field(
        "refuse",
        description="Action for a config that needs more memory than the devices have, as estimated by `plad plan`. "
        "The check runs before anything starts.",
        json_schema_extra=OPERATIONAL,
    )
    warm_starts: bool = Field(
        True,
        description="Fork training processes and engines from two that stay on each node with all imports (1 GB).",
        json_schema_extra=OPERATIONAL,
    )


class Rounds(Section):
    """Repetitions of steps 1 to 4, each with the student of the round before.

    The teacher is sampled once.
    """

    most: int = Field(1, ge=1, le=100, description="Maximum number of rounds.", json_schema_extra=OPERATIONAL)
    stop: Literal["no_gain", "never"] = Field(
        "no_gain",
        description="Condition for an early stop. no_gain: stop after a round without a clear gain on the held-out "
        "prompts, that is, if the lower end of the 95% interval of the student's win rate against its starting "
        "student is at most one half. never: run all rounds.",
        json_schema_extra=OPERATIONAL,
    )
