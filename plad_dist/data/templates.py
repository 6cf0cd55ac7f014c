"""Rendering of prompts and responses to token ids, shared by sampling and training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2.meta
import jinja2.sandbox

from plad_dist.config import Model
from plad_dist.data.conversation import Conversation
from plad_dist.data.models import check_local_model
from plad_dist.data.sources import JINJA_ERRORS
from plad_dist.errors import UserError, first_line
from plad_dist.fingerprint import fingerprint

_PROBE_RESPONSE = "answer-b1946ac9"  # a text that no template contains


class Renderer:
    """Turns prompts and responses into the token ids of one model.

    Args:
        model: folder or hub name of the model, whose tokenizer is used.
        settings: config section of the model, for its template and revision.
        generates: True for a model that generates responses. False for a model that reads
            conversations with their responses, such as a reward model.

    Raises:
        UserError: the tokenizer cannot be loaded, has no chat template although the config has no
            template, or has no end-of-sequence token although the model generates.
    """

    def __init__(self, model: str, settings: Model, *, generates: bool = True) -> None:
        self.model, self._generates = model, generates
        self.tokenizer = load_tokenizer(model, settings)
        self._template, self._revision = settings.template, settings.revision
        self._jinja = compile_template(settings.template or "", model)
        if self._template is None and self.tokenizer.chat_template is None:
            raise UserError(
                f"{model}: its tokenizer has no chat template. Set `template` beside `path`, for example "
                "template: '{{ messages[-1].content }}'"
            )
        if generates and self.tokenizer.eos_token_id is None:
            raise UserError(f"{model}: its tokenizer has no end-of-sequence token, so a response could never end")

    def prompt_ids(self, prompts: Sequence[Conversation]) -> list[list[int]]:
        """Return the token ids of prompts, with special tokens once. The response follows."""
        texts = [self._render(prompt) for prompt in prompts]
        # A chat template adds the special tokens itself, and so may a template of the config.
        bos = self.tokenizer.bos_token
        needs_special = [self._template is not None and not (bos and text.startswith(bos)) for text in texts]
        with_special = iter(self._encode([text for text, add in zip(texts, needs_special, strict=True) if add], True))
        without = iter(self._encode([text for text, add in zip(texts, needs_special, strict=True) if not add], False))
        return [next(with_special if add else without) for add in needs_special]

    def response_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of finished responses, with the token that ends them."""
        return [[*ids, self.end_id] for ids in self._encode(texts, False)]

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        encoded: list[list[int]] = self.tokenizer(
            list(texts),
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return encoded

    def _render(self, prompt: Conversation) -> str:
        if self._template is not None:
            return render(self._jinja, prompt, self.model)
        try:
            # The library leaves out null contents, so no template prints the word None for them.
            return str(
                self.tokenizer.apply_chat_template(
                    prompt.messages, tools=prompt.tools, add_generation_prompt=self._generates, tokenize=False
                )
            )
        except JINJA_ERRORS as error:
            raise _rendering_error(prompt, self.model, error) from None

    @property
    def identity(self) -> str:
        """Fingerprint of the mapping from texts to tokens."""
        return fingerprint("tokenizer", vocabulary=self.tokenizer.get_vocab(), end_id=self.end_id)

    @cached_property
    def end_id(self) -> int:
        """Token that ends a response.

        It is the first token in :attr:`end_ids` that the chat template puts after a response,
        otherwise end-of-sequence. Many chat models end a turn with another token than the
        end-of-sequence of their tokenizer.
        """
        eos = int(self.tokenizer.eos_token_id)
        if self._template is not None:
            return eos
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE_RESPONSE}]
        try:
            text = str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        except JINJA_ERRORS:
            return eos
        suffix = self._encode([text.rpartition(_PROBE_RESPONSE)[2]], False)[0]
        return next((token for token in suffix if token in self.end_ids), eos)

    @cached_property
    def end_ids(self) -> set[int]:
        """All tokens that can end a response: a generation config may list several."""
        from transformers import GenerationConfig

        try:
            configured = GenerationConfig.from_pretrained(self.model, revision=self._revision).eos_token_id
        except OSError as error:
            if (Path(self.model) / "generation_config.json").is_file():
                raise UserError(f"{self.model}/generation_config.json: cannot be read: {first_line(error)}") from None
            configured = None
        return {
            int(self.tokenizer.eos_token_id),
            *(configured if isinstance(configured, list) else [configured] if configured is not None else []),
        }


def compile_template(template: str, model: str) -> jinja2.Template:
    """Compile a model's template over `messages` and `tools` in a sandbox.

    Raises:
        UserError: the template is invalid, or uses another variable.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    try:
        names = jinja2.meta.find_undeclared_variables(environment.parse(template))
        if unknown := names - {"messages", "tools"} - environment.globals.keys():
            raise UserError(
                f"template of {model}: unknown variable {', '.join(sorted(unknown))}; the variables are `messages` and "
                "`tools`"
            )
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"template of {model}: not a valid Jinja template: {error}") from None


def render(template: jinja2.Template, prompt: Conversation, model: str) -> str:
    """Return the text of a prompt. Raise :class:`UserError` if the template cannot render it."""
    # A turn that only calls tools has a null content, which a template would print as None.
    messages = prompt.with_empty_contents().messages
    try:
        return template.render(messages=messages, tools=prompt.tools)
    except JINJA_ERRORS as error:
        raise _rendering_error(prompt, model, error) from None


def _rendering_error(prompt: Conversation, model: str, error: Exception) -> UserError:
    return UserError(f"template of {model}: cannot render {prompt.messages!r:.80}: {error}")


def load_tokenizer(model: str, settings: Model) -> Any:
    """Return the tokenizer of a model. Raise :class:`UserError` if it cannot be loaded."""
    from transformers import AutoTokenizer

    check_local_model(model)
    try:
        return AutoTokenizer.from_pretrained(
            model, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except Exception as error:  # noqa: BLE001 - config classes, which it reads too, raise their own errors
        raise UserError(f"{model}: its tokenizer cannot be loaded: {first_line(error)}") from None
