"""Verdict of the collapse watch: figures of generated text, bounds, latest sound checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from plad_dist.config import CollapseBounds
from plad_dist.text_metrics import Output, repetition, rouge_l, wins
from plad_dist.training.driver.probe_prompts import ProbePrompts
from plad_dist.training.records.collapse import CheckpointProbe, CollapseRecord


def measure(step: int, outputs: Sequence[Output], prompts: ProbePrompts) -> CheckpointProbe:
    """Return the figures of the responses of a checkpoint, or of the starting student (step 0)."""
    scores = [
        (rouge_l(reference, output.text), rouge_l(reference, start.text))
        for reference, output, start in zip(prompts.references, outputs, prompts.start_outputs, strict=True)
        if reference and reference.strip()
    ]
    return CheckpointProbe(
        step=step,
        tokens=_mean([output.num_tokens for output in outputs]),
        end_share=_mean([float(output.finished) for output in outputs]),
        repetition=_mean([repetition(output.text) for output in outputs]),
        win_rate=float(wins(*np.array(scores).T).mean()) if scores else None,
    )


def judge(record: CollapseRecord, bounds: CollapseBounds, is_committed: Callable[[int], bool]) -> CollapseRecord:
    """Return a record with its verdict: the violated bound and the latest sound checkpoint.

    Args:
        is_committed: returns True if the checkpoint of a step still exists.
    """
    violations = {probe.step: violated_bound(probe, record.start, bounds) for probe in record.probes}
    sound = [step for step, violation in violations.items() if violation is None and is_committed(step)]
    return replace(
        record,
        sound=sound[-1] if sound else None,
        collapse=violations[record.probes[-1].step] if record.probes else None,
    )


def violated_bound(probe: CheckpointProbe, start: CheckpointProbe, bounds: CollapseBounds) -> str | None:
    """Return the first bound that a probe violates, in words, or None."""
    if bounds.min_end_share is not None and probe.end_share < bounds.min_end_share * start.end_share:
        return (
            f"at step {probe.step} {probe.end_share:.0%} of its responses are finished, {start.end_share:.0%} were at "
            f"the start (training.watch.min_end_share={bounds.min_end_share:g})"
        )
    if bounds.max_length_ratio is not None and probe.tokens > bounds.max_length_ratio * max(1.0, start.tokens):
        return (
            f"at step {probe.step} a response has {probe.tokens:.1f} tokens on average, {start.tokens:.1f} at the "
            f"start (training.watch.max_length_ratio={bounds.max_length_ratio:g})"
        )
    if bounds.max_repetition is not None and probe.repetition > start.repetition + bounds.max_repetition:
        return (
            f"at step {probe.step} {probe.repetition:.0%} of the word 3-grams of a response are repeated, "
            f"{start.repetition:.0%} at the start (training.watch.max_repetition={bounds.max_repetition:g})"
        )
    if bounds.min_win_rate is not None and probe.win_rate is not None and probe.win_rate < bounds.min_win_rate:
        return (
            f"at step {probe.step} it wins {probe.win_rate:.0%} against the starting student "
            f"(training.watch.min_win_rate={bounds.min_win_rate:g})"
        )
    return None


def describe(probe: CheckpointProbe) -> str:
    """Return the figures of a probe as a log line."""
    win_rate = "" if probe.win_rate is None else f", wins {probe.win_rate:.0%} against the start"
    return (
        f"step {probe.step}: {probe.tokens:.1f} tokens per response, {probe.end_share:.0%} finished, repetition "
        f"{probe.repetition:.2f}{win_rate}"
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
