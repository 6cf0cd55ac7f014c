"""Thoughts of models that think before they answer: found in a response, and put before an answer.

A thought stands between two tags at the beginning of a response, or in another channel than the
answer (`harmony`, the format of gpt-oss). Many chat templates end a prompt with the opening tag, so
that the response begins inside the thought.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
HARMONY_CHANNEL = "<|channel|>"
# A message of harmony: channel, text. The last one of a response may lack its end.
_HARMONY_MESSAGE = re.compile(
    r"<\|channel\|>\s*(\w+)[^<]*<\|message\|>(.*?)(?=<\|end\|>|<\|return\|>|<\|call\|>|<\|start\|>|<\|channel\|>|\Z)",
    re.DOTALL,
)
_HARMONY_START = re.compile(r"\s*(?:<\|start\|>assistant)?<\|channel\|>")
# Harmony from a server that leaves special tokens out of the text.
_BARE_HARMONY = re.compile(r"analysis(.*?)assistant\s*final(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Separated:
    """A response in two parts.

    Attributes:
        reasoning: the thought, None without one.
        answer: the text after the thought.
        is_complete: False if the thought never ended, so that there is no answer.
    """

    reasoning: str | None
    answer: str
    is_complete: bool = True


def opened_tag(prompt_end: str) -> str | None:
    """Return the opening tag with which the text of a prompt ends, or None."""
    stripped = prompt_end.rstrip()
    return next((opening for opening, _ in TAGS if stripped.endswith(opening)), None)


def separate(text: str, opened: str | None = None, *, prompt_is_known: bool = True) -> Separated:
    """Return the thought and the answer of a response.

    Args:
        opened: opening tag with which the prompt ended.
        prompt_is_known: False if the prompt may have ended with an opening tag, as a server's may.
            A closing tag without an opening one then ends a thought.
    """
    if _HARMONY_START.match(text):
        return _separate_harmony(text)
    body = text.lstrip()
    for opening, closing in TAGS:
        if body.startswith(opening):
            return _separate_at(body[len(opening) :], closing)
        if opening == opened:
            return _separate_at(text, closing)
    if not prompt_is_known:
        if bare := _BARE_HARMONY.fullmatch(body):
            return _separated(bare[1], bare[2])
        for opening, closing in TAGS:
            if closing in text and opening not in text.partition(closing)[0]:
                return _separate_at(text, closing)
    return Separated(None, text)


def _separate_at(text: str, closing: str) -> Separated:
    thought, tag, answer = text.partition(closing)
    return _separated(thought, answer if tag else None)


def _separate_harmony(text: str) -> Separated:
    messages = _HARMONY_MESSAGE.findall(text)
    thoughts = [content for channel, content in messages if channel != "final"]
    answers = [content for channel, content in messages if channel == "final"]
    return _separated("\n".join(thoughts), "".join(answers) if answers else None)


def _separated(thought: str, answer: str | None) -> Separated:
    return Separated(thought.strip() or None, (answer or "").lstrip(), answer is not None)


def has_unmatched_tags(text: str, opened: str | None = None) -> bool:
    """Return True if a response opens or closes a thought without its counterpart.

    Args:
        opened: opening tag with which the prompt ended.
    """
    return any(text.count(opening) + (opening == opened) != text.count(closing) for opening, closing in TAGS)


@dataclass(frozen=True)
class ResponseForm:
    """Form in which a model writes a thought and an answer after its prompt.

    Attributes:
        answer_prefix: precedes an answer without a thought, such as the header of a channel.
        thought_prefix: precedes a thought; empty if the prompt opens it.
        thought_suffix: stands between a thought and its answer.
    """

    answer_prefix: str = ""
    thought_prefix: str = "<think>\n"
    thought_suffix: str = "\n</think>\n\n"

    def write(self, thought: str | None, answer: str) -> str:
        """Return the text of a response."""
        if thought is None:
            return self.answer_prefix + answer
        return self.thought_prefix + thought + self.thought_suffix + answer


def response_form(
    prompt: str, answered: str | None, thought_through: str | None, probes: tuple[str, str]
) -> ResponseForm:
    """Return the form of a model's responses, from what its template renders.

    Args:
        prompt: text of a prompt.
        answered: text of the conversation with an answer to the prompt, None if it cannot be
            rendered.
        thought_through: the same with a thought before the answer.
        probes: the thought and the answer.
    """
    thought, answer = probes
    opened = opened_tag(prompt)
    closing = dict(TAGS).get(opened or "<think>", "</think>")
    form = ResponseForm(thought_prefix="" if opened else "<think>\n", thought_suffix=f"\n{closing}\n\n")
    if answered is not None and answered.startswith(prompt):
        before, found, _ = answered[len(prompt) :].partition(answer)
        # An empty thought is left out, because a student that thinks would not write it.
        if found and HARMONY_CHANNEL in before:
            form = ResponseForm(before, form.thought_prefix, form.thought_suffix)
    if thought_through is not None and thought_through.startswith(prompt):
        before, found, rest = thought_through[len(prompt) :].partition(thought)
        between, has_answer, _ = rest.partition(answer)
        if found and has_answer:
            form = ResponseForm(form.answer_prefix, before, between)
    return form
