"""Readers of prompt sources: stream rows of files and datasets, and map each row to a prompt."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2.meta
import xxhash

from plad_dist.bounded_templates import BoundedEnvironment
from plad_dist.config import Columns, DatasetSource, FilesSource
from plad_dist.data.chats import ChatParser, InvalidRowError, check_turns, parse_dialogue
from plad_dist.data.conversation import Conversation, Messages, Tools, to_json
from plad_dist.data.datasets_library import dataset_name, dataset_records
from plad_dist.data.files import Record, is_table, records
from plad_dist.data.source_files import SourceFile, expand
from plad_dist.errors import UserError, excerpt

JINJA = BoundedEnvironment(undefined=jinja2.StrictUndefined)
# Errors that a template which compiles can raise on a row.
JINJA_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


# What a null in a column stands for.
_NULLS = {"reference_column": "a reference", "tools_column": "tools", "meta_columns": "a value"}


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


def read_prompts(
    source: FilesSource | DatasetSource,
    key: str = "prompts.source",
    on_invalid: Callable[[InvalidRowError], None] = lambda error: None,
) -> Iterator[Prompt]:
    """Yield the prompts of a source in order.

    Args:
        key: config section of the source, for messages.
        on_invalid: called for each row that `invalid_rows: drop` leaves out.

    Raises:
        UserError: the source or a row is invalid. The message names the file and the row.
    """
    reader = _Reader(source, key, on_invalid)
    if isinstance(source, DatasetSource):
        yield from reader.prompts(dataset_name(source), dataset_records(source, key, reader.columns), is_table=True)
    else:
        yield from _prompts_of_files(source, key, reader)
    reader.check_variety()


class _Reader:
    """Maps the records of a source to prompts.

    Attributes:
        rows: number of records read so far.
    """

    def __init__(self, source: Columns, key: str, on_invalid: Callable[[InvalidRowError], None]) -> None:
        self._source, self._key, self._on_invalid = source, key, on_invalid
        self.rows = 0
        self._first_names: frozenset[str] = frozenset()
        self._template = _RowTemplate.of(source, "template", key)
        self._reference_template = _RowTemplate.of(source, "reference_template", key)
        self._parsers = {is_table: ChatParser(source, key, is_table) for is_table in (False, True)}

    @property
    def columns(self) -> list[str] | None:
        """Columns to read, or None for all, because a template can use any column."""
        source = self._source
        if source.template is not None or source.reference_template is not None:
            return None
        prompt = source.messages_column or source.dialogue_column or source.prompt_column
        names = [prompt, source.reference_column, source.tools_column, *source.meta_columns]
        return list(dict.fromkeys(name for name in names if name is not None))

    def prompts(self, label: str, rows: Iterator[Record], *, is_table: bool) -> Iterator[Prompt]:
        """Yield the prompt of every record.

        In `meta`, a kept column named `source` or `row` replaces the value of that name.

        Args:
            is_table: records are rows of a table, in whose structs null stands for a missing key.
        """
        source = self._source
        for row, location, record in rows:
            self.rows += 1
            self._first_names = self._first_names or frozenset(record)
            try:
                messages, reference = self._texts(record, location, is_table)
                tools = self._tools(record, location, is_table)
            except InvalidRowError as error:
                if source.invalid_rows == "fail":
                    raise
                self._on_invalid(error)
                continue
            columns = {name: self._column(record, name, "meta_columns", location) for name in source.meta_columns}
            meta = {"source": label, "row": row} | columns
            yield make_prompt(label, row, location, Conversation(messages, tools), reference, meta)

    def _tools(self, record: dict[str, Any], location: str, is_table: bool) -> Tools | None:
        name = self._source.tools_column
        if name is None:
            return None
        return self._parsers[is_table].tools(
            self._column(record, name, "tools_column", location), f"{location}: {name!r}"
        )

    def check_variety(self) -> None:
        """Raise :class:`UserError` if the template made all prompts of different rows the same."""
        if self._template is not None and self._template.is_constant:
            raise UserError(
                f"{self._key}.template: renders the same prompt for all {self._template.rows:,} rows, although the "
                "rows differ; use the columns that hold the text of the prompt"
            )

    def _texts(self, record: dict[str, Any], location: str, is_table: bool) -> tuple[Messages, str | None]:
        """Return the messages of a row without the response, and its reference."""
        source = self._source
        if source.dialogue_column is not None:
            text = self._column(record, source.dialogue_column, "dialogue_column", location)
            return parse_dialogue(text, f"{location}: {source.dialogue_column!r}")
        if source.messages_column is not None:
            value = self._column(record, source.messages_column, "messages_column", location)
            where = f"{location}: {source.messages_column!r}"
            messages, response = self._without_response(self._parsers[is_table].messages(value, where), where)
            check_turns(messages, where)
            is_reference = source.reference_column == source.messages_column
            return messages, response if is_reference else self._reference(record, location)
        if self._template is None:
            name = source.prompt_column
            text = self._column(record, name, "prompt_column", location)
        else:
            name = f"{self._key}.template"
            text = self._template.render(record, location)
        if not isinstance(text, str) or not text.strip():
            raise InvalidRowError(f"{location}: {name!r}: expected a non-empty string, got {excerpt(text)}")
        if self._template is not None:
            self._template.check_use(record, location)
        return [{"role": "user", "content": text}], self._reference(record, location)

    def _without_response(self, turns: Messages, where: str) -> tuple[Messages, str | None]:
        """Return a conversation without its final response, which is the reference."""
        source, last = self._source, turns[-1]
        if last["role"] != "assistant":
            return turns, None
        if source.reference_column != source.messages_column:
            has_reference = source.reference_column is not None or source.reference_template is not None
            advice = f", or set {self._key}.reference_column to {source.messages_column} too to make it the reference"
            raise InvalidRowError(
                f"{where}: ends with the assistant's turn, which would become part of the prompt; remove that turn"
                f"{'' if has_reference else advice}"
            )
        if len(turns) == 1 or turns[-2]["role"] == "assistant":
            raise InvalidRowError(f"{where}: expected a turn of another role before the assistant's last one")
        if lost := last.keys() - {"role", "content", "name"}:
            advice = f", or list the field in {self._key}.ignored_fields" if last["content"] else ""
            raise InvalidRowError(
                f"{where}: the last turn of the assistant has {', '.join(sorted(lost))}, but a reference is a text; "
                f"remove the turn or the row{advice}"
            )
        return turns[:-1], last["content"] if last["content"].strip() else None

    def _reference(self, record: dict[str, Any], location: str) -> str | None:
        name = self._source.reference_column
        if self._reference_template is not None:
            text = self._reference_template.render(record, location)
            self._reference_template.check_use(record, location)
            return text if text.strip() else None
        if name is None:
            return None
        reference = self._column(record, name, "reference_column", location)
        if reference is not None and not isinstance(reference, str):
            raise InvalidRowError(f"{location}: {name!r}: expected a string or null, got {excerpt(reference)}")
        return reference if reference and reference.strip() else None  # CSV cannot express a missing value otherwise

    def _column(self, record: dict[str, Any], name: str, option: str, location: str) -> Any:
        if name in record:
            return record[name]
        if name in self._first_names:
            nothing = _NULLS.get(option)
            raise UserError(
                f"{location}: this row lacks the key {name!r}, which the first row has; "
                f"{f'write null for a row without {nothing}' if nothing else 'add it, or remove the row'}"
            )
        advice = ", or write null if other rows have it" if option in _NULLS else ""
        raise UserError(
            f"{location}: no column {name!r}; it has {_quoted(record)}. Set {self._key}.{option} to one of them{advice}"
        )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(repr, names))) or "none"


class _RowTemplate:
    """Jinja template over the columns of a row.

    Attributes:
        rows: number of rows rendered so far.
    """

    _FEWEST_ROWS = 5  # of which the texts say something about the template

    def __init__(self, text: str, key: str) -> None:
        self._key, self._source = key, text
        try:
            self._names = jinja2.meta.find_undeclared_variables(JINJA.parse(text))
            self._template = JINJA.from_string(text)
        except jinja2.TemplateError as error:
            raise UserError(f"{key}: not a valid Jinja template: {error}") from None
        self.rows, self._texts_differ, self._rows_differ = 0, False, False
        self._first: tuple[str, dict[str, Any]] | None = None

    @classmethod
    def of(cls, source: Columns, option: str, key: str) -> _RowTemplate | None:
        """Return the template of an option, None if it is not set."""
        text = getattr(source, option)
        return None if text is None else cls(text, f"{key}.{option}")

    def render(self, record: dict[str, Any], location: str) -> str:
        """Return the text of a row. Raise :class:`UserError` if the row cannot be rendered."""
        try:
            text = self._template.render(record)
        except JINJA_ERRORS as error:
            raise UserError(f"{location}: {self._key}: {error}; the row has the columns {_quoted(record)}") from None
        self.rows += 1
        self._first = self._first or (text, record)
        if not self._texts_differ:
            self._texts_differ = text != self._first[0]
            self._rows_differ |= record != self._first[1]
        return text

    @property
    def is_constant(self) -> bool:
        """True if the rows rendered so far differ, but their texts do not."""
        return self.rows >= self._FEWEST_ROWS and self._rows_differ and not self._texts_differ

    def check_use(self, record: dict[str, Any], location: str) -> None:
        """Raise :class:`UserError` if the template uses no column of a row."""
        if not self._names & record.keys():
            raise UserError(
                f"{location}: {self._key}: uses no column of the row, so its text is the same for all rows; the row "
                f"has the columns {_quoted(record)}. Write a column as {{{{ name }}}}; got "
                f"{excerpt(self._source, 80)}"
            )


# -- files


def _prompts_of_files(source: FilesSource, key: str, reader: _Reader) -> Iterator[Prompt]:
    files_by_name: Counter[str] = Counter()
    empty_parts: list[str] = []
    for file in expand(source.paths, key):
        name = Path(file.path).name
        files_by_name[name] += 1
        # Prompt ids depend on the name alone, so that files can be moved. A number distinguishes
        # files of the same name in several folders.
        label = name if files_by_name[name] == 1 else f"{name}#{files_by_name[name]}"
        earlier = reader.rows
        yield from reader.prompts(label, _records_of(file, reader.columns), is_table=is_table(file.path))
        is_empty = reader.rows == earlier
        if is_empty and not file.is_part:  # a job can write empty parts, but not all of them can be empty
            raise UserError(f"{file.path}: no prompts; expected one row per prompt")
        empty_parts += [file.path] * is_empty
    if not reader.rows:
        raise UserError(f"{', '.join(empty_parts[:3])}: no prompts in any part; expected one row per prompt")


def _records_of(file: SourceFile, columns: list[str] | None) -> Iterator[Record]:
    """Yield the records of a file, with the columns that its folders give to every row."""
    if not file.columns:
        yield from records(file.path, columns)
        return
    if columns is not None:
        columns = [name for name in columns if name not in file.columns]
    for row, location, record in records(file.path, columns):
        for name, value in file.columns.items():
            if name in record and str(record[name]) != value:
                raise UserError(
                    f"{location}: the column {name!r} is given twice: {value!r} by the folder, "
                    f"{excerpt(record[name])} by the file; correct one of the two"
                )
        yield row, location, file.columns | record
