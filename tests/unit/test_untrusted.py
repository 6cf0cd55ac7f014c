"""Text and JSON of others: terminals obey nothing that is shown, and documents are bounded."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import pytest

from plad_dist.data.storage import Storage
from plad_dist.terminal import log_to_terminal
from plad_dist.training.records.collapse import CheckpointProbe, CollapseRecord, read_collapse_record
from plad_dist.untrusted import harmless, harmless_line, parse_json

HOSTILE = [
    "\x1b]52;c;ZWNobw==\x07", "\x1b]0;title\x1b\\", "\x1b[2J", "\x1b[31;1m", "\x9b31m", "\x1bc", "\x1b(0", "\x1b#8",
    "\x90q\x9c", "\x9d0;title\x9c", "\x07", "\x08", "\x00", "\x7f", "\x85", "\u202e", "\u2066", "\u200f", "\u2028",
    "\r",
]  # fmt: skip


@pytest.mark.parametrize("sequence", HOSTILE)
def test_nothing_that_a_terminal_obeys_is_kept(sequence: str) -> None:
    assert harmless(f"before {sequence}after\nlast") == "before after\nlast"
    assert harmless_line(f"before {sequence}after") == "before after"


def test_text_of_every_language_is_kept() -> None:
    text = "Ünïcödé 漢字 العربية \U0001f469\u200d\U0001f680 tab\tnewline\n"
    assert harmless(text) == text
    assert harmless("cut \ud83d") == "cut \ufffd"


def test_a_line_is_short_and_made_in_time_that_does_not_depend_on_the_text() -> None:
    started = time.process_time()
    for text in ("x " * 10_000_000, "\x1b]" * 5_000_000, "\x1b[" * 5_000_000, " " * 20_000_000):
        assert len(harmless_line(text)) <= 203
    assert time.process_time() - started < 0.5
    assert harmless_line(["a", 1]) == "['a', 1]"


def test_escapes_are_dropped_in_linear_time() -> None:
    for text in ("\x1b]" * 500_000, "\x1b[" * 500_000, "\x9b0" * 500_000, "\x90" * 1_000_000):
        started = time.process_time()
        harmless(text)
        assert time.process_time() - started < 2.0


def test_json_has_bounded_depth_and_finite_numbers() -> None:
    assert parse_json('{"a": [NaN, Infinity, -Infinity, 1e999, 2.5, 3]}') == {"a": [None, None, None, None, 2.5, 3]}
    assert parse_json("[" * 64 + "]" * 64) is not None
    for text in ("[" * 65 + "]" * 65, '{"a":' * 100 + "1" + "}" * 100, "[" * 10**6, "1" * 5000, "{", "", b"\xff\xfe"):
        with pytest.raises(ValueError, match=r"."):
            parse_json(text)


def test_the_log_drops_what_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("plad")
    before = logger.handlers, logger.filters, logger.propagate, logger.level
    try:
        log_to_terminal()
        logger.warning("%s: the server says %s", "http://h", "\x1b]0;owned\x07no")
    finally:
        logger.handlers, logger.filters, logger.propagate = before[:3]
        logger.setLevel(before[3])
    assert capsys.readouterr().err.endswith("http://h: the server says no\n")


def test_a_figure_that_is_no_number_is_null_in_files_that_others_read(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    CollapseRecord("f", CheckpointProbe(0, math.nan, 1.0, 0.0)).write(storage, "round-0")
    assert "NaN" not in (tmp_path / "events/round-0/collapse.json").read_text()
    record = read_collapse_record(storage, "round-0", "f")
    assert record is not None
    assert math.isnan(record.start.tokens)
