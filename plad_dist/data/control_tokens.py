"""Control tokens in text from outside: references, responses of other models, user messages.

A tokenizer turns a text such as `<|im_end|>` into the token that ends a turn, whoever wrote it. In
a response that the student learns, such a token would teach it to end or to begin turns.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

from plad_dist.data.reasoning import TAGS

# A student may learn to write these.
_OF_THOUGHTS = {tag for pair in TAGS for tag in pair}


class ControlTokens:
    """Special tokens of a tokenizer, as tokens and as texts.

    Args:
        end_ids: tokens that end a response.
    """

    def __init__(self, tokenizer: Any, end_ids: Collection[int]) -> None:
        special = {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        texts = {token: text for token, text in special.items() if text not in _OF_THOUGHTS}
        ends = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in end_ids if token < len(tokenizer)}
        # A token for unknown characters comes from any text.
        self._ids = (texts.keys() | ends.keys()) - {tokenizer.unk_token_id}
        self._texts, self._end_texts = sorted({*texts.values(), *ends.values()}), sorted(ends.values())

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts of the tokens, sorted."""
        return tuple(self._texts)

    @cached_property
    def _any(self) -> re.Pattern[str]:
        return any_of(self._texts)

    @cached_property
    def _ends(self) -> re.Pattern[str]:
        ends = "|".join(map(re.escape, self._end_texts))
        return re.compile(rf"(?:{ends})(?:\s*(?:{ends}))*\s*\Z" if ends else "(?!)")

    def without_end(self, text: str) -> str:
        """Return a text without the tokens at its end that end a response."""
        return self._ends.sub("", text)

    def find(self, text: str) -> str | None:
        """Return the first control token in a text, or None."""
        match = self._any.search(text)
        return match[0] if match else None

    def has_any(self, ids: Sequence[int]) -> bool:
        """Return True if tokens contain a control token."""
        return not self._ids.isdisjoint(ids)


def any_of(texts: Collection[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of the texts, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
