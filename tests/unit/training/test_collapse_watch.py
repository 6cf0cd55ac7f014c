"""Looks at a training student: their figures, their bounds, and which checkpoint they call sound."""

from __future__ import annotations

from pathlib import Path

import pytest

from plad_dist.config import CollapseBounds, Decoding
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.text_metrics import Output
from plad_dist.training.driver.collapse_watch import Questions, figures, judged, out_of
from plad_dist.training.records.collapse import CheckpointProbe, CollapseRecord, read_collapse_record

START = CheckpointProbe(0, tokens=10.0, end_share=0.9, repetition=0.1)
SOUND = CheckpointProbe(5, tokens=11.0, end_share=0.88, repetition=0.1, win_rate=0.6)


def test_figures_are_means_over_the_answers_and_wins_against_the_first_ones() -> None:
    before = [Output("a b c", 3, True), Output("x", 1, True), Output("p q", 2, False)]
    questions = Questions(["1", "2", "3"], [[], [], []], ["a b c d", "x", None], before, Decoding())
    answers = [Output("a b c d", 4, True), Output("x", 2, True), Output("a b c a b c a b c", 9, False)]
    look = figures(7, answers, questions)
    assert (look.step, look.tokens, look.end_share) == (7, 5.0, pytest.approx(2 / 3))
    assert look.win_rate == 0.75, "better, and the same; the third has no reference"
    assert look.repetition == pytest.approx((0 + 0 + 4 / 7) / 3)
    assert figures(7, answers, Questions(["1"] * 3, [[]] * 3, [None] * 3, before, Decoding())).win_rate is None


@pytest.mark.parametrize(
    ("figure", "value", "named"),
    [
        ("end_share", 0.44, "min_end_share"),
        ("tokens", 20.5, "max_length_ratio"),
        ("repetition", 0.41, "max_repetition"),
        ("win_rate", 0.19, "min_win_rate"),
    ],
)
def test_a_look_out_of_a_bound_says_which(figure: str, value: float, named: str) -> None:
    look = CheckpointProbe(**(vars(SOUND) | {figure: value}))
    assert named in str(out_of(look, START, CollapseBounds()))
    assert out_of(look, START, CollapseBounds(**{named: None})) is None
    assert out_of(SOUND, START, CollapseBounds()) is None


def test_the_latest_sound_look_stays_named_after_a_collapse() -> None:
    found = CollapseRecord(
        "f", START, [SOUND, CheckpointProbe(10, 12.0, 0.9, 0.1), CheckpointProbe(15, 40.0, 0.1, 0.1)]
    )
    judgement = judged(found, CollapseBounds(), lambda step: True)
    assert (judgement.sound, judgement.collapse is not None) == (10, True)
    assert judged(found, CollapseBounds(), lambda step: step != 10).sound == 5, "one that is gone is no use"
    assert judged(found, CollapseBounds(min_end_share=None, max_length_ratio=None), lambda step: True).collapse is None
    assert judged(CollapseRecord("f", START), CollapseBounds(), lambda step: True).sound is None


def test_what_was_found_is_read_as_it_was_written_and_of_the_same_phase_alone(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert read_collapse_record(storage, "round-0", "f") is None
    found = CollapseRecord("f", START, [SOUND], probing=10, sound=5)
    found.write(storage, "round-0")
    assert read_collapse_record(storage, "round-0", "f") == read_collapse_record(storage, "round-0", None) == found
    assert found.needed == {5, 10}
    assert read_collapse_record(storage, "round-0", "another") is None
    storage.replace("events/round-0/collapse.json", b'{"fingerprint": "f"}')
    with pytest.raises(RunFailed, match="delete it"):
        read_collapse_record(storage, "round-0", "f")
