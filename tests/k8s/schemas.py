"""Validation of objects by the schemas of Kubernetes and of custom resource definitions; unknown
fields are refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

# The definitions of KubeRay and Kueue are in a folder beside the repository.
CRDS = Path(__file__).parents[3] / "shared" / "k8s-crds"
KUBERNETES = "1.31"

_STRING_MAP = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": _STRING_MAP,
        "annotations": _STRING_MAP,
    },
    "required": ["name"],
    "additionalProperties": False,
}


def is_custom(item: dict[str, Any]) -> bool:
    """Return True if an object is of KubeRay or Kueue."""
    return item["apiVersion"].partition("/")[0] in ("ray.io", "kueue.x-k8s.io")


def problem_of(item: dict[str, Any]) -> str | None:
    """Return why an object is invalid, or None if it is valid."""
    try:
        if is_custom(item):
            jsonschema.Draft202012Validator(_schema(item["apiVersion"], item["kind"])).validate(item)
        else:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)
    except jsonschema.ValidationError as error:  # kubernetes_validate raises a subclass
        return f"{item['kind']} {item['metadata']['name']}: {'.'.join(map(str, error.absolute_path))}: {error.message}"
    return None


@cache
def _schema(api_version: str, kind: str) -> dict[str, Any]:
    if not CRDS.is_dir():
        pytest.skip(f"needs the custom resource definitions of KubeRay and Kueue in {CRDS}")
    group, _, version = api_version.partition("/")
    for path in sorted(CRDS.glob(f"{group}_*.yaml")):
        spec = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]
        if spec["names"]["kind"] == kind:
            (schema,) = [item["schema"] for item in spec["versions"] if item["name"] == version and item["served"]]
            strict: dict[str, Any] = _strict(schema["openAPIV3Schema"])
            strict["properties"]["metadata"] = _METADATA
            return strict
    raise AssertionError(f"no definition of {api_version} {kind} in {CRDS}")


def _strict(schema: Any) -> Any:
    """Return an OpenAPI schema as a JSON schema that refuses unknown fields, as `kubectl apply`
    does."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {
        # A field under `properties` may have the name of a keyword.
        key: {name: _strict(item) for name, item in value.items()} if key == "properties" else _strict(value)
        for key, value in schema.items()
        if key not in ("default", "description", "enum", "required") and not key.startswith("x-")
    }
    strict |= {key: schema[key] for key in ("enum", "required") if key in schema}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if "properties" in schema and not open_ended:
        strict["additionalProperties"] = False
    return strict
