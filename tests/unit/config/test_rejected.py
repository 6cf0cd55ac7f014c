"""The model that writes the rejected responses: what a config may name, and what it changes."""

from __future__ import annotations

from typing import Any

import pytest

from plad_dist.config import Config, is_operational
from plad_dist.config_file import parse_config
from plad_dist.errors import UserError
from plad_dist.fingerprint import fingerprint

BASE: dict[str, Any] = {
    "run": {"dir": "somewhere"},
    "prompts": {"source": {"type": "files", "paths": ["a.jsonl"]}},
    "student": {"path": "student"},
}
SEVERAL = {"teachers": {"strong": {"path": "strong"}, "weak": {"path": "weak"}}}


def config_of(rejected: Any, **sections: Any) -> Config:
    sampling = {"rejected": rejected} | sections.pop("sampling", {})
    teacher = {} if "teachers" in sections else {"teacher": {"path": "teacher"}}
    return parse_config(BASE | teacher | {"sampling": sampling} | sections, "test")


@pytest.mark.parametrize(
    ("rejected", "sections", "message"),
    [
        ({}, {}, "sampling.rejected: needs exactly one of `path`"),
        ({"path": "a", "phase": "student-init"}, {}, "sampling.rejected: needs exactly one of `path`"),
        ({"phase": "student-init", "revision": "v1"}, {}, "revision: is that of `path`"),
        ({"phase": "warmup"}, {}, "sampling.rejected.phase: expected"),
        ({"pth": "a"}, {}, "sampling.rejected.pth: unknown key; did you mean `path`?"),
        ({"teacher": "teacher"}, {}, "sampling.rejected.teacher: 'teacher': needs several `teachers`"),
        ({"teacher": "wek"}, SEVERAL, "'wek': no such teacher; expected one of strong, weak"),
        ({"teacher": "a"}, {"teachers": {"a": {"path": "a"}}}, "'a': is the only one, and none is left to write"),
        (
            {"teacher": "weak"},
            {"teachers": SEVERAL["teachers"] | {"weak": {"path": "weak", "share": 2.0, "filter": "true"}}},
            "teachers.weak.filter: has no effect, because this teacher writes the rejected responses to all prompts",
        ),
        (
            {"teacher": "weak"},
            {"teachers": SEVERAL["teachers"] | {"weak": {"path": "weak", "sampling": {"n": 3}}}},
            "teachers.weak.sampling.n: 3: must be equal to sampling.student.n, which is 1",
        ),
        (
            {"path": "a"},
            {"teachers": {"rejected": {"path": "b"}}},
            "teachers: name 'rejected': is that of the model of sampling.rejected.path",
        ),
        (
            {"teacher": "weak"},
            {
                "teachers": SEVERAL["teachers"] | {"weak": {"endpoint": {"url": "http://host/v1", "model": "m"}}},
                "prompts": {
                    "source": {"type": "files", "paths": ["a"], "messages_column": "m", "tools_column": "tools"}
                },
            },
            "teachers.weak.endpoint.api: chat: a server returns calls of tools apart",
        ),
    ],
)
def test_a_wrong_writer_is_refused_with_its_key(rejected: Any, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        config_of(rejected, **sections)
    assert message in str(error.value)


def test_a_run_without_the_key_keeps_the_fingerprint_that_it_had_before_the_key_existed() -> None:
    config = config_of(None)
    keys = {key: value for key, value in config.flat().items() if not is_operational(key)}
    assert keys.pop("sampling.rejected") is None
    assert config.fingerprint() == fingerprint("run", keys=keys)
    writers = ({"phase": "student-init"}, {"path": "a"}, {"path": "a", "revision": "v1"}, {"path": "b"})
    assert len({config_of(writer).fingerprint() for writer in (None, *writers)}) == 5


def test_a_teacher_that_writes_rejected_responses_writes_no_chosen_ones() -> None:
    config = config_of({"teacher": "weak"}, **SEVERAL, sampling={"student": {"n": 2}})
    assert list(config.all_teachers()) == ["strong"]
    assert list(config.named_models()) == ["teachers.strong", "student", "teachers.weak"]
    writer = config.rejected_writer()
    assert writer is not None
    assert (writer.key, writer.section, writer.sampling.n) == ("teachers.weak", "sampling.student", 2)
    own = SEVERAL["teachers"] | {"weak": {"path": "weak", "sampling": {"temperature": 0.5}}}
    writer = config_of({"teacher": "weak"}, teachers=own).rejected_writer()
    assert writer is not None
    assert (writer.section, writer.sampling.temperature) == ("teachers.weak.sampling", 0.5)


def test_another_model_renders_its_prompts_with_the_date_of_the_run() -> None:
    config = config_of({"path": "weak", "revision": "v1"}).with_date("2026-01-31")
    writer = config.rejected_writer()
    assert writer is not None
    assert (writer.model.revision, writer.model.rendering()["date"]) == ("v1", "2026-01-31")
    assert "sampling.rejected" in config.rendering_models()


def test_a_student_before_its_training_is_no_other_model() -> None:
    config = config_of({"phase": "student-init"})
    assert config.rejected_writer() is None
    assert list(config.named_models()) == ["teacher", "student"]


def test_the_context_of_another_model_is_its_own() -> None:
    writer = config_of({"path": "weak", "max_length": 64}).rejected_writer()
    assert writer is not None
    assert writer.model.max_length == 64
    with pytest.raises(UserError, match=r"max_length: is that of `path`"):
        config_of({"phase": "student-init", "max_length": 64})
