"""Separation of thought and answer in the responses of models that think."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from plad_dist.config import Model
from plad_dist.data.reasoning import Separated, separate
from plad_dist.sampling.backend import Completion, RefusedPromptError

Separate = Callable[[str], Separated]  # takes the text of a response


def tags_of_prompt(opened: str | None) -> Separate:
    """Return a function that separates by tags and channels.

    Args:
        opened: opening tag with which the prompt ends, None without one.
    """
    return lambda text: separate(text, opened)


def tags_of_server(text: str) -> Separated:
    """Return the thought and the answer of a server, whose prompt is not known."""
    return separate(text, prompt_is_known=False)


def with_thought(completion: Completion, settings: Model, separate: Separate) -> Completion:
    """Return a response with its thought in `reasoning` and its answer in `text`.

    A thought that never ended is a response that was cut, whatever ended it.

    Args:
        settings: config section of the model.
        separate: separates the text, unless the backend has separated it.

    Raises:
        RefusedPromptError: the response has a thought, which the config refuses.
    """
    if completion.finish_reason == "error":
        return completion
    if completion.reasoning is not None:
        parts = Separated(completion.reasoning, completion.text)
    else:
        parts = separate(completion.text)
    if parts.reasoning is not None and settings.reasoning == "refuse":
        raise RefusedPromptError(
            "the response has a thought, and `reasoning: refuse` is set; set `reasoning: strip` or `keep`, or turn "
            "thoughts off by `template_kwargs`, such as enable_thinking: false",
            cost=completion.cost,
        )
    finish_reason = completion.finish_reason if parts.is_complete else "length"
    return replace(completion, text=parts.answer, reasoning=parts.reasoning, finish_reason=finish_reason)
