"""The card of a distilled model, `README.md` in its folder: how it was made, from what, how good it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from plad_dist.config import Config
from plad_dist.evaluation.report import loss_in_words, with_interval


def render_card(config: Config, metrics: Mapping[str, Any], versions: Mapping[str, str], config_yaml: str) -> str:
    """Markdown with the metadata of a hub's card on top. Nothing of it is secret: configs have no place for secrets."""
    environment = Environment(  # noqa: S701 - Markdown; what models wrote is not in it
        loader=PackageLoader("plad_dist", "evaluation"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    rows = [row for row in metrics["systems"] if row["decoding"] == metrics["main_decoding"]]
    return environment.get_template("card.md.j2").render(
        config=config,
        metrics=metrics,
        rows=rows,
        versions=versions,
        config_yaml=config_yaml,
        teachers={name: _origin(model) for name, model in config.all_teachers().items()},
        student=_origin(config.student),
        base=_hub_name(config.student.path),
        loss=loss_in_words(config.training.round.loss),
        share=with_interval,
    )


def _hub_name(path: str | None) -> str | None:
    """A name that a hub's card may give as what the model is made of: a folder of this cluster is none."""
    return (
        path if path is not None and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).exists() else None
    )


def _origin(model: Any) -> str:
    if model.endpoint is not None:
        return f"{model.endpoint.model}, behind an endpoint"
    if model.path is not None:
        return f"{model.path}{'@' + model.revision if model.revision else ''}"
    return f"{model.scratch.architecture['model_type']}, from scratch"
