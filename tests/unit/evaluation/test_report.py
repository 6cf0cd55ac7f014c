"""The report shows the figures, never runs a model's text, and loads nothing over the network."""

from __future__ import annotations

import base64
import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from plad_dist.config import Loss, Student
from plad_dist.config_file import parse_config
from plad_dist.data.models import hub_name
from plad_dist.evaluation.document import Interval, Metrics, Ranking
from plad_dist.evaluation.formatting import loss_phrase
from plad_dist.evaluation.metrics import compare
from plad_dist.evaluation.report.card import _origin, render_card
from plad_dist.evaluation.report.page import Example, PairingSummary, ReportData, Watch, _model_phrase, render_report
from plad_dist.evaluation.report.tables import metrics_table
from plad_dist.systems import PLAD, SEQKD, TEACHER, WARMUP, System
from plad_dist.text_metrics import Output
from plad_dist.timeline import StageTime
from plad_dist.training.records.collapse import CheckpointProbe, CollapseRecord
from tests.conftest import tiny_config

EVIL = "<script>alert('x')</script><img src=http://evil.example/p.png onerror=alert(1)>"
RANKING = Ranking.model_validate(
    {
        "before": {"pair_accuracy": 0.4, "chosen_logp": -14.0, "rejected_logp": -11.0},
        "after": {"pair_accuracy": 0.6, "chosen_logp": -13.0, "rejected_logp": -15.0},
        "seqkd": {"pair_accuracy": 0.5, "chosen_logp": -12.0, "rejected_logp": -12.0},
        "pairs": 512,
    }
)
ALL = (TEACHER, WARMUP, SEQKD, PLAD)
CONFIG = """
teacher: {scratch: {architecture: {model_type: llama, num_hidden_layers: 3, hidden_size: 128}}}
student: {path: Qwen/Qwen3-0.6B, revision: main}
prompts: {source: {type: files, paths: [prompts.jsonl]}}
training: {round: {loss: {name: rank, margin: 1.0}}}
"""
PROBE = CheckpointProbe(0, tokens=3.0, end_share=0.9, repetition=0.0, win_rate=0.5)


def make_metrics(systems: tuple[System, ...], reference: str | None, ranking: Ranking | None) -> Metrics:
    texts = {TEACHER: "a b c", WARMUP: "a x y", SEQKD: "a b x", PLAD: "a b c"}
    outputs = {(s, d): [Output(texts[s], 3, s != PLAD)] * 20 for s in systems for d in ("greedy", "sampled")}
    outputs[WARMUP, "t0.5"] = [Output("a b y", 3, True)] * 20
    temperatures = {"greedy": 0.0, "sampled": 1.0, "t0.5": 0.5}
    return compare(outputs, [reference] * 20, temperatures=temperatures, resamples=100, seed=0, ranking=ranking)


def make_report(
    systems: tuple[System, ...] = ALL, reference: str | None = "a b c", ranking: Ranking | None = RANKING
) -> ReportData:
    steps = [{"step": s, "loss": 10.0 / s, "chosen_logp": -9.0, "tokens_per_s": 9000.0} for s in range(1, 900)]
    pairs = {"pair_accuracy": 0.5, "active_share": 0.9, "chosen_logp": -14.0, "rejected_logp": -11.0}
    return ReportData(
        title=f"Run {EVIL}",
        metrics=make_metrics(systems, reference, ranking),
        curves={"warmup": steps, "round-0": [{**s, **pairs} for s in steps]},
        lengths={(s, "greedy"): [3, 4, 5] for s in systems},
        examples=[Example(EVIL, reference, {PLAD: EVIL, TEACHER: ""})] * 6,
        config_yaml=CONFIG,
        versions={"vllm": "0.29.0"},
        pairing=PairingSummary(7421, {"teacher_truncated": 12, "identical": 340}, teacher_win_share=0.512),
        timings={"warmup": StageTime(40.0, 15.2), "sample": StageTime(computing=3725.0)},
        watched={"round-0": Watch(CollapseRecord("f", PROBE, [PROBE], sound=0, collapse=f"it writes {EVIL}"), 7)},
    )


def empty_report() -> ReportData:
    return dataclasses.replace(
        make_report((WARMUP, PLAD), None, None),
        curves={}, lengths={}, examples=[], config_yaml="", versions={}, pairing=None, timings={}, watched={},
    )  # fmt: skip


class _Page(HTMLParser):
    """The elements of a page, with a check that they are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(make_report())


def test_text_of_a_model_is_shown_and_never_run(page: str) -> None:
    parsed = _Page(page)
    assert parsed.open == []
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "iframe", "object", "link", "base", "form")]
    assert not [a for _, attrs in parsed.tags for a in attrs if a.startswith("on")]
    assert EVIL in "".join(parsed.words)
    assert page.startswith("<!DOCTYPE html>")


def test_the_page_loads_nothing_over_the_network(page: str) -> None:
    for _, attrs in _Page(page).tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attrs.get(name) or "data:").startswith("data:")
    style = re.search(r"<style>(.*)</style>", page, re.DOTALL)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "default-src 'none'" in page


def test_every_plot_is_an_svg_with_its_content_in_words(page: str) -> None:
    images = [attrs for tag, attrs in _Page(page).tags if tag == "img"]
    assert len(images) == 2 + 3 + 1 + 1  # quality; losses and pairs; likelihood; lengths
    for image in images:
        assert len(image["alt"] or "") > 20
        assert b"<svg" in base64.b64decode((image["src"] or "").split(",")[1])
    assert any("PLaD student, greedy 100.0" in (image["alt"] or "") for image in images)


def test_the_page_shows_every_section(page: str) -> None:
    text = " ".join("".join(_Page(page).words).split())
    for expected in (
        "llama from scratch: 3 layers, 128 wide", "Qwen/Qwen3-0.6B@main", "rank, margin 1, anchor 1", "prompts.jsonl",
        "Calibration improved the student", "7,421 pairs", "51.2%", "teacher truncated", "340",
        "512 held-out pairs", "-13.00", "1 h 02 min", "55.2 s", "0.29.0", "2 more examples", "median 9,000 tokens/s",
        "100.0 (high)", "empty",
    ):  # fmt: skip
        assert expected in text, expected
    assert 'name="viewport"' in page
    assert "@media print" in page


def test_the_same_data_gives_the_same_bytes(page: str) -> None:
    assert render_report(make_report()) == page


def test_the_page_states_that_references_are_missing() -> None:
    text = "".join(_Page(render_report(make_report(reference=None))).words)
    assert "No prompt has a reference, so ROUGE, exact match and the win rates based on them are empty." in text
    assert "Reference\n" not in text


def test_a_run_without_control_or_ranking_is_reported() -> None:
    text = "".join(_Page(render_report(make_report((TEACHER, WARMUP, PLAD), ranking=None))).words)
    assert "The run has no sequence-level KD of equal compute" in text
    assert "Seq-KD control" not in text
    assert "No held-out pairs were ranked." in text


def test_empty_sections_are_no_error() -> None:
    text = "".join(_Page(render_report(empty_report())).words)
    for expected in ("No training curves", "No examples", "No pairs", "No times", "No lengths", "No held-out pairs"):
        assert expected in text


def test_the_config_is_read_beside_its_fingerprint() -> None:
    nested = "fingerprint: abc\nconfig:\n  student: {path: some/model}\n"
    page = render_report(dataclasses.replace(make_report(), config_yaml=nested))
    assert "<dt>Student</dt><dd>some/model</dd>" in page


def test_odd_values_in_logs_and_config_are_no_error() -> None:
    records: list[dict[str, Any]] = [
        {"step": 1, "loss": float("nan")},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 1.0},
    ]
    report = dataclasses.replace(make_report(), curves={"warmup": records, "seqkd": []}, config_yaml="a: [")
    assert "Loss of warm-up" in render_report(report)


def test_invisible_characters_and_direction_controls_are_named_and_long_texts_cut() -> None:
    responses = {WARMUP: "abc\u202edef\x00\ud800", PLAD: "x" * 5000}
    report = dataclasses.replace(make_report(), examples=[Example("p", None, responses)])
    page = render_report(report)
    assert page.encode("utf-8")
    assert "abc⟨U+202E⟩def⟨U+0000⟩⟨U+D800⟩" in page
    assert "(1000 more characters)" in page


def printed(metrics: Metrics) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(metrics_table(metrics))
    return capture.get()


def test_the_terminal_table_fits_80_columns_and_keeps_brackets() -> None:
    metrics = make_metrics((WARMUP, PLAD), "a b c", None)
    long = Interval(value=0.611, low=0.575, high=0.647)
    rows = tuple(row.model_copy(update={"rouge_l": long, "win_rate_vs_warmup": long}) for row in metrics.systems)
    shown = printed(metrics.model_copy(update={"systems": rows}))
    interval = r"61\.1 \[57\.5, 64\.7\]"
    assert re.search(rf"plad +sampled +{interval} +100\.0 +{interval} +3\.0 +100\.0", shown)


def test_the_terminal_table_cuts_no_number_off() -> None:
    assert "…" not in printed(make_metrics((WARMUP, PLAD), "a b c", None))


def test_the_terminal_table_shows_missing_quality_as_a_dash() -> None:
    shown = printed(make_metrics((WARMUP, PLAD), None, None))
    assert re.search(r"plad +sampled +– +– +– +3\.0", shown)


@pytest.mark.parametrize(
    ("loss", "phrase"),
    [
        ({"name": "rank"}, "rank, margin 1, anchor 1"),
        ({"name": "dpo"}, "dpo, beta 0.1, anchor 0"),
        ({"name": "simpo", "margin": 0.5}, "simpo, margin 0.5, beta 2, per token, anchor 0"),
    ],
)
def test_a_loss_is_shown_with_the_parameters_that_it_uses(loss: dict[str, Any], phrase: str) -> None:
    assert loss_phrase(Loss(**loss)) == phrase


def test_a_card_does_not_name_a_folder_as_the_base_model(tmp_path: Path) -> None:
    """A hub refuses cards whose base model is not one of its repositories."""
    assert hub_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert [hub_name(name) for name in (str(tmp_path), "/mnt/models/student", "../student")] == [None] * 3


def test_report_and_card_name_the_model_and_the_layers_of_a_cut_student() -> None:
    section = {"from": {"path": "Qwen/Qwen3-32B", "revision": "main", "layers": 12}}
    for layers, phrase in ((12, "12 layers"), ([0, 1, 63], "layers 0, 1, 63")):
        section["from"]["layers"] = layers
        expected = f"{phrase} of Qwen/Qwen3-32B@main"
        assert _origin(Student.model_validate(section)) == _model_phrase(section) == expected


def test_the_card_of_an_encoder_decoder_loads_it_by_its_class(tmp_path: Path) -> None:
    config = parse_config(tiny_config(tmp_path), "test")
    for has_encoder in (False, True):
        card = render_card(config, make_metrics(ALL, "a b c", RANKING), {}, "", has_encoder=has_encoder)
        assert ("AutoModelForSeq2SeqLM" in card) == has_encoder
        assert ("AutoModelForCausalLM" in card) == ("vllm serve" in card) == (not has_encoder)


def test_the_report_and_the_card_say_who_wrote_the_rejected_responses(tmp_path: Path) -> None:
    writers = {
        "{phase: student-init}": "the student before its training",
        "{path: weak, revision: v1}": "weak@v1",
        "{teacher: small}": "the teacher small",
    }
    for rejected, phrase in writers.items():
        text = f"{CONFIG}sampling: {{rejected: {rejected}}}\n"
        page = "".join(_Page(render_report(dataclasses.replace(make_report(), config_yaml=text))).words)
        assert "Rejected responses by" in page
        assert phrase in page
    assert "Rejected responses by" not in render_report(make_report())
    raw = tiny_config(tmp_path)
    for rejected, phrase in ((None, "those of the student,"), ({"path": "weak"}, "those of weak,")):
        config = parse_config(raw | {"sampling": {"rejected": rejected}}, "test")
        assert phrase in render_card(config, make_metrics(ALL, "a b c", RANKING), {}, "")
