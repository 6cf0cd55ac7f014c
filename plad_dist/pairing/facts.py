"""Facts about a dataset of pairs: the counts that its manifest holds and the run reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from plad_dist.data.manifest import Manifest
from plad_dist.data.parts import Part
from plad_dist.errors import RunFailed

_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class PairFacts:
    """Counts of a pairs dataset. The field names are keys of the manifest's facts.

    The shares compare the scores of all usable combinations of a teacher and a student response of
    the same prompt, not only of the kept pairs. They measure the capacity gap. They are None if no
    combination has two scores.

    Attributes:
        prompts: prompts with samples.
        pairs: kept pairs.
        drops: dropped combinations by reason.
        teacher_better_share: share of combinations in which the teacher's response has the higher
            score.
        teacher_worse_share: share of combinations in which the student's response has the higher
            score.
        scored: combinations with two scores.
        unscored: distinct responses without a score.
        first_tokens: pairs by the kind of the first token, of each side.
        thoughts: pairs whose response has a thought, of each side.
        unmatched_tags: pairs whose response opens or closes a thought without its counterpart, of
            each side.
        opened: pairs whose prompt opens a thought.
        control_prompts: prompts with control tokens of the student in the text of a message.
    """

    prompts: int
    pairs: int
    drops: Mapping[str, int]
    teacher_better_share: float | None
    teacher_worse_share: float | None
    scored: int
    unscored: int
    first_tokens: Mapping[str, Mapping[str, int]]
    thoughts: Mapping[str, int]
    unmatched_tags: Mapping[str, int]
    opened: int
    control_prompts: int

    @classmethod
    def from_counts(cls, counts: Mapping[str, int]) -> PairFacts:
        """Sum up the counts of a :class:`~plad_dist.pairing.pairs.PairBuilder`."""
        better, worse, equal = (counts.get(name, 0) for name in ("better", "worse", "equal"))
        scored = better + worse + equal
        return cls(
            prompts=counts.get("prompts", 0),
            pairs=counts.get("pairs", 0),
            drops=_with_prefix(counts, "drop:"),
            teacher_better_share=better / scored if scored else None,
            teacher_worse_share=worse / scored if scored else None,
            scored=scored,
            unscored=counts.get("unscored", 0),
            first_tokens={side: _with_prefix(counts, f"first:{side}:") for side in _SIDES},
            thoughts={side: counts.get(f"thought:{side}", 0) for side in _SIDES},
            unmatched_tags={side: counts.get(f"unmatched:{side}", 0) for side in _SIDES},
            opened=counts.get("opened", 0),
            control_prompts=counts.get("control_prompts", 0),
        )

    @classmethod
    def from_parts(cls, parts: Sequence[Part]) -> PairFacts:
        """Sum up all parts of a dataset. Raises :class:`RunFailed` if they hold no pair at all."""
        counts: Counter[str] = Counter()
        for part in parts:
            counts.update(part.counts)
        facts = cls.from_counts(counts)
        if not facts.pairs:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in facts.drops.items()) or "none"
            hint = "; raise sampling.teacher.max_tokens, or set pairing.truncated_chosen to keep"
            raise RunFailed(
                f"no pair was left of {facts.prompts:,} prompts. Dropped, by reason: {reasons}"
                f"{hint if 'chosen_truncated' in facts.drops else ''}"
            )
        return facts

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> PairFacts:
        return cls(**{field.name: manifest.facts[field.name] for field in fields(cls)})

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as a manifest holds them."""
        return asdict(self)


def _with_prefix(counts: Mapping[str, int], prefix: str) -> dict[str, int]:
    """Return the counts whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): count for name, count in sorted(counts.items()) if name.startswith(prefix)}
