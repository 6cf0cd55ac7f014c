"""Rows of the groups of one block: references, teacher responses or pairs.

Every class takes the tables of a block and returns the rows of a group by the number of the group
in the block.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from plad_dist.data.conversation import COLUMNS
from plad_dist.data.schemas import is_usable_response
from plad_dist.data.teacher_texts import TeacherForms, outside_text
from plad_dist.errors import RunFailed

Row = dict[str, Any]
_TEXT_COLUMNS = ["chosen_text", "rejected_text"]  # of pairs, whose tokens are used instead


class GroupRows(Protocol):
    """Rows of the groups of one block."""

    def rows(self, number: int) -> list[Row]:
        """Return the rows of one group."""


class ReferenceRows:
    """Prompts with their references. Every prompt that has a reference is a group."""

    def __init__(self, prompts: pa.Table) -> None:
        self._prompts = prompts.select(["prompt_id", "reference", *COLUMNS])
        self._row_indices = np.flatnonzero(prompts["reference"].is_valid().to_numpy(zero_copy_only=False))

    def rows(self, number: int) -> list[Row]:
        rows: list[Row] = self._prompts.slice(int(self._row_indices[number]), 1).to_pylist()
        return rows

    def sizes(self) -> NDArray[np.int64]:
        """Return the bytes of text of each group."""
        sizes = _prompt_bytes(self._prompts) + _text_bytes(self._prompts["reference"])
        return sizes[self._row_indices]


class ResponseRows:
    """Teacher responses with the prompts that they belong to. Every finished response is a group.

    Responses have the form of references: their text is in the column `reference`.

    Args:
        forms: how responses of each teacher become responses of the student.
    """

    def __init__(self, prompts: pa.Table, samples: pa.Table, forms: TeacherForms) -> None:
        self._prompts, self._forms = prompts.select([*COLUMNS, "teacher"]), forms
        self._samples = samples.select(["prompt_id", "text", "reasoning", "token_ids"])
        self._prompt_rows = {prompt_id: row for row, prompt_id in enumerate(prompts["prompt_id"].to_pylist())}
        rows = samples.select(["text", "finish_reason"]).to_pylist()
        self._row_indices = np.array([index for index, row in enumerate(rows) if is_usable_response(row)], np.int64)

    def rows(self, number: int) -> list[Row]:
        sample = self._samples.slice(int(self._row_indices[number]), 1).to_pylist()[0]
        prompt = self._prompts.slice(self._prompt_rows[sample["prompt_id"]], 1).to_pylist()[0]
        teacher = prompt["teacher"] or "teacher"
        response = outside_text(teacher, sample["text"], sample["reasoning"], sample["token_ids"], self._forms)
        return [prompt | {"prompt_id": sample["prompt_id"], "reference": sample["text"], "response": response}]

    def sizes(self) -> NDArray[np.int64]:
        """Return the bytes of text of each group."""
        prompt_rows = [self._prompt_rows[prompt_id] for prompt_id in self._samples["prompt_id"].to_pylist()]
        sizes = _prompt_bytes(self._prompts)[prompt_rows] + _text_bytes(self._samples["text"])
        if self._forms.keep_thought:
            sizes = sizes + _text_bytes(self._samples["reasoning"])
        return sizes[self._row_indices]


def _prompt_bytes(prompts: pa.Table) -> NDArray[np.int64]:
    """Return the bytes of each prompt: of its texts or its whole conversation, and its tools."""
    column = prompts["messages"].combine_chunks()
    texts = _text_bytes(column.flatten().field("content"))
    sizes = np.bincount(pc.list_parent_indices(column).to_numpy(), texts, len(column)).astype(np.int64)
    return np.maximum(sizes, _text_bytes(prompts["conversation"])) + _text_bytes(prompts["tools"])


def _text_bytes(texts: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    sizes: NDArray[np.int64] = pc.fill_null(pc.binary_length(texts), 0).to_numpy()
    return sizes


class PairRows:
    """Pairs, in which consecutive rows of one prompt are a group.

    Args:
        initial_logps: log-likelihoods under the starting student, row for row, or None.
        name: path of the part, for messages.

    Attributes:
        starts: index of the first row of each group.
    """

    def __init__(self, pairs: pa.Table, initial_logps: pa.Table | None, name: str) -> None:
        if initial_logps is not None:
            if not initial_logps["prompt_id"].equals(pairs["prompt_id"]):
                raise RunFailed(
                    f"{name}: the initial log-probabilities belong to other rows; delete initial-logps-* beside it"
                )
            for column in ("chosen_initial_logp", "rejected_initial_logp"):
                pairs = pairs.append_column(column, initial_logps[column])
        self._pairs, self._name = pairs.drop_columns(_TEXT_COLUMNS), name
        self.starts = group_starts(pairs)
        self._ends = np.append(self.starts[1:], pairs.num_rows)

    def rows(self, number: int) -> list[Row]:
        start, end = int(self.starts[number]), int(self._ends[number])
        rows: list[Row] = self._pairs.slice(start, end - start).to_pylist()
        for index, row in enumerate(rows, start=start):
            row["name"] = f"{self._name}: row {index} (counted from 0), prompt {row['prompt_id']}"
        return rows


def group_starts(pairs: pa.Table) -> NDArray[np.int64]:
    """Return the index of the first row of each group: of each run of rows with one prompt."""
    prompt_ids = np.asarray(pairs["prompt_id"].to_pylist(), dtype=object)
    if not len(prompt_ids):
        return np.empty(0, np.int64)
    return np.flatnonzero(np.append(True, prompt_ids[1:] != prompt_ids[:-1]))
