"""What one response is worth beside a reference, and by itself."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from plad_dist.systems import PLAD, System

# Scripts written without spaces, whose characters count as words: Thai, Lao, Burmese, Khmer, Chinese, Japanese.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\U00020000-\U0003ffff]")


def _words(text: str) -> list[str]:
    spaced = _UNSPACED.sub(r" \g<0> ", text.casefold())
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in spaced).split()  # letter, mark, number


_ASCII_WORDS = re.compile("[a-z0-9]+")


def rouge_l(reference: str, text: str) -> float:
    """ROUGE-L F1 in 0..1: `2PR / (P + R)`, `P = LCS / words of text`, `R = LCS / words of reference` (Lin 2004).

    The figure of the `rouge_score` package, without stemming, some twenty times as fast: responses are scored by the
    million. The package drops every letter outside a-z, which would score other scripts 0; where the reference has such
    letters, words are split by Unicode instead.
    """
    expected, found = _both_words(reference, text)
    return _f1(_common_words(expected, found), len(expected), len(found))


def rouge_n(reference: str, text: str, n: int) -> float:
    """ROUGE-N F1 in 0..1 over word n-grams, each counted as often as both texts have it (Lin 2004)."""
    expected, found = (_ngrams(words, n) for words in _both_words(reference, text))
    return _f1((expected & found).total(), expected.total(), found.total())


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def _f1(common: int, expected: int, found: int) -> float:
    if not common:
        return 0.0
    precision, recall = common / found, common / expected
    return 2 * precision * recall / (precision + recall)


def _both_words(reference: str, text: str) -> tuple[list[str], list[str]]:
    """The words of both, split as the script of the reference needs it."""
    if reference.isascii() or not any(c.isalpha() and not c.isascii() for c in reference):
        return _ASCII_WORDS.findall(reference.lower()), _ASCII_WORDS.findall(text.lower())
    return _words(reference), _words(text)


def _common_words(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, with a row of its table in one integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << place
    row = every = (1 << len(a)) - 1
    for place in filter(None, map(places.get, b)):
        matches = row & place
        row = (row + matches) | (row - matches)
    return len(a) - (row & every).bit_count()


def exact_match(reference: str, text: str) -> float:
    """1 where the text is the reference, up to case and white space, else 0."""
    return float(" ".join(reference.split()).casefold() == " ".join(text.split()).casefold())


def repetition(text: str) -> float:
    """Share of word 3-grams that occurred before in the text: `1 - distinct / all` (rep-3); 0 below two 3-grams."""
    words = _words(text)
    count = len(words) - 2
    if count < 2:
        return 0.0
    return 1.0 - len(set(zip(words, words[1:], words[2:], strict=False))) / count


Scores = npt.NDArray[np.float64]


def wins(a_P: Scores, b_P: Scores) -> Scores:
    """1 where a is better, 0.5 for a tie (to 1e-9, as equal F1 may differ by rounding), 0 where b is; NaN stays."""
    return np.where(np.isclose(a_P, b_P, rtol=0.0, atol=1e-9), 0.5, np.where(np.isnan(a_P - b_P), np.nan, a_P > b_P))


Key = tuple[System, str]  # a system under a decoding


@dataclass(frozen=True)
class Output:
    """One response. `finished`: it ended with end-of-sequence or a stop string, not at the token limit."""

    text: str
    num_tokens: int
    finished: bool


def main_decoding(scores: Collection[Key], temperatures: Mapping[str, float]) -> str:
    """`sampled` where there is one, else the hottest decoding of the distilled student (or of whoever is there)."""
    names = [d for s, d in scores if s == PLAD] or [d for _, d in scores]
    return "sampled" if "sampled" in names else max(names, key=lambda name: temperatures[name])
