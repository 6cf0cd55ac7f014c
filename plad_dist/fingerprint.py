"""Fingerprints of named fields: what decides the content of a run, a dataset or a model.

Two fingerprints are equal exactly if their kind and all their fields are equal. Each includes the
format number, so that a version that derives something differently does not accept old data.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

# Raise this number when the fields or the meaning of any fingerprint change. Runs of another format
# are refused (`plad_dist.rundir`).
FORMAT = 4


def fingerprint(kind: str, **fields: Any) -> str:
    """Return the SHA-256 of fields by name, as hexadecimal digits.

    Args:
        kind: what is fingerprinted, such as `samples`; the same fields of another kind differ.
        fields: values that JSON can hold. A tuple equals a list of the same items.

    Raises:
        TypeError: a value is not JSON, so that its text might change from one process to the next.
    """
    document = {"format": FORMAT, "kind": kind, "fields": fields}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
