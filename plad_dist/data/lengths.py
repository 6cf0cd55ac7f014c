"""Detection and truncation of prompts that are too long for a model that responds to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from plad_dist.config import Config, Model
from plad_dist.data.chat_templates import config_template
from plad_dist.data.conversation import Conversation
from plad_dist.data.models import context_length, resolve_model
from plad_dist.data.sources import Prompt
from plad_dist.data.templates import Renderer
from plad_dist.errors import UserError


@dataclass(frozen=True)
class _Limit:
    """The longest prompt that one model takes.

    Attributes:
        name: config section and path of the model, for messages.
        teacher: name of the teacher, or None for a model that responds to every prompt.
        renderer: renderer of the model's prompts.
        max_tokens: length of the longest prompt in tokens of the model.
    """

    name: str
    teacher: str | None
    renderer: Renderer
    max_tokens: int

    def lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """Return the lengths of rendered prompts in tokens.

        Raises:
            UserError: the model's template cannot render a row. The message names the row.
        """
        try:
            return [len(ids) for ids in self.renderer.prompt_ids([prompt.conversation for prompt in prompts])]
        except UserError as error:
            if len(prompts) == 1:
                raise UserError(f"{prompts[0].location}: {self.name}: {error}") from None
            return [self.lengths([prompt])[0] for prompt in prompts]

    def tells_apart(self, prompt: Prompt, reduced: Prompt) -> bool:
        """Return True if the model's template renders a prompt otherwise than a part of it."""
        length = self.lengths([prompt])
        try:
            return length != self.lengths([reduced])
        except UserError:  # such as a template whose turns alternate only because of the calls
            return True


def _responds_to(teacher: str | None, prompt: Prompt) -> bool:
    """Return True if a teacher, or the student (None), responds to a prompt."""
    return teacher is None or teacher == (prompt.teacher or "teacher")


def _without_tools(prompt: Prompt) -> Prompt | None:
    return None if prompt.tools is None else replace(prompt, tools=None)


def _without_calls(prompt: Prompt) -> Prompt | None:
    if not any("tool_calls" in message for message in prompt.messages):
        return None
    messages = [{name: value for name, value in message.items() if name != "tool_calls"} for message in prompt.messages]
    return replace(prompt, messages=Conversation(messages).with_empty_contents().messages)


# What a template can leave out, with a function that returns a prompt without it, or None if the
# prompt does not have it.
_KINDS = {"tools": _without_tools, "tool_calls": _without_calls}


class Lengths:
    """Measures prompts with every pretrained model that responds to them.

    A student that is cut from a model has its tokenizer. Scratch models have none yet, so prompts
    are only rendered for them. Nothing is checked for endpoints, whose tokenizer is not available
    here.
    """

    def __init__(self, config: Config) -> None:
        models: list[tuple[str, str | None, Model]] = [("student", None, config.student)]
        for name, teacher in config.all_teachers().items():
            models.append((f"teachers.{name}" if config.teachers else name, name, teacher))
        self._limits = [
            _limit(name, teacher, source.settings, config.prompts.max_tokens)
            for name, teacher, model in models
            if (source := model.pretrained()) is not None
        ]
        # Prompts are chosen without it, so that runs with another writer share them.
        self._writer: _Limit | None = None
        if (other := config.rejected_writer()) is not None and (source := other.model.pretrained()) is not None:
            self._writer = _limit(other.key, None, source.settings, None)
        self._examined: set[tuple[str, _Limit]] = set()
        # A teacher with the student's template needs no check: the student gets its prompts too.
        self._scratch_models = [
            (teacher, config_template(model, name))
            for name, teacher, model in models
            if model.scratch is not None and (teacher is None or model.rendering() != config.student.rendering())
        ]

    def check_rendering(self, prompts: Sequence[Prompt]) -> None:
        """Check that the templates of models whose lengths do not count can render prompts.

        They are scratch models, and another writer of rejected responses.

        Raises:
            UserError: a template cannot render a row. The message names the row.
        """
        for teacher, template in self._scratch_models:
            for prompt in prompts:
                if _responds_to(teacher, prompt):
                    try:
                        template.render(prompt.conversation)
                    except UserError as error:
                        raise UserError(f"{prompt.location}: {error}") from None
        if self._writer is not None:
            for prompt in prompts:
                try:
                    self._writer.renderer.prompt_text(prompt.conversation)
                except UserError as error:
                    raise UserError(f"{prompt.location}: {self._writer.name}: {error}") from None

    def unshown(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return what the templates of models leave out of prompts with tools or calls.

        Each model is examined once for each of the two, on the first prompt that has it.
        """
        phrases = []
        for kind, without in _KINDS.items():
            for limit in (*self._limits, *([self._writer] if self._writer else [])):
                has_kind = (p for p in prompts if _responds_to(limit.teacher, p) and without(p) is not None)
                if (kind, limit) in self._examined or (prompt := next(has_kind, None)) is None:
                    continue
                self._examined.add((kind, limit))
                reduced = without(prompt)
                assert reduced is not None
                if not limit.tells_apart(prompt, reduced):
                    phrases.append(f"the template of {limit.name} shows nothing of `{kind}`")
        return phrases

    def over_long(self, prompts: Sequence[Prompt]) -> dict[int, str]:
        """Return the indices of prompts that are too long.

        The value is a phrase with the length of the prompt, the model and its limit.
        """
        excesses: dict[int, str] = {}
        for limit in self._limits:
            indices = [index for index, prompt in enumerate(prompts) if _responds_to(limit.teacher, prompt)]
            lengths = limit.lengths([prompts[index] for index in indices])
            for index, tokens in zip(indices, lengths, strict=True):
                if tokens > limit.max_tokens:
                    text = f"{tokens:,} tokens for {limit.name}, at most {limit.max_tokens:,} fit"
                    excesses.setdefault(index, text)
        return excesses

    def truncated(self, prompt: Prompt) -> Prompt:
        """Return the prompt with its last message cut at the end until it fits every model.

        Raises:
            UserError: the prompt does not fit even with one character of its last message.
        """
        *earlier, last = prompt.messages

        def cut(length: int) -> Prompt:
            return replace(prompt, messages=[*earlier, {**last, "content": last["content"][:length]}])

        # A longer text can have fewer tokens, so the bisection finds a length that fits but perhaps
        # not the longest one.
        fits, too_long = 0, len(last["content"])
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self.over_long([cut(middle)]):
                too_long = middle
            else:
                fits = middle
        if not fits:
            excess = self.over_long([cut(0)]).get(0, "no room for a character")
            raise UserError(
                f"{prompt.location}: even with an empty last message the prompt has {excess}; shorten the other "
                "messages, or set prompts.over_long to drop"
            )
        return cut(fits)


def _limit(name: str, teacher: str | None, model: Model, max_tokens: int | None) -> _Limit:
    path = resolve_model(model)
    longest = context_length(path, model) - 1
    return _Limit(f"{name} ({path})", teacher, Renderer(path, model), min(longest, max_tokens or longest))
