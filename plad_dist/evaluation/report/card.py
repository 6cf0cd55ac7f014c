"""The model card, ``README.md`` in the folder of a model: its origin, settings and quality."""

from __future__ import annotations

from collections.abc import Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined

from plad_dist.config import Config, Model
from plad_dist.data.models import hub_name
from plad_dist.evaluation.document import Metrics
from plad_dist.evaluation.formatting import layers_phrase, loss_phrase, percent, with_interval, writer_phrase


def render_card(
    config: Config, metrics: Metrics, versions: Mapping[str, str], config_yaml: str, *, has_encoder: bool = False
) -> str:
    """Return the card as Markdown, headed by the metadata of a hub.

    It contains no secrets, because configs have no keys for secrets.

    Args:
        has_encoder: the student is an encoder-decoder, which transformers loads by another class
            and vLLM does not serve.
    """
    environment = Environment(  # noqa: S701 - Markdown, without text of models
        loader=PackageLoader("plad_dist.evaluation.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({"interval": with_interval, "percent": percent})
    return environment.get_template("card.md.j2").render(
        config=config,
        metrics=metrics,
        rows=metrics.rows_under(metrics.main_decoding).values(),
        versions=versions,
        config_yaml=config_yaml,
        teachers={name: _origin(model) for name, model in config.all_teachers().items()},
        student=_origin(config.student),
        base=hub_name(source.path) if (source := config.student.pretrained()) is not None else None,
        rejected=writer_phrase(config.sampling.rejected),
        loss=loss_phrase(config.training.round.loss),
        has_encoder=has_encoder,
    )


def _origin(model: Model) -> str:
    if model.endpoint is not None:
        return f"{model.endpoint.model}, behind an endpoint"
    if (source := model.pretrained()) is not None:
        name = f"{source.path}{'@' + source.settings.revision if source.settings.revision else ''}"
        return name if source.layers is None else f"{layers_phrase(source.layers)} of {name}"
    assert model.scratch is not None
    return f"{model.scratch.architecture['model_type']}, from scratch"
