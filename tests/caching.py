"""A cache for functions that tests call thousands of times, such as those that parse YAML."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

from plad_dist.config import Config


def cached(work: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that keeps its results, as copies if they can change."""
    results: dict[Any, Any] = {}

    def call(*arguments: Any, **named: Any) -> Any:
        key = pickle.dumps((arguments, named)) if not isinstance(arguments[0], io.IOBase) else arguments[0]
        if key not in results:
            result = work(*arguments, **named)
            results[key] = result if isinstance(result, Config) else pickle.dumps(result)
        return pickle.loads(results[key]) if isinstance(results[key], bytes) else results[key]

    return call
