"""Arguments and options that several commands share, and the checks of their values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from plad_dist.config.values import expand_path
from plad_dist.config_file import load_config
from plad_dist.errors import UserError


def finite(parameter: typer.CallbackParam, value: float | None) -> float | None:
    """Refuse infinity and NaN as the value of an option."""
    if value is not None and not math.isfinite(value):
        raise UserError(f"--{str(parameter.name).replace('_', '-')} {value}: expected a finite number")
    return value


def expanded(value: Any) -> Any:
    """Return paths with `~` and variables expanded, as in a config."""
    try:
        return [expand_path(item) for item in value] if isinstance(value, list) else value and expand_path(value)
    except ValueError as error:
        raise UserError(str(error)) from None


def run_directory(value: Any) -> Any:
    """Return the path of a run directory, or several, expanded, and refuse configs."""
    paths = expanded(value)
    for path in paths if isinstance(paths, list) else [paths]:
        if path is not None and Path(path).is_file():
            try:
                place = f" (run.dir of this config is {load_config(path).run.dir})"
            except UserError:
                place = ""
            raise UserError(f"{path}: is a file; expected a run directory{place}")
    return paths


ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", callback=expanded, help="YAML file of the run.")]
RunDirPath = Annotated[
    str, typer.Argument(metavar="RUN_DIR", callback=run_directory, help="A run directory: path or URI.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Config keys to set, such as run.seed=3.")
]
Address = Annotated[
    str | None,
    typer.Option(
        help="URL of the cluster's dashboard, such as http://host:8265. Default: RAY_API_SERVER_ADDRESS, or else this "
        "machine's."
    ),
]
JobName = Annotated[str | None, typer.Argument(metavar="[JOB]", help="Default: the newest job.")]
Follow = Annotated[bool, typer.Option("--follow", help="Show the log until the job has ended, and exit like the job.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
MeanTokens = Annotated[float | None, typer.Option(min=1, callback=finite, help="Mean length in tokens.")]
Rate = Annotated[float | None, typer.Option(min=0.001, callback=finite, help="Measured tokens/s per device.")]
