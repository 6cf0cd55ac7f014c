"""Scorers of single responses: ROUGE-L against the reference, a reward model, a user function."""

from __future__ import annotations

import importlib
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plad_dist.config import Pairing
from plad_dist.errors import RunFailed, UserError, first_line
from plad_dist.pairing.answer import Answer, Scorer
from plad_dist.text_metrics import rouge_l


def load_scorer(pairing: Pairing) -> Scorer | None:
    """Load the scorer of a config, None for `score: none`.

    Raises:
        UserError: the scorer is unusable.
    """
    match pairing.score:
        case "none":
            return None
        case "rouge_l":
            return rouge_scores
        case "function":
            assert pairing.score_function is not None
            return FunctionScorer(pairing.score_function, _import_function(pairing.score_function))
        case "reward_model":
            from plad_dist.pairing.reward import RewardScorer

            assert pairing.reward_model is not None
            return RewardScorer(pairing.reward_model)


def check_scorer(pairing: Pairing) -> None:
    """Raise :class:`UserError` if the scorer of a config is unusable. Loads no weights."""
    if pairing.reward_model is not None:
        from plad_dist.pairing.reward import open_reward_model

        open_reward_model(pairing.reward_model)
    elif pairing.score_function is not None:
        add_to_import_path(str(Path.cwd()))
        _import_function(pairing.score_function)


def add_to_import_path(folder: str) -> None:
    """Let modules be imported from a folder, as Python does with the folder of a script."""
    if folder not in sys.path:
        sys.path.insert(0, folder)


def rouge_scores(answers: list[Answer]) -> list[float | None]:
    """Return ROUGE-L F1 against the references, None for a missing or blank reference."""
    return [
        rouge_l(reference, answer["response"]) if (reference := answer["reference"]) and reference.strip() else None
        for answer in answers
    ]


@dataclass(frozen=True)
class FunctionScorer:
    """Scores by a user's function. Every error names the function.

    Attributes:
        name: `package.module:name`, for messages.
        function: takes a list of responses, and should return a number or None for each.
    """

    name: str
    function: Callable[[list[Answer]], Any]

    def __call__(self, answers: list[Answer]) -> list[float | None]:
        """Return a score for each response.

        Raises:
            UserError: the function returned something other than finite numbers or None.
            RunFailed: the function raised an exception.
        """
        try:
            scores = self.function(answers)
        except Exception as error:
            raise RunFailed(
                f"pairing.score_function {self.name}: raised {type(error).__name__}: {first_line(error)}"
            ) from error
        expected = f"pairing.score_function {self.name}: expected a list of {len(answers)} finite numbers or nulls"
        if isinstance(scores, str) or not isinstance(scores, Sequence | np.ndarray):
            raise UserError(f"{expected}, got {type(scores).__name__}")
        if len(scores) != len(answers):
            raise UserError(f"{expected}, one for each response, got {len(scores)}")
        for index, score in enumerate(scores):
            if score is not None and not (
                isinstance(score, numbers.Real) and not isinstance(score, bool) and math.isfinite(score)
            ):
                raise UserError(f"{expected}, got {score!r:.60} for {answers[index]['response']!r:.60}")
        return [None if score is None else float(score) for score in scores]


def _import_function(name: str) -> Callable[[list[Answer]], Any]:
    """Return the function that `package.module:name` refers to."""
    module_name, _, attribute = name.partition(":")
    key = f"pairing.score_function: {name}"
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except AttributeError as error:
        raise UserError(f"{key}: {first_line(error)}") from None
    except Exception as error:  # noqa: BLE001 - importing a module may raise anything
        raise UserError(
            f"{key}: cannot import {module_name}: {type(error).__name__}: {first_line(error)}. Put it into the "
            "working directory, or install it."
        ) from None
    if not callable(function):
        raise UserError(f"{key}: expected a function, got {type(function).__name__}")
    checked: Callable[[list[Answer]], Any] = function
    return checked
