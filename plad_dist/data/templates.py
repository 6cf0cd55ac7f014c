"""Rendering of prompts and responses to token ids, shared by sampling and training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from plad_dist.config import Config, Model, RewardModel
from plad_dist.data.chat_templates import ChatTemplate, config_template, reads_clock
from plad_dist.data.control_tokens import ControlTokens
from plad_dist.data.conversation import Conversation
from plad_dist.data.models import check_local_model, load_model_config
from plad_dist.data.reasoning import ResponseForm, opened_tag, response_form
from plad_dist.errors import UserError, first_line
from plad_dist.fingerprint import fingerprint

PROBE = Conversation([{"role": "user", "content": "question"}])
_PROBE_ANSWER, _PROBE_THOUGHT = "answer-b1946ac9", "thought-6f1ed002"  # texts that no template contains
_TAIL = 16  # tokens at the end of a prompt that may open a thought


class Renderer:
    """Turns prompts and responses into the token ids of one model.

    Args:
        model: folder or hub name of the model, whose tokenizer is used.
        settings: config section of the model, for its template and revision.
        generates: True for a model that generates responses. False for a model that reads
            conversations with their responses, such as a reward model.

    Attributes:
        uses_config: True if the template is the config's, False if it is the tokenizer's.

    Raises:
        UserError: the tokenizer cannot be loaded, has no chat template although the config has no
            template, or has no end-of-sequence token although the model generates.
    """

    def __init__(self, model: str, settings: Model, *, generates: bool = True) -> None:
        self.model, self._generates = model, generates
        self.tokenizer = load_tokenizer(model, settings)
        self._settings, self.uses_config = settings, settings.template is not None
        self._variables = {**self.tokenizer.special_tokens_map, **settings.template_kwargs}
        if self.uses_config:
            self._config_template = config_template(settings, model, self._variables)
        elif not self.tokenizer.chat_template:
            raise UserError(
                f"{model}: its tokenizer has no chat template. Set `template` beside `path` (for sampling.rejected "
                "that of the student), for example template: '{{ messages[-1].content }}'"
            )
        if generates and self.tokenizer.eos_token_id is None:
            raise UserError(f"{model}: its tokenizer has no end-of-sequence token, so a response could never end")

    # -- texts

    def template(self, prompt: Conversation = PROBE) -> ChatTemplate:
        """Return the template of a prompt. A tokenizer may have one of its own for tools."""
        if self.uses_config:
            return self._config_template
        try:
            text = str(self.tokenizer.get_chat_template(tools=prompt.tools))
        except ValueError as error:
            raise UserError(f"{self.model}: {first_line(error)}") from None
        return ChatTemplate(text, self.model, self._variables, self._settings.today)

    def prompt_text(self, prompt: Conversation) -> str:
        """Return the text of a prompt, which a response follows."""
        return self.template(prompt).render(prompt, add_generation_prompt=self._generates)

    def conversation_text(self, conversation: Conversation) -> str:
        """Return the text of a conversation that ends with a response."""
        return self.template(conversation).render(conversation, add_generation_prompt=False)

    # -- tokens

    def prompt_ids(self, prompts: Sequence[Conversation]) -> list[list[int]]:
        """Return the token ids of prompts, with special tokens once.

        The response follows, so that what the tokenizer appends to whole texts is left out. A model
        that reads conversations and the encoder of an encoder-decoder model read whole texts.
        """
        texts = [self.prompt_text(prompt) for prompt in prompts]
        encoded = self._encode(texts)
        if not self.uses_config:
            return encoded  # a chat template writes the special tokens itself
        (before, after), bos = self._added, self.tokenizer.bos_token  # which a template may write too
        encoded = [
            ids if bos and text.startswith(bos) else [*before, *ids] for text, ids in zip(texts, encoded, strict=True)
        ]
        if not after or not self._reads_whole_texts:
            return encoded
        return [ids if ids[-len(after) :] == after else [*ids, *after] for ids in encoded]

    def standalone_template(self) -> str:
        """Return the config's template with the special tokens that :meth:`prompt_ids` adds to its
        texts, as the chat template of a tokenizer has them."""
        assert self._settings.template is not None
        try:
            text = self.prompt_text(PROBE)
        except UserError:  # such as a template that needs a system message
            text = ""
        before, after = map("".join, map(self.tokenizer.convert_ids_to_tokens, self._added))
        if (bos := self.tokenizer.bos_token) and text.startswith(bos):
            before = ""
        if not self._reads_whole_texts or text.endswith(after):
            after = ""
        start, end = (f"{{{{ {part!r} }}}}" if part else "" for part in (before, after))
        return start + self._settings.template + end

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts that continue a prompt."""
        return self._encode(texts)

    def response_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of finished responses, with the token that ends them.

        For texts from outside, see :attr:`control_tokens` first.
        """
        return [[*ids, self.end_id] for ids in self._encode(texts)]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of tokens, control tokens included."""
        return [
            str(self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))
            for tokens in ids
        ]

    def without_end(self, ids: Sequence[int]) -> list[int]:
        """Return tokens without those at their end that end a response."""
        length = len(ids)
        while length and ids[length - 1] in self.end_ids:
            length -= 1
        return list(ids[:length])

    def opened_tag(self, prompt_ids: Sequence[int]) -> str | None:
        """Return the tag of a thought with which a prompt ends, so that a response begins inside
        the thought."""
        return opened_tag(self.decode([prompt_ids[-_TAIL:]])[0])

    @cached_property
    def _reads_whole_texts(self) -> bool:
        return not self._generates or bool(load_model_config(self.model, self._settings).is_encoder_decoder)

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """Tokens that the tokenizer puts before and after a whole text, such as the begin and the
        end of a sequence."""
        [plain] = self._encode(["a"])
        whole = [int(token) for token in self.tokenizer("a")["input_ids"]]
        starts = range(len(whole) - len(plain) + 1)
        start = next((start for start in starts if whole[start : start + len(plain)] == plain), None)
        if start is None:
            special = set(self.tokenizer.all_special_ids)
            ends = (takewhile(special.__contains__, side) for side in (whole, reversed(whole)))
            before, after = map(list, ends)
            return before, after[::-1]
        return whole[:start], whole[start + len(plain) :]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded: list[list[int]] = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return encoded

    # -- the end of a response

    @property
    def identity(self) -> str:
        """Fingerprint of the mapping from texts to tokens."""
        return fingerprint("tokenizer", vocabulary=self.tokenizer.get_vocab(), end_id=self.end_id)

    @cached_property
    def end_id(self) -> int:
        """Token that ends a response.

        It is the first token in :attr:`end_ids` that the template puts after a response, otherwise
        end-of-sequence. Many chat models end a turn with another token than the end-of-sequence of
        their tokenizer.
        """
        eos = int(self.tokenizer.eos_token_id)
        try:
            text = self.conversation_text(PROBE.with_response(_PROBE_ANSWER))
        except UserError:
            return eos
        _, found, after = text.rpartition(_PROBE_ANSWER)
        suffix = self._encode([after])[0] if found else []
        return next((token for token in suffix if token in self.end_ids), eos)

    @cached_property
    def end_ids(self) -> set[int]:
        """All tokens that can end a response: a generation config may list several."""
        from transformers import GenerationConfig

        try:
            configured = GenerationConfig.from_pretrained(self.model, revision=self._settings.revision).eos_token_id
        except OSError as error:
            if (Path(self.model) / "generation_config.json").is_file():
                raise UserError(f"{self.model}/generation_config.json: cannot be read: {first_line(error)}") from None
            configured = None
        return {
            int(self.tokenizer.eos_token_id),
            *(configured if isinstance(configured, list) else [configured] if configured is not None else []),
        }

    @cached_property
    def control_tokens(self) -> ControlTokens:
        """Tokens that no text from outside may bring into a response."""
        return ControlTokens(self.tokenizer, self.end_ids)

    @cached_property
    def form(self) -> ResponseForm:
        """Form in which the model writes a thought and an answer."""
        try:
            prompt = self.prompt_text(PROBE)
        except UserError:  # such as a template that needs a system message
            return ResponseForm()
        answer = {"role": "assistant", "content": _PROBE_ANSWER}
        texts: list[str | None] = []
        for turn in (answer, answer | {"reasoning_content": _PROBE_THOUGHT}):
            try:
                texts.append(self.conversation_text(Conversation([*PROBE.messages, turn])))
            except UserError:
                texts.append(None)
        return response_form(prompt, texts[0], texts[1], (_PROBE_THOUGHT, _PROBE_ANSWER))


def any_reads_clock(config: Config) -> bool:
    """Return True if the template of any model of a run reads the clock."""
    return any(_reads_clock(model) for model in config.rendering_models().values())


def _reads_clock(model: Model | RewardModel) -> bool:
    if isinstance(model, Model) and (source := model.pretrained()) is not None:
        model = source.settings
    if model.template is not None or model.path is None:
        return reads_clock(model.template or "")
    folder = Path(model.path).expanduser()
    if not folder.is_dir():
        return reads_clock(str(load_tokenizer(model.path, model).chat_template))
    files = (*folder.rglob("*.jinja"), folder / "tokenizer_config.json", folder / "chat_template.json")
    return any(reads_clock(file.read_text(encoding="utf-8", errors="replace")) for file in files if file.is_file())


def load_tokenizer(model: str, settings: Model | RewardModel) -> Any:
    """Return the tokenizer of a model. Raise :class:`UserError` if it cannot be loaded."""
    from transformers import AutoTokenizer

    check_local_model(model)
    try:
        return AutoTokenizer.from_pretrained(
            model, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except Exception as error:  # noqa: BLE001 - config classes, which it reads too, raise their own errors
        raise UserError(f"{model}: its tokenizer cannot be loaded: {first_line(error)}") from None
