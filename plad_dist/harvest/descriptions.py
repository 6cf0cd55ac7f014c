"""The text rules of the harvest: names and descriptions as lower-cased words, and near duplicates."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

NAME_WORD = re.compile(r"[A-Z]+(?![a-z])[0-9]*|[A-Z]?[a-z0-9]+")  # get_2d, readHTTPBody, Conv2d


TEXT_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


PARAGRAPH_END = re.compile(r"\n\s*(?:\n|:\w[^`\n]*:\s|[@>*+#|-]|\w+:\s*\n|[=~^]{3})")


SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!\bvs)(?<!\betc)[.!?](?=\s|$)")


ROLE = re.compile(r":[\w:+-]+:`~?([^`<]*)(?:<[^`]*>)?`")  # :class:`Name`, :func:`text <target>`


MARKUP = re.compile(r"[`\"*]|(?<!\w)'|'(?!\w)")


CODE = re.compile(r"://|www\.|>>>|[=<>{}\[\]|\\@$%^~;#]|[^\W\x00-\x7f]")  # or letters beyond ASCII


STOP_WORDS = frozenset(
    re.findall(r"\w+", "a an the this that its it is are be of to in on for with from by and or as at")
)


MAX_OTHER_SHARE = 0.15  # of the characters of a description: neither letters nor spaces


def function_name(identifier: str) -> str | None:
    """An identifier as lower-cased words, or None where it is no good answer: dunder, test, too short or too long."""
    bare = identifier.strip("_")
    if not bare.isascii() or bare.lower().startswith("test") or (identifier[:2] == "__" == identifier[-2:]):
        return None
    words = [word.lower() for word in NAME_WORD.findall(bare)]
    if not 1 <= len(words) <= 6 or not any(sum(map(str.isalpha, word)) >= 3 for word in words):
        return None
    return " ".join(words)


def describe(docstring: str) -> str | None:
    """The first sentence of a docstring as lower-cased words, or None where that is not 3 to 24 words of plain text."""
    paragraph = PARAGRAPH_END.split("\n" + docstring.strip(), maxsplit=1)[0]
    sentence = SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)[0]
    text = MARKUP.sub("", ROLE.sub(r"\1", sentence.replace("\u2019", "'")))
    others = sum(not (letter.isalpha() or letter.isspace()) for letter in text)
    if CODE.search(text) or others > MAX_OTHER_SHARE * len(text):
        return None
    words = TEXT_WORD.findall(text.lower())
    return " ".join(words) if 3 <= len(words) <= 24 else None


class NearDuplicates:
    """Whether a description is nearly one of those given: the same words but for stop words, or four in five shared.

    The second (a Jaccard index of 0.8 or more of the sets of words) is exact and fast: two such sets must share one of
    their rarest words, as many as a set can miss of the other and one more, so only these are looked up.
    """

    def __init__(self, descriptions: Iterable[str]) -> None:
        sets = [frozenset(description.split()) for description in descriptions]
        self.contents = {words - STOP_WORDS for words in sets}
        self.frequency = Counter(word for words in sets for word in words)
        self.by_word: dict[str, list[frozenset[str]]] = defaultdict(list)
        for words in sets:
            for word in self._rarest(words):
                self.by_word[word].append(words)

    def __contains__(self, description: str) -> bool:
        words = frozenset(description.split())
        if words - STOP_WORDS in self.contents:
            return True
        near = (other for word in self._rarest(words) for other in self.by_word.get(word, ()))
        return any(5 * len(words & other) >= 4 * len(words | other) for other in near)

    def _rarest(self, words: frozenset[str]) -> list[str]:
        shared = -(-4 * len(words) // 5)  # so many words at least are in a near duplicate
        return sorted(words, key=lambda word: (self.frequency[word], word))[: len(words) - shared + 1]
