"""Checks that tokenizer, template and weights of a model belong together."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from plad_dist.config import Model
from plad_dist.data.conversation import Conversation
from plad_dist.data.reasoning import HARMONY_CHANNEL, TAGS, opened_tag
from plad_dist.data.templates import PROBE, Renderer
from plad_dist.errors import UserError

_ANSWER = "answer-b1946ac9"
_FOLLOW_UP = Conversation(
    [*PROBE.messages, {"role": "assistant", "content": "first answer"}, {"role": "user", "content": "next question"}]
)
_SHOWN = 40


def check_vocabulary(model: str, renderer: Renderer, vocabulary: int) -> None:
    """Check that a model has a row in its embeddings for every token that it may meet.

    Tokens for padding, and special tokens that no template writes, are no problem: no text has
    them.

    Args:
        vocabulary: rows of the embeddings.

    Raises:
        UserError: a token that ends responses, that text can produce, or that the template writes
            has no row.
    """
    tokenizer = renderer.tokenizer
    problem = f"{model}: the model has embeddings for a vocabulary of {vocabulary:,} tokens, but "
    remedy = ": it is the tokenizer of another model; put the tokenizer of this model into the folder"
    if tokenizer.eos_token_id is not None and (ends := sorted(id for id in renderer.end_ids if id >= vocabulary)):
        raise UserError(
            f"{problem}its responses end with {_named(tokenizer, ends)}, which has no row: correct eos_token_id in "
            "generation_config.json and tokenizer_config.json, or put the tokenizer of this model into the folder"
        )
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    try:
        written = set(renderer.prompt_ids([PROBE])[0])
    except UserError:  # a template that needs another conversation; the prompts will show
        written = set()
    outside = [id for id in tokenizer.get_vocab().values() if id >= vocabulary and (id not in special or id in written)]
    if outside:
        raise UserError(
            f"{problem}its tokenizer has {len(outside):,} more, such as {_named(tokenizer, outside)}{remedy}"
        )


def _named(tokenizer: Any, tokens: list[int]) -> str:
    text = tokenizer.convert_ids_to_tokens(tokens[0])
    return f"token {tokens[0]}" + ("" if text is None else f" ({text})")


def template_warnings(renderer: Renderer, settings: Model) -> Iterator[str]:
    """Yield what is strange about a model's template, with the text that differs.

    A prompt followed by a response should be the beginning of the rendered conversation, as the
    model was trained on. A template that takes thoughts out of earlier turns is fine: only the last
    response is compared.
    """
    template = renderer.template()
    if unused := template.unused(settings.template_kwargs):
        yield f"template_kwargs: the template uses no variable named {', '.join(unused)}, so it has no effect"
    if renderer.uses_config and not template.has_generation_prompt:
        return  # a template for prompts only
    for prompt in (_FOLLOW_UP, PROBE):
        try:
            text = renderer.prompt_text(prompt)
            whole = renderer.conversation_text(prompt.with_response(_ANSWER))
        except UserError:
            continue  # such as a template that takes no second turn
        yield from _prefix_warnings(renderer, text, whole)
        return


def _prefix_warnings(renderer: Renderer, prompt: str, whole: str) -> Iterator[str]:
    opened = opened_tag(prompt)
    if opened is not None and not whole.startswith(prompt):
        prompt = prompt.rstrip().removesuffix(opened)  # the conversation has no thought to open
    if not whole.startswith(prompt):
        at = next((at for at, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]), len(whole))
        yield (
            "the rendered conversation does not begin with the rendered prompt, so a response is sampled after another "
            f"text than the model was trained on: the prompt has {prompt[at : at + _SHOWN]!r} where the conversation "
            f"has {whole[at : at + _SHOWN]!r}; correct the chat template, or set `template`"
        )
        return
    between, found, after = whole[len(prompt) :].partition(_ANSWER)
    if not found:
        yield "the template does not show a response as it is; set `template` if that is not meant"
        return
    if between.strip() and HARMONY_CHANNEL not in between and not any(closing in between for _, closing in TAGS):
        yield (
            f"prompts have no generation prompt: {between!r} precedes a response in a conversation, but does not end "
            "a prompt; correct the chat template (`add_generation_prompt`), or set `template`"
        )
    elif between and not between.strip():
        yield (
            f"the template puts {between!r} before a response, but does not end a prompt with it; correct the chat "
            "template, or set `template`"
        )
    end = str(renderer.tokenizer.convert_ids_to_tokens(renderer.end_id))
    if not after.lstrip().startswith(end):
        yield (
            f"the template puts {after[:_SHOWN]!r} after a response, which is not the token {end} that ends responses "
            "here; see eos_token_id in generation_config.json"
        )


def check_loaded(model: str, missing: Collection[str]) -> None:
    """Raise :class:`UserError` if the files of a loaded model lack weights.

    transformers has filled them with random numbers, and only warns.

    Args:
        missing: `missing_keys` of transformers' loading info.
    """
    if missing:
        raise UserError(f"{model}: its files lack {len(missing)} weights of the model, such as {min(missing)}")
