"""Prompts and responses as token ids, for sampling and for training alike."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2.meta
import jinja2.sandbox

from plad_dist.config import Model
from plad_dist.data.models import check_local_model
from plad_dist.data.sources import JINJA_ERRORS
from plad_dist.errors import UserError, first_line
from plad_dist.fingerprint import fingerprint

Messages = list[dict[str, str]]
_ANSWER = "answer-b1946ac9"  # what no template has of itself


class Renderer:
    """Turns messages into the token ids that one model sees, and responses into the ids that it should write.

    Args:
        model: folder or hub name of the model whose tokenizer is used.
        settings: the model's config section, for its template and revision.
        answers: the model writes responses. A model that reads them is given messages with the response among them.

    Raises:
        UserError: no tokenizer there, no template in it where one is needed, or no end-of-sequence token to answer with.
    """

    def __init__(self, model: str, settings: Model, *, answers: bool = True) -> None:
        self.model, self._answers = model, answers
        self.tokenizer = load_tokenizer(model, settings)
        self._template, self._revision = settings.template, settings.revision
        self._jinja = compile_template(settings.template or "", model)
        if self._template is None and self.tokenizer.chat_template is None:
            raise UserError(
                f"{model}: its tokenizer has no chat template. Set `template` beside `path`, for example "
                "template: '{{ messages[-1].content }}'"
            )
        if answers and self.tokenizer.eos_token_id is None:
            raise UserError(f"{model}: its tokenizer has no end-of-sequence token, so no response could ever end")

    def prompt_ids(self, prompts: Sequence[Messages]) -> list[list[int]]:
        """Token ids of prompts, each ending where its response begins. Special tokens appear once."""
        texts = [self._render(messages) for messages in prompts]
        # A text that begins with its special token already gets no second one.
        bos = self.tokenizer.bos_token
        bare = [self._template is not None and not (bos and text.startswith(bos)) for text in texts]
        with_special = iter(self._encode([text for text, add in zip(texts, bare, strict=True) if add], True))
        without = iter(self._encode([text for text, add in zip(texts, bare, strict=True) if not add], False))
        return [next(with_special if add else without) for add in bare]

    def response_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of finished responses, the token that ends them included."""
        return [[*ids, self.end_id] for ids in self._encode(texts, False)]

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        encoded: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]
        return encoded

    def _render(self, messages: Messages) -> str:
        if self._template is not None:
            return render(self._jinja, messages, self.model)
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, add_generation_prompt=self._answers, tokenize=False)
            )
        except JINJA_ERRORS as error:
            raise _cannot_render(messages, self.model, error) from None

    @property
    def identity(self) -> str:
        """Fingerprint of how texts become tokens."""
        return fingerprint("tokenizer", vocabulary=self.tokenizer.get_vocab(), end_id=self.end_id)

    @cached_property
    def end_id(self) -> int:
        """The token that ends a response: the one of :attr:`end_ids` that the chat template puts there, else end-of-sequence.

        Chat models are often trained to end a turn by another token than their tokenizer's end-of-sequence.
        """
        eos = int(self.tokenizer.eos_token_id)
        if self._template is not None:
            return eos
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        except JINJA_ERRORS:
            return eos
        after = self._encode([text.rpartition(_ANSWER)[2]], False)[0]
        return next((token for token in after if token in self.end_ids), eos)

    @cached_property
    def end_ids(self) -> set[int]:
        """Every token with which the model ends a response: generation configs may name several."""
        from transformers import GenerationConfig

        try:
            named = GenerationConfig.from_pretrained(self.model, revision=self._revision).eos_token_id
        except OSError as error:
            if (Path(self.model) / "generation_config.json").is_file():
                raise UserError(f"{self.model}/generation_config.json: cannot be read: {first_line(error)}") from None
            named = None
        return {
            int(self.tokenizer.eos_token_id),
            *(named if isinstance(named, list) else [named] if named is not None else []),
        }


def compile_template(template: str, model: str) -> jinja2.Template:
    """A model's template over `messages`, sandboxed. Raises :class:`UserError` where it is none."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    try:
        names = jinja2.meta.find_undeclared_variables(environment.parse(template))
        if unknown := names - {"messages"} - environment.globals.keys():
            raise UserError(f"template of {model}: there is no {', '.join(sorted(unknown))}; it is given `messages`")
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"template of {model}: not a valid Jinja template: {error}") from None


def render(template: jinja2.Template, messages: Messages, model: str) -> str:
    """The text of a prompt. Raises :class:`UserError` where the model's template cannot render it."""
    try:
        return template.render(messages=messages)
    except JINJA_ERRORS as error:
        raise _cannot_render(messages, model, error) from None


def _cannot_render(messages: Messages, model: str, error: Exception) -> UserError:
    return UserError(f"template of {model}: cannot render {messages!r:.80}: {error}")


def load_tokenizer(model: str, settings: Model) -> Any:
    """The tokenizer of a model. Raises :class:`UserError` where there is none."""
    from transformers import AutoTokenizer

    check_local_model(model)
    try:
        return AutoTokenizer.from_pretrained(
            model, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except Exception as error:  # noqa: BLE001 - it reads the model's config too, whose classes have errors of their own
        raise UserError(f"{model}: no usable tokenizer there: {first_line(error)}") from None
