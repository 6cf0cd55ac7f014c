"""Signs in pairs that tell chosen from rejected responses, or that neither is what was meant.

A student learns such a sign instead of the difference in quality: a space that begins the responses
of one side only, a thought that only one side has, a tag without its counterpart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache

from plad_dist.data.reasoning import has_unmatched_tags
from plad_dist.data.templates import Renderer
from plad_dist.pairing.facts import PairFacts
from plad_dist.pairing.responses import SampledPrompt
from plad_dist.pairing.selection import Combination

_FEWEST_PAIRS = 16  # below, a difference may be chance
_OFTEN, _RARELY = 0.5, 0.02  # shares of the two sides between which a first token tells them apart
_FEW = 0.01  # share of responses with a thought that counts as none


class TellCounter:
    """Counts signs in the pairs of a block.

    Args:
        renderer: templates and tokenizer of the student.
    """

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._kind = cache(self._kind_of_token)

    def count(self, pairs: Iterable[tuple[SampledPrompt, Combination]], counts: Counter[str]) -> None:
        """Add the counts of pairs by side: `first:*`, `thought:*` and `unmatched:*`; and `opened`,
        the pairs whose prompt opens a thought."""
        for prompt, pair in pairs:
            opened = self._renderer.opened_tag(prompt.prompt_ids)
            counts["opened"] += opened is not None
            for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                counts[f"first:{side}:{self._kind(response.ids[0])}"] += 1
                counts[f"thought:{side}"] += response.has_thought
                counts[f"unmatched:{side}"] += has_unmatched_tags(response.text, opened)

    def count_prompts(self, prompts: Sequence[SampledPrompt], counts: Counter[str]) -> None:
        """Add `control_prompts`: the prompts in whose messages users wrote control tokens."""
        find = self._renderer.control_tokens.find
        counts["control_prompts"] += sum(
            any(find(message.get("content") or "") for message in prompt.conversation.messages) for prompt in prompts
        )

    def _kind_of_token(self, token: int) -> str:
        if token in self._renderer.end_ids:
            return "the end token"
        piece = str(self._renderer.tokenizer.convert_ids_to_tokens(token))
        [text] = self._renderer.decode([[token]])
        if piece[:1] in ("▁", "Ġ", " ") or text[:1] == " ":
            return "a space"
        if not text.strip():
            return "white space"
        first = text.lstrip()[0]
        if text.startswith("<"):
            return "a tag"
        if first.isdigit():
            return "a digit"
        if first.isalpha():
            return "a capital" if first.isupper() else "a letter"
        return "another character"


def warnings(facts: PairFacts) -> list[str]:
    """Return what is wrong with the pairs of a dataset, and what to do about it."""
    return [*_first_token_warnings(facts), *_thought_warnings(facts), *_tag_warnings(facts)]


def _first_token_warnings(facts: PairFacts) -> list[str]:
    if facts.pairs < _FEWEST_PAIRS:
        return []
    shares = {
        kind: tuple(facts.first_tokens[side].get(kind, 0) / facts.pairs for side in ("chosen", "rejected"))
        for kind in sorted({*facts.first_tokens["chosen"], *facts.first_tokens["rejected"]})
    }
    tells = {kind: pair for kind, pair in shares.items() if max(pair) >= _OFTEN and min(pair) <= _RARELY}
    if not tells:
        return []
    kind, (chosen, rejected) = max(tells.items(), key=lambda item: (abs(item[1][0] - item[1][1]), item[1]))
    return [
        f"the first token tells chosen from rejected responses: {chosen:.0%} of chosen ones begin with {kind}, "
        f"{rejected:.0%} of rejected ones, and the student may learn no more than that; see whether the prompts of "
        "student.template end as those of the teacher do, with or without a space"
    ]


def _thought_warnings(facts: PairFacts) -> list[str]:
    chosen, rejected = (facts.thoughts[side] / facts.pairs for side in ("chosen", "rejected"))
    texts = []
    if chosen == 0 and rejected > _FEW:
        texts.append(
            f"{rejected:.0%} of rejected responses have a thought, chosen ones have none, so the student would learn "
            "not to think; turn its thoughts off by student.template_kwargs (such as enable_thinking: false), or set "
            "`reasoning: keep` for the teacher"
        )
    if chosen == 0 and facts.opened:
        texts.append(
            "the student's prompts open a thought, but chosen responses have none; turn its thoughts off by "
            "student.template_kwargs, or set `reasoning: keep` for the teacher"
        )
    return texts


def _tag_warnings(facts: PairFacts) -> list[str]:
    texts = []
    chosen, rejected = (facts.unmatched_tags[side] for side in ("chosen", "rejected"))
    if chosen or rejected:
        texts.append(
            f"{chosen:,} chosen and {rejected:,} rejected responses open or close a thought without its counterpart, "
            "such as <think> without </think>"
        )
    if facts.control_prompts:
        texts.append(
            f"{facts.control_prompts:,} prompts hold control tokens of the student in the text of a message, which "
            "the template takes for its own; remove them from the source if they are not meant"
        )
    return texts
