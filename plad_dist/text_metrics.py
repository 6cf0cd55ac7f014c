"""Metrics of single responses: ROUGE and exact match against a reference, repetition, and wins.

The evaluation, the collapse watch and the scores of pairs share these functions. The module also
defines how the outputs of an evaluation are keyed (by system and decoding) and which decoding is
the main one.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from plad_dist.systems import PLAD, System

# Scripts written without spaces, whose characters count as words: Thai, Lao, Burmese, Khmer,
# Chinese, Japanese.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\U00020000-\U0003ffff]")


MAX_WORDS = 10_000  # of a text that ROUGE compares
_MAX_CHARACTERS = 100 * MAX_WORDS
_ASCII_WORDS = re.compile("[a-z0-9]+")

Scores = npt.NDArray[np.float64]  # [P]: one number per prompt; NaN if there is none
SystemDecoding = tuple[System, str]  # a system under a decoding


@dataclass(frozen=True)
class Output:
    """Response of a system to one held-out prompt.

    Attributes:
        text: the response.
        num_tokens: its length in tokens of the model that generated it.
        finished: True if it ended with end-of-sequence or a stop string, False if it reached the
            token limit.
    """

    text: str
    num_tokens: int
    finished: bool


def main_decoding(outputs: Collection[SystemDecoding], temperatures: Mapping[str, float]) -> str:
    """Return the name of the decoding under which judges decide and the report compares first.

    Only the decodings of the PLaD student count, or those of all systems if it is not among them.
    The main decoding is `sampled` if it exists, otherwise the one with the highest temperature.

    Args:
        outputs: systems with their decodings.
        temperatures: temperature of every decoding.
    """
    names = [decoding for system, decoding in outputs if system == PLAD] or [decoding for _, decoding in outputs]
    return "sampled" if "sampled" in names else max(names, key=lambda name: temperatures[name])


# -- ROUGE


def rouge_l(reference: str, text: str) -> float:
    """Return ROUGE-L F1 in 0..1 (Lin 2004).

    F1 is `2PR / (P + R)` with `P = LCS / words of text` and `R = LCS / words of reference`, where
    LCS is the length of the longest common subsequence of words.

    The result equals that of the `rouge_score` package without stemming, and is computed about 20
    times as fast, because millions of responses are scored. The package drops every letter outside
    a-z, so it scores other scripts 0; if the reference has such letters, words are split by Unicode
    categories instead.
    """
    reference_words, text_words = _split_words(reference, text)
    common = _longest_common_subsequence(reference_words, text_words)
    return _f1(common, len(reference_words), len(text_words))


def rouge_n(reference: str, text: str, n: int) -> float:
    """Return ROUGE-N F1 in 0..1 over word n-grams (Lin 2004).

    An n-gram counts as often as it occurs in both texts.
    """
    reference_ngrams, text_ngrams = (_ngrams(words, n) for words in _split_words(reference, text))
    common = (reference_ngrams & text_ngrams).total()
    return _f1(common, reference_ngrams.total(), text_ngrams.total())


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def _f1(common: int, reference_size: int, text_size: int) -> float:
    if not common:
        return 0.0
    precision, recall = common / text_size, common / reference_size
    return 2 * precision * recall / (precision + recall)


def _split_words(reference: str, text: str) -> tuple[list[str], list[str]]:
    """Return the words of both texts, split as the script of the reference requires.

    Only the first words of a text count, because the time to compare two texts grows with the
    product of their lengths.
    """
    reference, text = reference[:_MAX_CHARACTERS], text[:_MAX_CHARACTERS]
    reference_words, text_words = _all_words(reference, text)
    return reference_words[:MAX_WORDS], text_words[:MAX_WORDS]


def _all_words(reference: str, text: str) -> tuple[list[str], list[str]]:
    if reference.isascii() or not any(c.isalpha() and not c.isascii() for c in reference):
        return _ASCII_WORDS.findall(reference.lower()), _ASCII_WORDS.findall(text.lower())
    return _unicode_words(reference), _unicode_words(text)


def _unicode_words(text: str) -> list[str]:
    spaced = _UNSPACED.sub(r" \g<0> ", text.casefold())
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in spaced).split()  # letter, mark, number


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length. A row of the table is one integer, a bit per word of `a` (Hyyrö 2004)."""
    positions: dict[str, int] = {}
    for position, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << position
    row = all_bits = (1 << len(a)) - 1
    for word_bits in filter(None, map(positions.get, b)):
        matches = row & word_bits
        row = (row + matches) | (row - matches)
    return len(a) - (row & all_bits).bit_count()


# -- other metrics


def exact_match(reference: str, text: str) -> float:
    """Return 1 if the text equals the reference except for case and white space, else 0."""
    return float(" ".join(reference.split()).casefold() == " ".join(text.split()).casefold())


def repetition(text: str) -> float:
    """Return the share of word 3-grams that repeat an earlier one: `1 - distinct / all` (rep-3).

    It is 0 for a text with fewer than two 3-grams.
    """
    words = _unicode_words(text)
    count = len(words) - 2
    if count < 2:
        return 0.0
    return 1.0 - len(set(zip(words, words[1:], words[2:], strict=False))) / count


def wins(a_P: Scores, b_P: Scores) -> Scores:
    """Return for every prompt 1 if `a` has the higher score, 0 if `b` has, and 0.5 for a tie.

    Scores within 1e-9 are tied, because equal F1 values can differ by rounding. NaN in either gives
    NaN.

    Args:
        a_P: scores of one system, shape [P] (P prompts).
        b_P: scores of the other system, shape [P].
    """
    return np.where(np.isclose(a_P, b_P, rtol=0.0, atol=1e-9), 0.5, np.where(np.isnan(a_P - b_P), np.nan, a_P > b_P))
