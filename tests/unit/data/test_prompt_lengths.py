"""Over-long prompts and prompts that a template cannot render, in the stage `prepare`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plad_dist.data.conversation import Conversation
from plad_dist.data.models import resolve_model
from plad_dist.data.sources import read_prompts
from plad_dist.data.templates import Renderer
from plad_dist.errors import UserError
from plad_dist.training.model.scratch import train_tokenizer
from tests.conftest import SHAPE
from tests.unit.data.prompt_stage import (
    config_of,
    manifest_of,
    prepared,
    raw_config,
    rows_of,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder with a tokenizer and a context of 64 tokens, without weights."""
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(iter(["some text ä"]), 300).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return folder


def long_config(folder: Path, model: Path, **prompts: Any) -> dict[str, Any]:
    """Return a config with a pretrained student and two long prompts, in rows 3 and 600."""
    texts = [f"{row} " + ("äx" * 100 if row in (3, 600) else "") for row in range(700)]
    raw = raw_config(folder, texts, heldout_fraction=0.1, **prompts)
    raw["student"] = {"path": str(model), "template": "{{ messages[0].content }} ="}
    return raw


def test_the_error_about_an_over_long_prompt_names_the_row_and_the_model(tmp_path: Path, model: Path) -> None:
    message = (
        r"prompts\.jsonl:4: the prompt has [0-9]+ tokens for student \(.*model.*\), "
        r"at most 63 fit; .*prompts\.over_long"
    )
    with pytest.raises(UserError, match=message):
        prepared(config_of(long_config(tmp_path, model)))
    with pytest.raises(UserError, match=r"at most 20 fit"):
        prepared(config_of(long_config(tmp_path, model, max_tokens=20)))


def test_the_prompts_of_a_cut_student_are_measured_with_the_tokenizer_of_its_model(tmp_path: Path, model: Path) -> None:
    raw = long_config(tmp_path, model)
    raw["student"] = {"from": {"path": raw["student"].pop("path"), "layers": 3}, **raw["student"]}
    raw["training"] = {"warmup": {"data": "teacher"}, "teacher": raw.get("training", {}).get("teacher", {})}
    with pytest.raises(UserError, match=r"tokens for student \(.*model.*\), at most 63 fit"):
        prepared(config_of(raw))


def test_over_long_prompts_are_dropped_and_counted(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "plad")
    data = prepared(config_of(long_config(tmp_path, model, over_long="drop")))
    assert sum(manifest_of(dataset).rows for dataset in data) == 698
    assert sum(manifest_of(dataset).facts["over_long"] for dataset in data) == 2
    assert [record.message for record in caplog.records if record.name == "plad"] == ["prompts: 2 over-long dropped"]


@settings(max_examples=8)
@given(text=st.text("aä text\U0001f600", min_size=40, max_size=300), limit=st.integers(14, 30))
def test_a_truncated_prompt_fits_every_model_that_responds_to_it(model: Path, text: str, limit: int) -> None:
    with TemporaryDirectory() as name:
        raw = raw_config(Path(name), ["a", "b", "c"], over_long="truncate", max_tokens=limit, heldout_fraction=0.5)
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": text}]
        with (Path(name) / "prompts.jsonl").open("w") as file:
            for row in range(20):
                file.write(json.dumps({"m": [messages[0], {"role": "user", "content": text + str(row)}]}) + "\n")
        raw["prompts"]["source"] |= {"messages_column": "m", "reference_column": None}
        raw["training"]["warmup"]["data"] = "teacher"
        del raw["training"]["teacher"]
        raw["student"] = {"path": str(model), "template": "{{ messages[0].content }}{{ messages[1].content }} ="}
        raw["teacher"] = raw["student"] | {"template": "Answer: {{ messages[1].content }}\n"}
        config = config_of(raw)
        originals = {prompt.prompt_id: prompt for prompt in read_prompts(config.prompts.source)}
        data = prepared(config)
        models = (config.student, config.all_teachers()["teacher"])
        renderers = [Renderer(resolve_model(settings), settings) for settings in models]
        truncated = 0
        for row in (row for dataset in data for row in rows_of(dataset)):
            original = originals.pop(row["prompt_id"]).messages
            assert row["messages"][0] == original[0]
            content = row["messages"][1]["content"]
            assert content
            assert original[1]["content"].startswith(content)
            truncated += content != original[1]["content"]
            assert all(len(renderer.prompt_ids([Conversation.from_row(row)])[0]) <= limit for renderer in renderers)
        assert not originals
        assert sum(manifest_of(dataset).facts["truncated"] for dataset in data) == truncated


def test_a_prompt_that_does_not_fit_even_when_empty_is_refused(tmp_path: Path, model: Path) -> None:
    raw = long_config(tmp_path, model, over_long="truncate", max_tokens=20)
    raw["student"]["template"] = "{{ 'long ' * 40 }}{{ messages[0].content }}"
    with pytest.raises(
        UserError, match=r"prompts\.jsonl:1: even with an empty last message the prompt has .* at most 20 fit"
    ):
        prepared(config_of(raw))


def test_the_error_names_a_row_that_a_template_cannot_render(tmp_path: Path, model: Path) -> None:
    raw = long_config(tmp_path, model, over_long="drop")
    raw["student"]["template"] = "{{ messages[0].content if '33 ' != messages[0].content else messages[1].content }}"
    with pytest.raises(UserError, match=r"prompts\.jsonl:34: student \(.*\): template of .*cannot render"):
        prepared(config_of(raw))


def test_the_error_names_a_row_that_the_template_of_a_scratch_model_cannot_render(tmp_path: Path) -> None:
    raw = raw_config(tmp_path, map(str, range(50)))
    raw["student"]["template"] = "{{ messages[0].content if messages[0].content != '33' else messages[1].content }}"
    with pytest.raises(UserError, match=r"prompts\.jsonl:34: template of student: cannot render .*'33'"):
        prepared(config_of(raw))


@pytest.mark.parametrize("writer", ["path", "teacher"])
def test_the_template_of_another_writer_of_rejected_responses_must_render_every_prompt(
    tmp_path: Path, writer: str
) -> None:
    """The lengths of its prompts do not count, so that runs with another writer share them."""
    models = {}
    for name, template in (
        ("student", "{{ messages[0].content }} ="),
        ("other", "{{ 'long ' * 99 }}{{ raise_exception('refused') if '33 ' == messages[0].content }}"),
    ):
        tokenizer = train_tokenizer(iter(["some text ä"]), 300)
        tokenizer.chat_template = template
        models[name] = str(tmp_path / name)
        tokenizer.save_pretrained(models[name])
        (tmp_path / name / "config.json").write_text(json.dumps(SHAPE))
    raw = raw_config(tmp_path, [f"{row} " for row in range(50)])
    raw["student"] = {"path": models["student"]}
    key, rejected = "sampling.rejected", {"path": models["other"]}
    if writer == "teacher":
        key, rejected = "teachers.weak", {"teacher": "weak"}
        raw["teachers"] = {"strong": {"path": models["student"]}, "weak": {"path": models["other"]}}
        raw.pop("teacher", None)
        raw.get("training", {}).pop("teacher", None)
    raw["sampling"] = {"rejected": rejected}
    with pytest.raises(UserError, match=rf"prompts\.jsonl:34: {key} \(.*refused"):
        prepared(config_of(raw))


# -- tools


CALL = {"function": {"name": "weather", "arguments": {"town": "Graz"}}}
TURNS = "{% for m in messages %}{{ m.content }}{% endfor %}"
TURNS_WITH_CALLS = "{% for m in messages %}{{ m.content }}{{ m.get('tool_calls') }}{% endfor %}{{ tools }}"


def agent_config(folder: Path, model: Path, template: str, **prompts: Any) -> dict[str, Any]:
    """Return a config whose prompts have calls of tools, and a pretrained student."""
    raw = raw_config(folder, [], **prompts)
    with (folder / "prompts.jsonl").open("w") as file:
        for row in range(40):
            call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
            last = {"role": "tool", "content": f"grey {row} " + "x" * 40, "tool_call_id": "c"}
            turns = [{"role": "user", "content": f"hi {row}"}, call, last]
            file.write(json.dumps({"m": turns, "t": [{"name": "weather"}]}) + "\n")
    raw["prompts"]["source"] |= {"messages_column": "m", "tools_column": "t", "reference_column": None}
    raw["training"] |= {"warmup": None, "teacher": None}
    raw["teacher"] = raw["student"] = {"path": str(model), "template": template}
    return raw


def test_a_template_that_shows_no_tools_is_reported_once(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "plad")
    config = config_of(agent_config(tmp_path, model, TURNS, heldout_fraction=0.3, over_long="truncate"))
    prepared(config)
    for kind in ("tools", "tool_calls"):
        assert caplog.text.count(f"the template of student ({model}) shows nothing of `{kind}`") == 1
    raw = agent_config(tmp_path, model, TURNS_WITH_CALLS, heldout_fraction=0.3, over_long="drop", max_tokens=60)
    caplog.clear()
    with pytest.raises(UserError, match="over_long"):
        prepared(config_of(raw | {"run": raw["run"] | {"dir": str(tmp_path / "other")}}))
    assert "shows nothing" not in caplog.text


def test_the_template_of_another_writer_that_shows_no_tools_is_reported(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "plad")
    raw = agent_config(tmp_path, model, TURNS, heldout_fraction=0.3, over_long="truncate")
    raw |= {"teacher": None, "teachers": {"strong": raw["teacher"], "weak": {"path": str(model), "template": TURNS}}}
    raw["sampling"] = {"rejected": {"teacher": "weak"}}
    prepared(config_of(raw))
    assert caplog.text.count("the template of teachers.weak") == 2


def test_a_template_that_demands_calls_is_not_asked_to_do_without(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "plad")
    demands = "{% if not messages[1].tool_calls %}{{ raise_exception('no calls') }}{% endif %}"
    prepared(config_of(agent_config(tmp_path, model, demands + TURNS, heldout_fraction=0.3, over_long="truncate")))
    assert "shows nothing of `tool_calls`" not in caplog.text


def test_a_truncated_prompt_keeps_its_tools_and_fields(tmp_path: Path, model: Path) -> None:
    raw = agent_config(tmp_path, model, TURNS, heldout_fraction=0.3, over_long="truncate", max_tokens=20)
    for dataset in prepared(config_of(raw)):
        for row in rows_of(dataset):
            _, call, last = Conversation.from_row(row).messages
            assert (call["tool_calls"], last["tool_call_id"], json.loads(row["tools"])) == (
                [CALL],
                "c",
                [{"type": "function", "function": {"name": "weather"}}],
            )
            assert len(last["content"]) < 40
