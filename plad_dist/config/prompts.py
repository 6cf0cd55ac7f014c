"""Where prompts come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from plad_dist.config.section import OPERATIONAL, Section


class Columns(Section):
    """Which columns of a row make a prompt."""

    prompt_column: str = Field(
        "prompt", description="Column with the prompt text. Ignored where another origin of the prompt is set."
    )
    messages_column: str | None = Field(None, description="Column with chat messages (list of role and content).")
    template: str | None = Field(
        None, description="Jinja template over the row's columns that makes the prompt text from several of them."
    )
    dialogue_column: str | None = Field(
        None,
        description="Column with a whole dialogue as one text, in which `\\n\\nHuman:` and `\\n\\nAssistant:` begin a turn, as in "
        "Anthropic's HH data; the prompt is all but its last turn of the assistant, which is the reference.",
    )
    reference_column: str | None = Field(
        None,
        description="Column with a reference response, if there is one. The `messages_column` itself: its last turn, the assistant's.",
    )
    reference_template: str | None = Field(
        None, description="Jinja template over the row's columns that makes the reference; an empty text is none."
    )
    meta_columns: list[str] = Field(default=[], description="Columns kept in `meta`, for the filters of teachers.")

    @model_validator(mode="after")
    def _one_origin_of_the_prompt(self) -> Columns:
        origins = (self.messages_column, self.template, self.dialogue_column)
        if sum(origin is not None for origin in origins) > 1:
            raise ValueError("needs at most one of `messages_column`, `template` and `dialogue_column`")
        references = (self.reference_column, self.reference_template, self.dialogue_column)
        if sum(origin is not None for origin in references) > 1:
            raise ValueError(
                "needs at most one of `reference_column`, `reference_template` and `dialogue_column`, which has the reference in it"
            )
        return self

    @property
    def has_references(self) -> bool:
        """Whether rows may have a reference."""
        return any((self.reference_column, self.reference_template, self.dialogue_column))


class FilesSource(Columns):
    """Prompts read from files: JSON lines, Parquet, Arrow or CSV, by their suffix."""

    type: Literal["files"]
    paths: list[str] = Field(
        min_length=1, description="Files or glob patterns, read in sorted order; paths or s3://, gs://, az:// URIs."
    )


class DatasetSource(Columns):
    """Prompts read through the `datasets` library, as a stream: nothing is held in memory."""

    type: Literal["dataset"]
    name: str = Field(min_length=1, description="Hub name, folder of data files, or folder made by `save_to_disk`.")
    subset: str | None = Field(None, description="Configuration of the data set, where it has several.")
    data_dir: str | None = Field(
        None,
        min_length=1,
        description="Folder of it to read, such as that of a configuration in the hub's own copies as Parquet (revision `refs/convert/parquet`).",
    )
    split: str = Field("train", min_length=1, description="Split to read.")
    revision: str | None = Field(None, description="Revision of the hub repository.")


class PythonFunctionsSource(Section):
    """Names of functions and their one-line descriptions, harvested from the installed Python packages; one is asked for by the other.

    Source code is parsed, never imported or run.
    """

    type: Literal["python_functions"]
    answer: Literal["name", "description"] = Field(
        "name", description="What is asked for: a few words, or a sentence of a dozen, which are longer answers."
    )
    limit: int = Field(60_000, ge=100, description="At most so many training rows.")
    heldout_limit: int = Field(600, ge=10, description="At most so many held-out rows.")
    heldout_packages: list[str] = Field(
        default=["asyncio", "email", "http", "logging", "networkx", "tkinter", "unittest", "xml"],
        min_length=1,
        description="Top-level packages whose functions are only used for evaluation.",
    )
    seconds: int = Field(120, ge=5, description="Stop harvesting after so many seconds.", json_schema_extra=OPERATIONAL)


class Prompts(Section):
    """The prompts to distil on, and those held out for evaluation."""

    source: Annotated[FilesSource | DatasetSource | PythonFunctionsSource, Field(discriminator="type")]
    heldout: Annotated[FilesSource | DatasetSource, Field(discriminator="type")] | None = Field(
        None,
        description="Held-out prompts. Empty: taken from the source (python_functions), or heldout_fraction of it.",
    )
    heldout_fraction: float = Field(
        0.02, ge=0.0, lt=1.0, description="Share of the source that is held out when `heldout` is empty."
    )
    block_size: int = Field(512, ge=1, le=100_000, description="Prompts in a block, the unit of work and of commit.")
    duplicates: Literal["keep", "drop", "fail"] = Field(
        "keep", description="What to do with a prompt that was there before, word for word. They are counted always."
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Longest prompt, in tokens of every pretrained model that is to answer it. Empty: each model's context "
        "less one token.",
    )
    over_long: Literal["fail", "drop", "truncate"] = Field(
        "fail", description="What to do with a longer one. truncate: shorten the end of its last message."
    )
