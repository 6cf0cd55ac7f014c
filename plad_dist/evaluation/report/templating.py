"""HTML pages from templates.

A page contains no script and loads nothing over the network; its own Content-Security-Policy
forbids both. The text of models is untrusted, so the templates escape every value.
"""

from __future__ import annotations

from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined

from plad_dist.evaluation import formatting


def render_page(template: str, **values: object) -> str:
    """Return a page as one string that can be encoded as UTF-8: lone surrogates are replaced."""
    environment = Environment(
        loader=PackageLoader("plad_dist.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "percent": formatting.percent,
        "brackets": formatting.brackets,
        "clip": formatting.clip,
        "duration": formatting.duration,
        "system": formatting.system_title,
        "phase": formatting.phase_phrase,
        "judge": formatting.judge_title,
    }
    environment.filters.update(filters)
    page = environment.get_template(template).render(**values)
    return page.encode("utf-8", "replace").decode("utf-8")
