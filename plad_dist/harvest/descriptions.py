"""Text rules of the harvest: names and descriptions as lower-case words, and near duplicates."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

STOP_WORDS = frozenset(
    re.findall(r"\w+", "a an the this that its it is are be of to in on for with from by and or as at")
)
_NAME_WORD = re.compile(r"[A-Z]+(?![a-z])[0-9]*|[A-Z]?[a-z0-9]+")  # get_2d, readHTTPBody, Conv2d
_TEXT_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
_PARAGRAPH_END = re.compile(r"\n\s*(?:\n|:\w[^`\n]*:\s|[@>*+#|-]|\w+:\s*\n|[=~^]{3})")
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!\bvs)(?<!\betc)[.!?](?=\s|$)")
_ROLE = re.compile(r":[\w:+-]+:`~?([^`<]*)(?:<[^`]*>)?`")  # :class:`Name`, :func:`text <target>`
_MARKUP = re.compile(r"[`\"*]|(?<!\w)'|'(?!\w)")
_CODE = re.compile(r"://|www\.|>>>|[=<>{}\[\]|\\@$%^~;#]|[^\W\x00-\x7f]")  # also letters beyond ASCII
_MAX_SYMBOL_SHARE = 0.15  # share of the characters of a description that are neither letters nor spaces


def function_name(identifier: str) -> str | None:
    """Return an identifier as one to six lower-case words.

    None if it is not a useful name: a dunder name, a test, not ASCII, too short or too long.
    """
    bare = identifier.strip("_")
    if not bare.isascii() or bare.lower().startswith("test") or (identifier[:2] == "__" == identifier[-2:]):
        return None
    words = [word.lower() for word in _NAME_WORD.findall(bare)]
    if not 1 <= len(words) <= 6 or not any(sum(map(str.isalpha, word)) >= 3 for word in words):
        return None
    return " ".join(words)


def describe(docstring: str) -> str | None:
    """Return the first sentence of a docstring as 3 to 24 lower-case words.

    None if the sentence has another length or is not plain text.
    """
    paragraph = _PARAGRAPH_END.split("\n" + docstring.strip(), maxsplit=1)[0]
    sentence = _SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)[0]
    text = _MARKUP.sub("", _ROLE.sub(r"\1", sentence.replace("\u2019", "'")))
    symbols = sum(not (character.isalpha() or character.isspace()) for character in text)
    if _CODE.search(text) or symbols > _MAX_SYMBOL_SHARE * len(text):
        return None
    words = _TEXT_WORD.findall(text.lower())
    return " ".join(words) if 3 <= len(words) <= 24 else None


class NearDuplicates:
    """Collection of descriptions that contains every near duplicate of its members.

    Two descriptions are near duplicates if they have the same words except for stop words, or if
    the Jaccard index of their sets of words is at least 0.8. The second test is exact and fast. A
    set of `n` words must share at least `s = ceil(0.8 n)` of them, so one of its `n - s + 1` rarest
    words is also among the rarest words of the other set, and only such sets are compared.
    """

    def __init__(self, descriptions: Iterable[str]) -> None:
        sets = [frozenset(description.split()) for description in descriptions]
        self._content_words = {words - STOP_WORDS for words in sets}
        self._frequency = Counter(word for words in sets for word in words)
        self._by_rare_word: dict[str, list[frozenset[str]]] = defaultdict(list)
        for words in sets:
            for word in self._rarest(words):
                self._by_rare_word[word].append(words)

    def __contains__(self, description: str) -> bool:
        words = frozenset(description.split())
        if words - STOP_WORDS in self._content_words:
            return True
        candidates = (other for word in self._rarest(words) for other in self._by_rare_word.get(word, ()))
        return any(5 * len(words & other) >= 4 * len(words | other) for other in candidates)

    def _rarest(self, words: frozenset[str]) -> list[str]:
        min_shared = -(-4 * len(words) // 5)  # a near duplicate shares at least four fifths, rounded up
        return sorted(words, key=lambda word: (self._frequency[word], word))[: len(words) - min_shared + 1]
