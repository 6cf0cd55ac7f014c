"""Prompts and responses as token ids, for sampling and for training alike."""

from __future__ import annotations

from functools import cached_property
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
        if self._template is None and self.tokenizer.chat_template is None:
            raise UserError(
                f"{model}: its tokenizer has no chat template. Set `template` in the model's config section, for example "
                "template: '{{ messages[-1].content }}'"
            )
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"{model}: its tokenizer has no end-of-sequence token, so no response could ever end")

    @cached_property
    def _jinja(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
        try:
            return environment.from_string(self._template or "")
        except jinja2.TemplateError as error:
            raise UserError(f"template of {self.model}: not a valid Jinja template: {error}") from None

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Token ids of a prompt, ending where the response begins. Special tokens appear once."""
        if self._template is None:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            return self.tokenizer.encode(text, add_special_tokens=False)
        try:
            text = self._jinja.render(messages=messages)
        except jinja2.TemplateError as error:
            raise UserError(f"template of {self.model}: cannot render {messages!r:.80}: {error}") from None
        bos = self.tokenizer.bos_token
        return self.tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos)))

    def response_ids(self, text: str) -> list[int]:
        """Token ids of a finished response, the end-of-sequence token included."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.eos_id]

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
