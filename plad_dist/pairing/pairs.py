"""Building the pairs of one block: the teacher's responses over the student's, in student tokens.

The steps: read the samples as responses and tokenize them (`responses.py`), score them, and select
pairs from their combinations (`selection.py`). No I/O.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from plad_dist.config import Pairing
from plad_dist.data.schemas import PAIRS
from plad_dist.data.templates import Renderer
from plad_dist.pairing.answer import Answer, Scorer
from plad_dist.pairing.forms import PairForms
from plad_dist.pairing.responses import SampledPrompt, SampledResponse, read_prompts, tokenize
from plad_dist.pairing.selection import Combination, select_pairs
from plad_dist.pairing.tells import TellCounter

_Pair = tuple[SampledPrompt, Combination]


@dataclass(frozen=True)
class PairBuilder:
    """Builds the pairs of a block, and counts the combinations that it drops.

    Attributes:
        renderer: templates and tokenizer of the student.
        context: context length of the student, in tokens.
        scorer: scores single responses; None for `score: none`.
        forms: how the samples become responses of the student.
    """

    pairing: Pairing
    renderer: Renderer
    context: int
    scorer: Scorer | None
    forms: PairForms = field(default_factory=PairForms)

    def build(
        self, prompts: pa.Table, teacher: pa.Table, student: pa.Table, round_: int = 0
    ) -> tuple[pa.Table, Counter[str]]:
        """Build the pairs of a block from its prompts and the samples of both models.

        Returns:
            pairs: rows of the pairs dataset.
            counts: `prompts` and `pairs`; `groups`, `responses:*` and `tokens:*` of what is trained
                on; `unscored` responses; and the counts of
                :func:`~plad_dist.pairing.selection.select_pairs` and
                :class:`~plad_dist.pairing.tells.TellCounter`.
        """
        counts: Counter[str] = Counter()
        tells = TellCounter(self.renderer)
        sampled = read_prompts(prompts, teacher, student, self.pairing, self.renderer, self.forms)
        tells.count_prompts(sampled, counts)
        counts["prompts"] = len(sampled)
        tokenize(sampled, self.renderer, min(self.pairing.max_tokens or self.context, self.context))
        if self.scorer is not None:
            _score(sampled, self.scorer, counts)
        pairs = [(prompt, pair) for prompt in sampled for pair in select_pairs(prompt, self.pairing, counts)]
        counts["pairs"] = len(pairs)
        tells.count(pairs, counts)
        _count_groups(pairs, counts)
        return _table(pairs, round_), counts


def _score(prompts: Sequence[SampledPrompt], scorer: Scorer, counts: Counter[str]) -> None:
    """Score all usable responses. Equal responses of a model to a prompt are scored once."""
    responses: dict[tuple[str, str, str], list[SampledResponse]] = {}
    answers: list[Answer] = []
    for prompt in prompts:
        for response in prompt.usable():
            equal = responses.setdefault((prompt.prompt_id, response.role, response.answer), [])
            if not equal:
                answers.append(
                    Answer(
                        messages=prompt.conversation.messages,
                        tools=prompt.conversation.tools,
                        reference=prompt.reference,
                        response=response.answer,
                        role=response.role,
                    )
                )
            equal.append(response)
    scores = scorer(answers) if answers else []
    for equal, score in zip(responses.values(), scores, strict=True):
        counts["unscored"] += score is None
        for response in equal:
            response.score = score


def _count_groups(pairs: Sequence[_Pair], counts: Counter[str]) -> None:
    """Count groups and their tokens, each distinct response once, as the trainer computes them."""
    sides: dict[str, dict[str, set[tuple[int, ...]]]] = {}
    for prompt, pair in pairs:
        distinct = sides.setdefault(prompt.prompt_id, {"chosen": set(), "rejected": set()})
        if not distinct["chosen"]:
            counts["groups"] += 1
            counts["tokens:prompt"] += len(prompt.prompt_ids)
        for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            ids = tuple(response.ids)
            if ids not in distinct[side]:
                distinct[side].add(ids)
                counts[f"responses:{side}"] += 1
                counts[f"tokens:prompts_of_{side}"] += len(prompt.prompt_ids)
                counts[f"tokens:{side}"] += len(ids)


def _table(pairs: Sequence[_Pair], round_: int) -> pa.Table:
    columns = {
        "prompt_id": [prompt.prompt_id for prompt, _ in pairs],
        "prompt_token_ids": [prompt.prompt_ids for prompt, _ in pairs],
        "chosen_token_ids": [pair.chosen.ids for _, pair in pairs],
        "rejected_token_ids": [pair.rejected.ids for _, pair in pairs],
        "chosen_text": [pair.chosen.text for _, pair in pairs],
        "rejected_text": [pair.rejected.text for _, pair in pairs],
        "chosen_score": [pair.chosen.score for _, pair in pairs],
        "rejected_score": [pair.rejected.score for _, pair in pairs],
        "rejected_logprob": [pair.rejected.logprob for _, pair in pairs],
        "round": [round_] * len(pairs),
    }
    return pa.table(columns, schema=PAIRS)
