"""Collapse watch: figures of probes, bounds, the latest sound checkpoint, the record."""

from __future__ import annotations

from pathlib import Path

import pytest

from plad_dist.config import CollapseBounds, Decoding
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.text_metrics import Output
from plad_dist.training.driver.collapse_verdict import judge, measure, violated_bound
from plad_dist.training.driver.probe_prompts import ProbePrompts
from plad_dist.training.records.collapse import CheckpointProbe, CollapseRecord, read_collapse_record

START = CheckpointProbe(0, tokens=10.0, end_share=0.9, repetition=0.1)
SOUND = CheckpointProbe(5, tokens=11.0, end_share=0.88, repetition=0.1, win_rate=0.6)


def test_figures_are_means_over_the_responses_and_wins_against_the_starting_students() -> None:
    start = [Output("a b c", 3, True), Output("x", 1, True), Output("p q", 2, False)]
    prompts = ProbePrompts(["1", "2", "3"], [[], [], []], ["a b c d", "x", None], start, Decoding())
    outputs = [Output("a b c d", 4, True), Output("x", 2, True), Output("a b c a b c a b c", 9, False)]
    probe = measure(7, outputs, prompts)
    assert (probe.step, probe.tokens, probe.end_share) == (7, 5.0, pytest.approx(2 / 3))
    assert probe.win_rate == 0.75, "a win and a tie; the third prompt has no reference"
    assert probe.repetition == pytest.approx((0 + 0 + 4 / 7) / 3)
    without_references = ProbePrompts(["1"] * 3, [[]] * 3, [None] * 3, start, Decoding())
    assert measure(7, outputs, without_references).win_rate is None


@pytest.mark.parametrize(
    ("figure", "value", "bound"),
    [
        ("end_share", 0.44, "min_end_share"),
        ("tokens", 20.5, "max_length_ratio"),
        ("repetition", 0.41, "max_repetition"),
        ("win_rate", 0.19, "min_win_rate"),
    ],
)
def test_a_probe_that_violates_a_bound_names_it(figure: str, value: float, bound: str) -> None:
    probe = CheckpointProbe(**(vars(SOUND) | {figure: value}))
    assert bound in str(violated_bound(probe, START, CollapseBounds()))
    assert violated_bound(probe, START, CollapseBounds(**{bound: None})) is None
    assert violated_bound(SOUND, START, CollapseBounds()) is None


def test_the_latest_sound_checkpoint_stays_recorded_after_a_collapse() -> None:
    record = CollapseRecord(
        "f", START, [SOUND, CheckpointProbe(10, 12.0, 0.9, 0.1), CheckpointProbe(15, 40.0, 0.1, 0.1)]
    )
    judged = judge(record, CollapseBounds(), lambda step: True)
    assert (judged.sound, judged.collapse is not None) == (10, True)
    assert judge(record, CollapseBounds(), lambda step: step != 10).sound == 5, "a pruned checkpoint does not count"
    assert judge(record, CollapseBounds(min_end_share=None, max_length_ratio=None), lambda step: True).collapse is None
    assert judge(CollapseRecord("f", START), CollapseBounds(), lambda step: True).sound is None


def test_a_record_is_read_as_written_and_only_for_its_own_phase(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert read_collapse_record(storage, "round-0", "f") is None
    record = CollapseRecord("f", START, [SOUND], probing=10, sound=5)
    record.write(storage, "round-0")
    assert read_collapse_record(storage, "round-0", "f") == read_collapse_record(storage, "round-0", None) == record
    assert record.needed == {5, 10}
    assert read_collapse_record(storage, "round-0", "another") is None
    storage.replace("events/round-0/collapse.json", b'{"fingerprint": "f"}')
    with pytest.raises(RunFailed, match="delete it"):
        read_collapse_record(storage, "round-0", "f")
