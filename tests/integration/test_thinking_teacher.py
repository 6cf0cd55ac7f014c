"""A teacher that thinks, on a real engine: what is stored of its thoughts, and what is paired."""

from __future__ import annotations

from typing import Any

import pytest

from plad_dist.config import Pairing
from plad_dist.config_file import load_config
from plad_dist.data.prompts import train_prompts
from plad_dist.data.teacher_texts import TeacherForms
from plad_dist.data.templates import Renderer
from plad_dist.pairing.facts import PairFacts
from plad_dist.pairing.pairs import PairBuilder
from plad_dist.rundir import RunDir
from tests.conftest import plad, write_config
from tests.tiny import TEMPLATE, make_chain_model, sampling_config

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

TAGS = ("<think>", "</think>")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the config of a run whose teacher begins inside a thought, sampled by its engine."""
    folder = tmp_path_factory.mktemp("thinking")
    raw = sampling_config(folder, 40, max_tokens=32)
    raw["prompts"]["heldout_fraction"] = 0.2
    make_chain_model(folder / "thinker", [*"abc", "</think>", *"def"], "<think>", added=TAGS)
    raw["teacher"] = {"path": str(folder / "thinker"), "template": TEMPLATE + "<think>"}
    config = write_config(folder, raw)
    for command in ("prepare", "sample"):
        done = plad(command, str(config), cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
    return load_config(config)


def test_the_thought_of_a_teacher_is_stored_apart_from_its_answer(sampled: Any) -> None:
    samples = RunDir.of(sampled).samples("teacher").read(["text", "reasoning", "finish_reason", "token_ids"])
    for row in samples.to_pylist():
        assert (row["text"], row["reasoning"], row["finish_reason"]) == ("def", "abc", "stop")
        assert len(row["token_ids"]) == 8, "the tokens are those of thought and answer"


@pytest.mark.parametrize(("keep", "text"), [((), "def"), (("teacher",), "<think>\nabc\n</think>\n\ndef")])
def test_chosen_texts_hold_the_thought_only_if_it_is_kept(sampled: Any, keep: tuple[str, ...], text: str) -> None:
    run = RunDir.of(sampled)
    renderer = Renderer(run.student(sampled), sampled.student)
    builder = PairBuilder(Pairing(score="none"), renderer, 128, None, TeacherForms(keep_thought=keep))
    datasets = (train_prompts(run.storage), run.samples("teacher"), run.samples("student"))
    tables = [dataset.read_block(0) for dataset in datasets]
    pairs, counts = builder.build(*tables)
    assert set(pairs["chosen_text"].to_pylist()) == {text}
    assert PairFacts.from_counts(counts).thoughts["chosen"] == (pairs.num_rows if keep else 0)
