"""What a response is worth by itself: by its reference, by a reward model, or by a function of the user's."""

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
    """The scorer that a config names, None for `score: none`. Raises :class:`UserError` where it cannot be had."""
    match pairing.score:
        case "none":
            return None
        case "rouge_l":
            return rouge_scores
        case "function":
            assert pairing.score_function is not None
            return FunctionScorer(pairing.score_function, _import(pairing.score_function))
        case "reward_model":
            from plad_dist.pairing.reward import RewardScorer

            assert pairing.reward_model is not None
            return RewardScorer(pairing.reward_model)


def check_scorer(pairing: Pairing) -> None:
    """Raise :class:`UserError` for what is wrong with the scorer that a config names, without loading a model."""
    if pairing.reward_model is not None:
        from plad_dist.pairing.reward import open_reward_model

        open_reward_model(pairing.reward_model)
    elif pairing.score_function is not None:
        import_from(str(Path.cwd()))
        _import(pairing.score_function)


def import_from(folder: str) -> None:
    """Let modules be found in a folder, as Python does with the folder of a script."""
    if folder not in sys.path:
        sys.path.insert(0, folder)


def rouge_scores(answers: list[Answer]) -> list[float | None]:
    """ROUGE-L F1 against the reference; none where there is no reference, or a blank one."""
    return [
        rouge_l(reference, answer["response"]) if (reference := answer["reference"]) and reference.strip() else None
        for answer in answers
    ]


@dataclass(frozen=True)
class FunctionScorer:
    """Scores by a function from outside, whose every mistake is named.

    Attributes:
        name: `package.module:name`, for messages.
    """

    name: str
    function: Callable[[list[Answer]], Any]

    def __call__(self, answers: list[Answer]) -> list[float | None]:
        """Raises :class:`UserError` for a wrong result, :class:`RunFailed` where the function raised."""
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
        for place, score in enumerate(scores):
            if score is not None and not (
                isinstance(score, numbers.Real) and not isinstance(score, bool) and math.isfinite(score)
            ):
                raise UserError(f"{expected}, got {score!r:.60} for {answers[place]['response']!r:.60}")
        return [None if score is None else float(score) for score in scores]


def _import(name: str) -> Callable[[list[Answer]], Any]:
    """The function that `package.module:name` names."""
    module_name, _, attribute = name.partition(":")
    key = f"pairing.score_function: {name}"
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except AttributeError as error:
        raise UserError(f"{key}: {first_line(error)}") from None
    except Exception as error:  # noqa: BLE001 - whatever a module does when it is imported
        raise UserError(
            f"{key}: cannot import {module_name}: {type(error).__name__}: {first_line(error)}. It is looked for in the "
            "working directory and among the installed packages."
        ) from None
    if not callable(function):
        raise UserError(f"{key}: expected a function, got {type(function).__name__}")
    checked: Callable[[list[Answer]], Any] = function
    return checked
