"""Settings of the documentation site, which `make docs` builds from this folder."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

_PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = str(_PROJECT["name"])
version = release = str(_PROJECT["version"])
copyright = "the plad-dist maintainers, Apache-2.0"
extensions = ["myst_parser"]
myst_heading_anchors = 3  # so that links to headings work as they do on a code host
myst_enable_extensions = ["dollarmath"]
html_theme = "furo"
html_title = f"plad-dist {version}"
html_show_sphinx = False
html_copy_source = False
nitpicky = True

# The READMEs beside the code are pages of the site too, under these names.
_READMES = {"../README.md": "index.md", "../k8s/README.md": "kubernetes.md", "k8s/README.md": "kubernetes.md"}


def _link_to_pages(source: list[str]) -> None:
    """Point links to a README at the page of the site that shows it."""
    for path, page in _READMES.items():
        source[0] = source[0].replace(f"]({path}", f"]({page}")


def setup(app: Any) -> None:
    """Register the hooks with Sphinx."""
    app.connect("source-read", lambda app, name, source: _link_to_pages(source))
    app.connect("include-read", lambda app, path, parent, source: _link_to_pages(source))
