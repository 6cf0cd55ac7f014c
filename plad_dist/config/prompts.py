"""Config of the prompts and of each kind of source."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from plad_dist.config.section import OPERATIONAL, Section
from plad_dist.config.values import PathText, TemplateText


class Columns(Section):
    """Columns of a row that form its prompt, reference and metadata."""

    prompt_column: str = Field(
        "prompt",
        description="Column with the prompt text. Ignored if `messages_column`, `template` or `dialogue_column` is "
        "set.",
    )
    messages_column: str | None = Field(
        None,
        description="Column with chat messages, a list of {role, content}, or the JSON of one. Roles are system (or "
        "developer), user, assistant and tool (or function, with a `name`). A message may also have `tool_calls`, "
        "`tool_call_id`, `name`, and its thought as `reasoning_content`, `reasoning` or `thinking`, which chat "
        "templates read; another field is an error, see `ignored_fields`. If the content is a list of text parts, they "
        "are joined by line ends, as vLLM does it.",
    )
    messages_format: Literal["openai", "sharegpt"] = Field(
        "openai",
        description="Form of the items of `messages_column`. openai: {role, content}. sharegpt: {from, value}, by "
        "human (user), gpt (assistant), system, tool or observation (tool), and function_call (a call of a tool).",
    )
    ignored_fields: list[str] = Field(
        default=[], description="Fields of messages, and of their text parts, to leave out; others are an error."
    )
    tools_column: str | None = Field(
        None,
        description="Column with the tools that the model may call: a list of definitions {type, function}, or the "
        "JSON of one. Chat templates get them as `tools`. A row without a value has no tools.",
    )
    template: TemplateText | None = Field(
        None, description="Jinja template over the columns of a row that renders the prompt text."
    )
    dialogue_column: str | None = Field(
        None,
        description="Column with a whole dialogue as one text, in the format of Anthropic's HH data: every turn "
        "begins with `\\n\\nHuman:` or `\\n\\nAssistant:`. The last turn of the assistant is the reference. The turns "
        "before it are the prompt.",
    )
    reference_column: str | None = Field(
        None,
        description="Column with the reference. A row without a value has no reference. If it equals "
        "`messages_column`, a last turn by the assistant is the reference.",
    )
    reference_template: TemplateText | None = Field(
        None,
        description="Jinja template over the columns of a row that renders the reference. If the result is empty, the "
        "row has no reference.",
    )
    invalid_rows: Literal["fail", "drop"] = Field(
        "fail",
        description="Action for a row whose prompt, conversation, tools or reference cannot be read in the form that "
        "the other keys name. drop: leave it out and count it. In any case, a missing column is an error, and so is "
        "a line that is not JSON, or a row of CSV with another number of fields than the header.",
    )
    meta_columns: list[str] = Field(default=[], description="Columns to keep in `meta`, for the filters of teachers.")

    @model_validator(mode="after")
    def _check_columns(self) -> Columns:
        origins = (self.messages_column, self.template, self.dialogue_column)
        if sum(origin is not None for origin in origins) > 1:
            raise ValueError("needs at most one of `messages_column`, `template` and `dialogue_column`")
        if self.messages_column is None and self.messages_format != "openai":
            raise ValueError("`messages_format` describes `messages_column`, which is missing")
        if self.messages_column is None and self.ignored_fields:
            raise ValueError("`ignored_fields` names fields of `messages_column`, which is missing")
        if kept := {"role", "content", "from", "value"} & set(self.ignored_fields):
            raise ValueError(f"`ignored_fields` has `{min(kept)}`, which every message needs; remove it")
        references = (self.reference_column, self.reference_template, self.dialogue_column)
        if sum(origin is not None for origin in references) > 1:
            raise ValueError(
                "needs at most one of `reference_column`, `reference_template` and `dialogue_column`, which includes "
                "the reference"
            )
        return self

    @property
    def has_references(self) -> bool:
        """True if rows may have a reference."""
        return any((self.reference_column, self.reference_template, self.dialogue_column))


class FilesSource(Columns):
    """Prompts from JSON, Parquet, Arrow or CSV files, told apart by their suffix."""

    type: Literal["files"] = Field(description="files: JSON Lines, JSON, Parquet, Arrow or CSV files, by suffix.")
    paths: list[Annotated[PathText, Field(min_length=1)]] = Field(
        min_length=1,
        description="Files, glob patterns, or folders of parts as Spark and Hive write them, read in sorted order, "
        "each file once. Paths or s3://, gs:// and az:// URIs.",
    )


class DatasetSource(Columns):
    """Prompts from the `datasets` library, read as a stream and never held in memory as a whole."""

    type: Literal["dataset"] = Field(description="dataset: a dataset read by the `datasets` library.")
    name: PathText = Field(
        min_length=1, description="Hub name, folder of data files, or folder written by `save_to_disk`."
    )
    subset: str | None = Field(None, description="Configuration of the dataset, if it has several.")
    data_dir: PathText | None = Field(
        None,
        min_length=1,
        description="Folder of the dataset to read, such as that of a configuration in the Parquet copy on the hub "
        "(revision `refs/convert/parquet`).",
    )
    split: str = Field("train", min_length=1, description="Split to read.")
    revision: str | None = Field(
        None, description="Revision of the hub repository. If unset, the repository's default branch."
    )


class PythonFunctionsSource(Section):
    """Names and one-line descriptions of functions, harvested from the installed Python packages.

    One of the two is the prompt, the other the reference. Source code is parsed, never imported or
    run.
    """

    type: Literal["python_functions"] = Field(
        description="python_functions: names and descriptions of functions in the installed Python packages."
    )
    answer: Literal["name", "description"] = Field(
        "name",
        description="What the prompt asks for. name: the name of a function, a few words. description: its "
        "description, a sentence of about a dozen words.",
    )
    limit: int = Field(60_000, ge=100, description="Maximum number of training rows.")
    heldout_limit: int = Field(600, ge=10, description="Maximum number of held-out rows.")
    heldout_packages: list[str] = Field(
        default=["asyncio", "email", "http", "logging", "networkx", "tkinter", "unittest", "xml"],
        min_length=1,
        description="Top-level packages whose functions are used only for evaluation.",
    )
    seconds: int = Field(120, ge=5, description="Time limit of the harvest, in seconds.", json_schema_extra=OPERATIONAL)


class Prompts(Section):
    """Prompts for distillation, and held-out prompts for evaluation."""

    source: FilesSource | DatasetSource | PythonFunctionsSource = Field(
        discriminator="type", description="Source of the prompts."
    )
    heldout: Annotated[FilesSource | DatasetSource, Field(discriminator="type")] | None = Field(
        None,
        description="Source of the held-out prompts. Training prompts that it also contains are dropped. If unset, "
        "python_functions provides its own, and of other sources heldout_fraction is held out.",
    )
    heldout_fraction: float = Field(
        0.02, ge=0.0, lt=1.0, description="Share of a files or dataset source to hold out if `heldout` is unset."
    )
    block_size: int = Field(512, ge=1, le=100_000, description="Prompts per block, the unit of work and of commit.")
    duplicates: Literal["keep", "drop", "fail"] = Field(
        "keep",
        description="Action for a prompt that repeats an earlier one word for word. Duplicates are counted in any "
        "case.",
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Maximum length of a prompt, in tokens of each pretrained model that answers it. If unset, the "
        "context length of the model minus one token, which is also the upper limit.",
    )
    over_long: Literal["fail", "drop", "truncate"] = Field(
        "fail", description="Action for a prompt over max_tokens. truncate: cut the end of its last message."
    )
