"""Prompts from where they are kept: rows of files and of data sets, one after the other, each mapped to a prompt."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2.sandbox
import xxhash

from plad_dist.config import Columns, DatasetSource, FilesSource
from plad_dist.data.files import Record, expand, records
from plad_dist.errors import UserError, first_line

# Turns of a dialogue in the form of Anthropic's HH data.
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):(.*?)(?=\n\n(?:Human|Assistant):|\Z)", re.DOTALL)
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
ROLES = ("system", "user", "assistant", "tool")
JINJA = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
# What a template that compiles can raise on a row.
JINJA_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_json = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the prompts dataset, and where it is from.

    Attributes:
        where: file or data set and row, for messages.
        content: 64-bit hash of the messages, equal for equal ones.
        teacher: which of several teachers answers it; None where there is one.
    """

    prompt_id: str
    messages: list[dict[str, str]]
    reference: str | None
    meta: dict[str, Any]
    where: str
    content: int
    teacher: str | None = None


def make_prompt(
    source: str, row: int, where: str, messages: list[dict[str, str]], reference: str | None, meta: dict[str, Any]
) -> Prompt:
    """A prompt with its id, a hash of its source, row and content, and the hash of its content alone."""
    content = _json([[message["role"], message["content"]] for message in messages]).encode()
    name = hashlib.sha256(f"{source}\0{row}\0".encode() + content).hexdigest()[:24]
    return Prompt(name, messages, reference, meta, where, xxhash.xxh3_64_intdigest(content))


def read_prompts(source: FilesSource | DatasetSource, key: str = "prompts.source") -> Iterator[Prompt]:
    """Prompts of a source, in order. Raises :class:`UserError` naming the file and row of what is wrong.

    Args:
        key: the config section of the source, for messages.
    """
    reader = _Reader(source, key)
    if isinstance(source, DatasetSource):
        yield from reader.prompts(_dataset_name(source), _dataset_records(source, key, reader.columns))
        return
    seen: Counter[str] = Counter()
    for file in expand(source.paths, key):
        name = Path(file).name
        seen[name] += 1
        # The name alone, so that files may be moved; files of one name in several folders are told apart.
        label = name if seen[name] == 1 else f"{name}#{seen[name]}"
        empty = True
        for prompt in reader.prompts(label, records(file, reader.columns)):
            empty = False
            yield prompt
        if empty:
            raise UserError(f"{file}: no prompts in it; expected one row a prompt")


class _Reader:
    """Maps records to prompts as a source says."""

    def __init__(self, source: Columns, key: str) -> None:
        self._source, self._key = source, key
        self._template = self._compiled("template")
        self._reference_template = self._compiled("reference_template")

    def _compiled(self, option: str) -> jinja2.Template | None:
        text = getattr(self._source, option)
        try:
            return None if text is None else JINJA.from_string(text)
        except jinja2.TemplateError as error:
            raise UserError(f"{self._key}.{option}: not a valid Jinja template: {error}") from None

    @property
    def columns(self) -> list[str] | None:
        """The columns that are read, None for all: a template may use any."""
        source = self._source
        if source.template is not None or source.reference_template is not None:
            return None
        prompt = source.messages_column or source.dialogue_column or source.prompt_column
        named = [prompt, source.reference_column, *source.meta_columns]
        return list(dict.fromkeys(name for name in named if name is not None))

    def prompts(self, label: str, rows: Iterator[Record]) -> Iterator[Prompt]:
        """The prompt of every record. Columns that are kept go before `source` and `row` of their names."""
        source = self._source
        for row, where, record in rows:
            if source.dialogue_column is not None:
                text = self._column(record, source.dialogue_column, "dialogue_column", where)
                messages, reference = self._dialogue(text, where)
            else:
                messages, reference = self._messages(record, where), self._reference(record, where)
            kept = {name: self._column(record, name, "meta_columns", where) for name in source.meta_columns}
            meta = {"source": label, "row": row} | kept
            yield make_prompt(label, row, where, messages, reference, meta)

    def _messages(self, record: dict[str, Any], where: str) -> list[dict[str, str]]:
        source = self._source
        if source.messages_column is not None:
            return self._unanswered(self._column(record, source.messages_column, "messages_column", where), where)
        if self._template is None:
            name = source.prompt_column
            text = self._column(record, name, "prompt_column", where)
        else:
            name = f"{self._key}.template"
            text = self._rendered(self._template, "template", record, where)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: {name!r}: expected a non-empty string, got {text!r:.60}")
        return [{"role": "user", "content": text}]

    def _rendered(self, template: jinja2.Template, option: str, record: dict[str, Any], where: str) -> str:
        try:
            return template.render(record)
        except JINJA_ERRORS as error:
            has = ", ".join(map(str, record))
            raise UserError(f"{where}: {self._key}.{option}: {error}; the row has the columns {has}") from None

    def _dialogue(self, text: Any, where: str) -> tuple[list[dict[str, str]], str | None]:
        """The turns of a dialogue but for the assistant's last one, and that one as the reference."""
        name = self._source.dialogue_column
        expected = f"{where}: {name!r}: expected a text of turns that begin with '\\n\\nHuman:' and '\\n\\nAssistant:', a human's first"
        turns = [(speaker, said.strip()) for speaker, said in _TURN.findall(text)] if isinstance(text, str) else []
        if not turns or turns[0][0] != "Human" or not str(text).lstrip().startswith("Human:"):
            raise UserError(f"{expected}; got {text!r:.60}")
        reference = turns.pop()[1] if turns[-1][0] == "Assistant" else None
        messages = [{"role": _SPEAKERS[speaker], "content": said} for speaker, said in turns]
        if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"]:
            raise UserError(f"{expected}, and a human's before the last answer; got {text!r:.60}")
        return messages, reference or None

    def _unanswered(self, messages: Any, where: str) -> list[dict[str, str]]:
        """The turns of a conversation but for an answer at its end, which is the reference."""
        turns, source = self._chat(messages, where), self._source
        if turns[-1]["role"] != "assistant":
            return turns
        name = source.messages_column
        if source.reference_column != name:
            is_free = source.reference_column is None and source.reference_template is None
            other = f", or set {self._key}.reference_column to {name} too: the last turn is the reference then"
            raise UserError(
                f"{where}: {name!r}: ends with the assistant's turn, which would be in the prompt. Leave that out{other if is_free else ''}"
            )
        if len(turns) == 1 or turns[-2]["role"] == "assistant":
            raise UserError(f"{where}: {name!r}: expected a turn of somebody else before the assistant's last one")
        return turns[:-1]

    def _chat(self, messages: Any, where: str) -> list[dict[str, str]]:
        expected = f"{where}: {self._source.messages_column!r}: expected a non-empty list of {{role, content}}"
        if not isinstance(messages, list) or not messages:
            raise UserError(f"{expected}, got {messages!r:.60}")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                raise UserError(f"{expected}, got an item {message!r:.60}")
            if message.get("role") not in ROLES:
                raise UserError(f"{where}: role {message.get('role')!r}: expected one of {', '.join(ROLES)}")
        return [{"role": message["role"], "content": message["content"]} for message in messages]

    def _reference(self, record: dict[str, Any], where: str) -> str | None:
        name = self._source.reference_column
        if self._reference_template is not None:
            text = self._rendered(self._reference_template, "reference_template", record, where)
            return text if text.strip() else None
        if name is None:
            return None
        reference = self._column(record, name, "reference_column", where)
        if name == self._source.messages_column:
            last = self._chat(reference, where)[-1]
            reference = last["content"] if last["role"] == "assistant" else None
        if reference is not None and not isinstance(reference, str):
            raise UserError(f"{where}: {name!r}: expected a string or null, got {reference!r:.60}")
        return reference if reference and reference.strip() else None  # CSV has no other way to have none

    def _column(self, record: dict[str, Any], name: str, option: str, where: str) -> Any:
        if name not in record:
            has = ", ".join(sorted(map(str, record))) or "none"
            raise UserError(f"{where}: no column {name!r}; it has {has}. Set {self._key}.{option} to one of them.")
        return record[name]


# ------------------------------------------------------------------------------------------------------------ data sets


def _dataset_name(source: DatasetSource) -> str:
    """What a data set is called in prompt ids and `meta`: the same wherever a folder is."""
    folder = Path(source.name).expanduser()
    name = folder.absolute().name if folder.is_dir() else source.name
    return ":".join(part for part in (name, source.subset or source.data_dir, source.split) if part)


def _dataset_records(source: DatasetSource, key: str, columns: list[str] | None) -> Iterator[Record]:
    try:
        data = _load(source, key)
        if columns is not None and set(columns) <= set(data.column_names or ()):
            data = data.select_columns(columns)  # what is not needed, images say, is not decoded
        row = -1
        for row, record in enumerate(data):
            yield row, f"{source.name}: row {row} (counted from 0)", record
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - `datasets` raises whatever its many readers and the hub raise
        why = first_line(error)
        if "scripts are no longer supported" in why:  # nothing of what it loads is run
            why += (
                f". Set {key}.revision to refs/convert/parquet, where the hub keeps a copy, and {key}.data_dir to the configuration's name"
                " instead of subset"
            )
        raise UserError(f"{key}: {source.name}: cannot be read as a data set: {why}") from None
    if row < 0:
        raise UserError(f"{key}: {source.name}: no prompts in split {source.split!r}; expected one row a prompt")


def _load(source: DatasetSource, key: str) -> Any:
    """The split as a stream, or memory-mapped where `save_to_disk` made it."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    folder = Path(source.name).expanduser()
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        name = str(folder) if folder.is_dir() else source.name
        return load_dataset(
            name,
            source.subset,
            data_dir=source.data_dir,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
    saved = load_from_disk(str(folder))
    if not isinstance(saved, DatasetDict):
        return saved
    if source.split not in saved:
        raise UserError(
            f"{key}.split: {source.name} has no split {source.split!r}; it has {', '.join(sorted(saved))}. Set one of them."
        )
    return saved[source.split]
