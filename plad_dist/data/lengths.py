"""Prompts too long for a model that is to answer them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from plad_dist.config import Config, Model
from plad_dist.data.models import context_length, resolve_model
from plad_dist.data.sources import Prompt
from plad_dist.data.templates import Renderer, compile_template, render
from plad_dist.errors import UserError


@dataclass(frozen=True)
class _Limit:
    """One model, and the longest prompt in its tokens.

    Attributes:
        teacher: the teacher that it is, None for the student, which answers every prompt.
    """

    name: str
    teacher: str | None
    renderer: Renderer
    tokens: int

    def lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of prompts as the model sees them. Raises :class:`UserError` naming the row that it cannot render."""
        try:
            return [len(ids) for ids in self.renderer.prompt_ids([prompt.messages for prompt in prompts])]
        except UserError as error:
            if len(prompts) == 1:
                raise UserError(f"{prompts[0].where}: {self.name}: {error}") from None
            return [self.lengths([prompt])[0] for prompt in prompts]


def _answers(teacher: str | None, prompt: Prompt) -> bool:
    """Whether a teacher, or the student, is asked a prompt."""
    return teacher is None or teacher == (prompt.teacher or "teacher")


class Lengths:
    """Measures prompts with every pretrained model that answers them.

    Models yet to be made have no tokenizer: prompts are rendered for them, no more. Servers have neither.
    """

    def __init__(self, config: Config) -> None:
        models: list[tuple[str, str | None, Model]] = [("student", None, config.student)]
        for name, teacher in config.all_teachers().items():
            models.append((f"teachers.{name}" if config.teachers else name, name, teacher))
        self._limits = [
            _limit(name, teacher, model, config.prompts.max_tokens)
            for name, teacher, model in models
            if model.path is not None
        ]
        self._unmade = [
            (name, teacher, compile_template(model.template or "", name))
            for name, teacher, model in models
            if model.scratch is not None and (teacher is None or model.template != config.student.template)
        ]  # the student answers what teachers do

    def check_rendering(self, prompts: Sequence[Prompt]) -> None:
        """Raise :class:`UserError` naming a row that the template of a model yet to be made cannot render."""
        for name, teacher, template in self._unmade:
            for prompt in prompts:
                if _answers(teacher, prompt):
                    try:
                        render(template, prompt.messages, name)
                    except UserError as error:
                        raise UserError(f"{prompt.where}: {error}") from None

    def over_long(self, prompts: Sequence[Prompt]) -> dict[int, str]:
        """Index of every prompt that is too long, with how long it is for which model."""
        found: dict[int, str] = {}
        for limit in self._limits:
            indices = [index for index, prompt in enumerate(prompts) if _answers(limit.teacher, prompt)]
            lengths = limit.lengths([prompts[index] for index in indices])
            for index, tokens in zip(indices, lengths, strict=True):
                if tokens > limit.tokens:
                    found.setdefault(index, f"{tokens:,} tokens for {limit.name}, at most {limit.tokens:,} fit")
        return found

    def truncated(self, prompt: Prompt) -> Prompt:
        """The prompt with as much of its last message as fits. Raises :class:`UserError` where not one character does."""
        *before, last = prompt.messages

        def cut(length: int) -> Prompt:
            return replace(prompt, messages=[*before, {**last, "content": last["content"][:length]}])

        # The tokens of a text that grows by a character may be fewer by some, so what is found fits, and may be a little
        # shorter than the longest that does.
        fits, too_long = 0, len(last["content"])
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self.over_long([cut(middle)]):
                too_long = middle
            else:
                fits = middle
        if not fits:
            raise UserError(
                f"{prompt.where}: even with its last message cut to nothing the prompt has "
                f"{self.over_long([cut(0)]).get(0, 'no room for a character')}. Shorten it, or set prompts.over_long to drop."
            )
        return cut(fits)


def _limit(name: str, teacher: str | None, model: Model, max_tokens: int | None) -> _Limit:
    path = resolve_model(model)
    longest = context_length(path, model) - 1
    return _Limit(f"{name} ({path})", teacher, Renderer(path, model), min(longest, max_tokens or longest))
