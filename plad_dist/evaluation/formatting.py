"""Names and figures as text, for the report, the model card, the verdict and the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from plad_dist.config import Loss, Rejected
from plad_dist.evaluation.document import Interval
from plad_dist.systems import Kind, System

NO_EOS_WARNING = 0.10  # share of responses cut at the token limit that counts as broken
NO_REFERENCES = "No prompt has a reference, so ROUGE, exact match and the win rates based on them are empty."
_TITLES: dict[Kind, str] = {
    "teacher": "Teacher",
    "warmup": "Warm-up student",
    "seqkd": "Seq-KD control",
    "plad": "PLaD student",
}
_PHRASES: dict[Kind, str] = {
    "teacher": "teacher",
    "warmup": "warm-up student",
    "seqkd": "sequence-level KD",
    "plad": "PLaD",
}
_PHASES = {"seqkd": "sequence-level KD", "warmup": "warm-up", "teacher": "teacher training"}
_JUDGES = {"rouge_1": "ROUGE-1", "rouge_2": "ROUGE-2", "rouge_l": "ROUGE-L"}
_TEXT_LIMIT = 4000  # characters of a prompt or response that the report shows
# Control characters except tab and line ends, bidirectional controls, lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


# -- names


def system_title(system: System) -> str:
    """Return the name of a system as a title: `Warm-up student`."""
    return _TITLES[system.kind] if system.round is None else f"PLaD, round {system.round}"


def system_phrase(system: System) -> str:
    """Return the name of a system within a sentence: `warm-up student`."""
    return _PHRASES[system.kind] if system.round is None else f"PLaD of round {system.round}"


def phase_phrase(phase: str) -> str:
    """Return the name of a training phase within a sentence: `sequence-level KD`."""
    return _PHASES.get(phase, phase)


def judge_title(name: str) -> str:
    """Return the name of a judge: `ROUGE-L`, or the name of a judge of the config."""
    return _JUDGES.get(name, name)


def layers_phrase(layers: int | Sequence[int]) -> str:
    """Return the layers that a student keeps of a model, as the config gives them."""
    return f"{layers} layers" if isinstance(layers, int) else f"layers {', '.join(map(str, layers))}"


def writer_phrase(rejected: Rejected | None) -> str:
    """Return who writes the rejected responses, within a sentence."""
    match rejected:
        case Rejected(path=str(path), revision=revision):
            return f"{path}@{revision}" if revision else path
        case Rejected(teacher=str(name)):
            return f"the teacher {name}"
        case Rejected():
            return "the student before its training"
    return "the student"


def loss_phrase(loss: Loss) -> str:
    """Return a loss with the parameters that it uses: `rank, margin 1, anchor 1`."""
    parts: list[str] = [loss.name]
    if loss.name in ("rank", "margin", "listwise", "simpo"):
        parts.append(f"margin {loss.margin:g}")
    if loss.name in ("dpo", "ipo", "simpo", "cpo", "orpo"):
        parts.append(f"beta {loss.strength:g}")
    return ", ".join([*parts, *(["per token"] if loss.per_token else []), f"anchor {loss.anchor:g}"])


# -- figures


def percent(x: Interval | None, factor: float = 100.0, digits: int = 1) -> str:
    """Return the value of an interval, by default in per cent without the sign; a dash for None."""
    return "–" if x is None else f"{factor * x.value:.{digits}f}"


def brackets(x: Interval | None, factor: float = 100.0, digits: int = 1) -> str:
    """Return the bounds of an interval in brackets: `[57.5, 64.7]`; nothing for None."""
    return "" if x is None else f"[{factor * x.low:.{digits}f}, {factor * x.high:.{digits}f}]"


def with_interval(x: Interval | None, factor: float = 100.0, digits: int = 1) -> str:
    """Return a value with its interval, by default in per cent: `61.1 [57.5, 64.7]`."""
    return f"{percent(x, factor, digits)} {brackets(x, factor, digits)}".strip()


def share(x: Interval) -> str:
    """Return a share with its interval for a sentence: `61.1% [57.5, 64.7]`."""
    return f"{percent(x)}% {brackets(x)}"


def signed(x: Interval, factor: float = 1.0, digits: int = 2, unit: str = "") -> str:
    """Return a difference with its interval: `+0.22 [+0.10, +0.34]`; `unit` follows the value."""
    bounds = f"[{factor * x.low:+.{digits}f}, {factor * x.high:+.{digits}f}]"
    return f"{factor * x.value:+.{digits}f}{unit} {bounds}"


def points(x: Interval) -> str:
    """Return a difference of shares in percentage points: `+1.2 points [+0.4, +2.0]`."""
    return signed(x, 100.0, 1, " points")


def duration(seconds: float) -> str:
    """Return a duration: `55.2 s`, `3 min 05 s` or `1 h 02 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"


def clip(text: str | None) -> str:
    """Return a model's text, shortened, with invisible characters and direction controls named."""
    text = text or ""
    omitted = len(text) - _TEXT_LIMIT
    shown = _UNPRINTABLE.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text[:_TEXT_LIMIT])
    return shown if omitted <= 0 else f"{shown} … ({omitted} more characters)"
