"""Prompts and responses as token ids, for sampling and for training alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2.sandbox

from plad_dist.config import Model
from plad_dist.data.models import check_local_model, first_line
from plad_dist.errors import UserError

Messages = list[dict[str, str]]


class Renderer:
    """Turns messages into the token ids that one model sees, and responses into the ids that it should write.

    Args:
        model: folder or hub name of the model whose tokenizer is used.
        settings: the model's config section, for its template and revision.

    Raises:
        UserError: no tokenizer there, no template in it where one is needed, or no end-of-sequence token.
    """

    def __init__(self, model: str, settings: Model) -> None:
        self.model = model
        self.tokenizer = load_tokenizer(model, settings)
        self._template = settings.template
        self._jinja = self._compile(settings.template or "")
        if self._template is None and self.tokenizer.chat_template is None:
            raise UserError(
                f"{model}: its tokenizer has no chat template. Set `template` in the model's config section, for example "
                "template: '{{ messages[-1].content }}'"
            )
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"{model}: its tokenizer has no end-of-sequence token, so no response could ever end")

    def _compile(self, template: str) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
        try:
            return environment.from_string(template)
        except jinja2.TemplateError as error:
            raise UserError(f"template of {self.model}: not a valid Jinja template: {error}") from None

    def prompt_ids(self, prompts: Sequence[Messages]) -> list[list[int]]:
        """Token ids of prompts, each ending where its response begins. Special tokens appear once."""
        texts = [self._render(messages) for messages in prompts]
        # A rendered text that has its special tokens already gets no second ones.
        bos = self.tokenizer.bos_token
        special = self._template is not None and not (bos and texts and texts[0].startswith(bos))
        return self._encode(texts, special)

    def response_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of finished responses, the end-of-sequence token included."""
        return [[*ids, self.eos_id] for ids in self._encode(texts, False)]

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        encoded: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]
        return encoded

    def _render(self, messages: Messages) -> str:
        if self._template is None:
            return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        try:
            return self._jinja.render(messages=messages)
        except jinja2.TemplateError as error:
            raise UserError(f"template of {self.model}: cannot render {messages!r:.80}: {error}") from None

    @property
    def eos_id(self) -> int:
        return int(self.tokenizer.eos_token_id)


def load_tokenizer(model: str, settings: Model) -> Any:
    """The tokenizer of a model. Raises :class:`UserError` where there is none."""
    from transformers import AutoTokenizer

    check_local_model(model)
    try:
        return AutoTokenizer.from_pretrained(
            model, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{model}: no usable tokenizer there: {first_line(error)}") from None
