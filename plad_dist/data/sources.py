"""Readers of prompt sources: stream rows of files and datasets, and map each row to a prompt."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2.sandbox
import xxhash

from plad_dist.config import Columns, DatasetSource, FilesSource
from plad_dist.data.conversation import Conversation, Messages, Tools, to_json
from plad_dist.data.files import Record, expand, records
from plad_dist.errors import UserError, first_line

# Turns of a dialogue in the format of Anthropic's HH data.
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):(.*?)(?=\n\n(?:Human|Assistant):|\Z)", re.DOTALL)
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
ROLES = ("system", "user", "assistant", "tool")
JINJA = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
# Errors that a template which compiles can raise on a row.
JINJA_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the prompts dataset, and its location in the source.

    Attributes:
        prompt_id: hash of source, row and messages, as 24 hexadecimal digits.
        messages: chat messages, without the response; see :class:`Conversation`.
        reference: gold response, or None.
        meta: source, row, and the columns to keep.
        location: file or data set and row, for messages.
        content: 64-bit hash of the conversation alone; equal conversations have equal hashes.
        teacher: name of the teacher that responds, or None if the run has only one.
        tools: definitions of the tools that the model may call, None without.
    """

    prompt_id: str
    messages: Messages
    reference: str | None
    meta: dict[str, Any]
    location: str
    content: int
    teacher: str | None = None
    tools: Tools | None = None

    @property
    def conversation(self) -> Conversation:
        """Conversation to render."""
        return Conversation(self.messages, self.tools)


def make_prompt(
    source: str,
    row: int,
    location: str,
    conversation: Conversation,
    reference: str | None,
    meta: dict[str, Any],
) -> Prompt:
    """Return a prompt with its id and the hash of its conversation; see :class:`Prompt`."""
    messages, tools = conversation.messages, conversation.tools
    if conversation.is_plain and tools is None:
        content = to_json([[message["role"], message["content"]] for message in messages]).encode()
    else:
        content = to_json([messages, tools]).encode()
    prompt_id = hashlib.sha256(f"{source}\0{row}\0".encode() + content).hexdigest()[:24]
    return Prompt(prompt_id, messages, reference, meta, location, xxhash.xxh3_64_intdigest(content), tools=tools)


def read_prompts(source: FilesSource | DatasetSource, key: str = "prompts.source") -> Iterator[Prompt]:
    """Yield the prompts of a source in order.

    Args:
        key: config section of the source, for messages.

    Raises:
        UserError: the source or a row is invalid. The message names the file and the row.
    """
    reader = _Reader(source, key)
    if isinstance(source, DatasetSource):
        yield from reader.prompts(_dataset_name(source), _dataset_records(source, key, reader.columns))
        return
    files_by_name: Counter[str] = Counter()
    for file in expand(source.paths, key):
        name = Path(file).name
        files_by_name[name] += 1
        # Prompt ids depend on the name alone, so that files can be moved. A number distinguishes
        # files of the same name in several folders.
        label = name if files_by_name[name] == 1 else f"{name}#{files_by_name[name]}"
        is_empty = True
        for prompt in reader.prompts(label, records(file, reader.columns)):
            is_empty = False
            yield prompt
        if is_empty:
            raise UserError(f"{file}: no prompts; expected one row per prompt")


class _Reader:
    """Maps the records of a source to prompts."""

    def __init__(self, source: Columns, key: str) -> None:
        self._source, self._key = source, key
        self._template = self._compile("template")
        self._reference_template = self._compile("reference_template")

    def _compile(self, option: str) -> jinja2.Template | None:
        text = getattr(self._source, option)
        try:
            return None if text is None else JINJA.from_string(text)
        except jinja2.TemplateError as error:
            raise UserError(f"{self._key}.{option}: not a valid Jinja template: {error}") from None

    @property
    def columns(self) -> list[str] | None:
        """Columns to read, or None for all, because a template can use any column."""
        source = self._source
        if source.template is not None or source.reference_template is not None:
            return None
        prompt = source.messages_column or source.dialogue_column or source.prompt_column
        names = [prompt, source.reference_column, *source.meta_columns]
        return list(dict.fromkeys(name for name in names if name is not None))

    def prompts(self, label: str, rows: Iterator[Record]) -> Iterator[Prompt]:
        """Yield the prompt of every record.

        In `meta`, a kept column named `source` or `row` replaces the value of that name.
        """
        source = self._source
        for row, location, record in rows:
            if source.dialogue_column is not None:
                text = self._column(record, source.dialogue_column, "dialogue_column", location)
                messages, reference = self._dialogue(text, location)
            else:
                messages, reference = self._messages(record, location), self._reference(record, location)
            columns = {name: self._column(record, name, "meta_columns", location) for name in source.meta_columns}
            meta = {"source": label, "row": row} | columns
            yield make_prompt(label, row, location, Conversation(messages), reference, meta)

    def _messages(self, record: dict[str, Any], location: str) -> Messages:
        source = self._source
        if source.messages_column is not None:
            messages = self._column(record, source.messages_column, "messages_column", location)
            return self._without_response(messages, location)
        if self._template is None:
            name = source.prompt_column
            text = self._column(record, name, "prompt_column", location)
        else:
            name = f"{self._key}.template"
            text = self._render(self._template, "template", record, location)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{location}: {name!r}: expected a non-empty string, got {text!r:.60}")
        return [{"role": "user", "content": text}]

    def _render(self, template: jinja2.Template, option: str, record: dict[str, Any], location: str) -> str:
        try:
            return template.render(record)
        except JINJA_ERRORS as error:
            columns = ", ".join(map(str, record))
            raise UserError(f"{location}: {self._key}.{option}: {error}; the row has the columns {columns}") from None

    def _dialogue(self, text: Any, location: str) -> tuple[Messages, str | None]:
        """Return the turns of a dialogue before its final response, and that response, if any."""
        name = self._source.dialogue_column
        expected = (
            f"{location}: {name!r}: expected a text of turns that begin with '\\n\\nHuman:' and '\\n\\nAssistant:', "
            "the first by the human"
        )
        turns = [(speaker, turn.strip()) for speaker, turn in _TURN.findall(text)] if isinstance(text, str) else []
        if not turns or turns[0][0] != "Human" or not str(text).lstrip().startswith("Human:"):
            raise UserError(f"{expected}; got {text!r:.60}")
        reference = turns.pop()[1] if turns[-1][0] == "Assistant" else None
        messages = [{"role": _SPEAKERS[speaker], "content": turn} for speaker, turn in turns]
        if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"]:
            raise UserError(f"{expected}, and a turn of the human before the last response; got {text!r:.60}")
        return messages, reference or None

    def _without_response(self, messages: Any, location: str) -> Messages:
        """Return the turns of a conversation without a final response, which is the reference."""
        turns, source = self._parse_chat(messages, location), self._source
        if turns[-1]["role"] != "assistant":
            return turns
        name = source.messages_column
        if source.reference_column != name:
            has_reference = source.reference_column is not None or source.reference_template is not None
            advice = f", or set {self._key}.reference_column to {name} too to make it the reference"
            raise UserError(
                f"{location}: {name!r}: ends with the assistant's turn, which would become part of the prompt; remove "
                f"that turn{'' if has_reference else advice}"
            )
        if len(turns) == 1 or turns[-2]["role"] == "assistant":
            raise UserError(f"{location}: {name!r}: expected a turn of another role before the assistant's last one")
        return turns[:-1]

    def _parse_chat(self, messages: Any, location: str) -> Messages:
        expected = f"{location}: {self._source.messages_column!r}: expected a non-empty list of {{role, content}}"
        if not isinstance(messages, list) or not messages:
            raise UserError(f"{expected}, got {messages!r:.60}")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                raise UserError(f"{expected}, got an item {message!r:.60}")
            if message.get("role") not in ROLES:
                raise UserError(f"{location}: role {message.get('role')!r}: expected one of {', '.join(ROLES)}")
        return [{"role": message["role"], "content": message["content"]} for message in messages]

    def _reference(self, record: dict[str, Any], location: str) -> str | None:
        name = self._source.reference_column
        if self._reference_template is not None:
            text = self._render(self._reference_template, "reference_template", record, location)
            return text if text.strip() else None
        if name is None:
            return None
        reference = self._column(record, name, "reference_column", location)
        if name == self._source.messages_column:
            last = self._parse_chat(reference, location)[-1]
            reference = last["content"] if last["role"] == "assistant" else None
        if reference is not None and not isinstance(reference, str):
            raise UserError(f"{location}: {name!r}: expected a string or null, got {reference!r:.60}")
        return reference if reference and reference.strip() else None  # CSV cannot express a missing value otherwise

    def _column(self, record: dict[str, Any], name: str, option: str, location: str) -> Any:
        if name not in record:
            columns = ", ".join(sorted(map(str, record))) or "none"
            raise UserError(
                f"{location}: no column {name!r}; it has {columns}. Set {self._key}.{option} to one of them"
            )
        return record[name]


# -- data sets


def _dataset_name(source: DatasetSource) -> str:
    """Return the name of a data set in prompt ids and `meta`, without its parent folders."""
    folder = Path(source.name).expanduser()
    name = folder.absolute().name if folder.is_dir() else source.name
    return ":".join(part for part in (name, source.subset or source.data_dir, source.split) if part)


def _dataset_records(source: DatasetSource, key: str, columns: list[str] | None) -> Iterator[Record]:
    try:
        data = _load(source, key)
        if columns is not None and set(columns) <= set(data.column_names or ()):
            data = data.select_columns(columns)  # other columns, such as images, are not decoded
        row = -1
        for row, record in enumerate(data):
            yield row, f"{source.name}: row {row} (counted from 0)", record
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - `datasets` passes on any error of its readers and of the hub
        cause = first_line(error)
        if "scripts are no longer supported" in cause:  # code of a data set is never run
            cause += (
                f". Set {key}.revision to refs/convert/parquet, where the hub keeps a copy, and {key}.data_dir to the "
                "name of the configuration instead of subset"
            )
        raise UserError(f"{key}: {source.name}: cannot be read as a data set: {cause}") from None
    if row < 0:
        raise UserError(f"{key}: {source.name}: no prompts in split {source.split!r}; expected one row per prompt")


def _load(source: DatasetSource, key: str) -> Any:
    """Return the split as a stream, or memory-mapped if `save_to_disk` wrote it."""
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
        splits = ", ".join(sorted(saved))
        raise UserError(f"{key}.split: {source.name} has no split {source.split!r}; it has {splits}. Set one of them")
    return saved[source.split]
