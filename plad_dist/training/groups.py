"""Where a phase's groups come from: references of the prompts, or pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from plad_dist.config import Model
from plad_dist.data.prompts import train_prompts
from plad_dist.data.schemas import PAIRS, SAMPLES
from plad_dist.data.storage import Storage
from plad_dist.data.store import Dataset
from plad_dist.data.templates import Renderer
from plad_dist.errors import UserError
from plad_dist.training.batching import Group


class GroupSource(Protocol):
    """A fixed, randomly accessible list of groups."""

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int] | np.ndarray) -> list[Group]: ...


@dataclass(frozen=True)
class DataSpec:
    """Names a phase's groups. Plain values: it travels to the workers.

    Attributes:
        kind: `references` of the training prompts, finished `teacher` samples, `pairs`, or the `chosen` side of pairs.
        path: of the dataset of pairs or samples; empty for references.
        max_length: longest prompt plus response in tokens; longer references are cut, without an end-of-sequence.
    """

    kind: Literal["references", "teacher", "pairs", "chosen"]
    path: str
    max_length: int


def open_groups(spec: DataSpec, storage: Storage, model: str, settings: Model) -> GroupSource:
    """The groups that a spec names, in the tokens of a model."""
    if spec.kind in ("references", "teacher"):
        prompts = train_prompts(storage).read()
        if spec.kind == "teacher":
            prompts = with_responses(prompts, Dataset(storage, spec.path, SAMPLES).read())
        return ReferenceGroups(prompts, Renderer(model, settings), spec.max_length)
    return PairGroups(Dataset(storage, spec.path, PAIRS).read(), with_rejected=spec.kind == "pairs")


def with_responses(prompts: pa.Table, samples: pa.Table) -> pa.Table:
    """The prompts of all finished samples, once per sample, with the sample's text in the place of the reference."""
    finished = samples.filter(pc.equal(samples["finish_reason"], "stop")).select(["prompt_id", "text"])
    rows = pc.index_in(finished["prompt_id"], value_set=prompts["prompt_id"].combine_chunks())
    table = prompts.take(rows)
    return table.set_column(table.schema.get_field_index("reference"), "reference", finished["text"])


class ReferenceGroups:
    """Prompts with their references as the only response, tokenized when taken."""

    def __init__(self, prompts: pa.Table, renderer: Renderer, max_length: int) -> None:
        references = prompts["reference"]
        self._rows = np.flatnonzero(references.is_valid().to_numpy(zero_copy_only=False))
        if not len(self._rows):
            raise UserError("no prompt has a reference, so there is nothing to learn from; set reference_column")
        self._prompts = _Rows(prompts, ["messages", "reference"])
        self._renderer, self._max_length = renderer, max_length

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, indices: Sequence[int] | np.ndarray) -> list[Group]:
        rows = self._prompts.take(self._rows[np.asarray(indices)])
        prompts = self._renderer.prompt_ids([row["messages"] for row in rows])
        responses = self._renderer.response_ids([row["reference"] for row in rows])
        room = self._max_length
        return [
            Group(prompt[: room - 1], [response[: room - min(len(prompt), room - 1)]])
            for prompt, response in zip(prompts, responses, strict=True)
        ]


class PairGroups:
    """Pairs: the chosen response first, then, where it is wanted, the rejected one."""

    def __init__(self, pairs: pa.Table, *, with_rejected: bool) -> None:
        self._responses = ["chosen_token_ids", "rejected_token_ids"][: 2 if with_rejected else 1]
        self._pairs = _Rows(pairs, ["prompt_token_ids", *self._responses])

    def __len__(self) -> int:
        return len(self._pairs)

    def take(self, indices: Sequence[int] | np.ndarray) -> list[Group]:
        rows = self._pairs.take(np.asarray(indices))
        return [Group(row["prompt_token_ids"], [row[name] for name in self._responses]) for row in rows]


class _Rows:
    """Rows of a memory-mapped table by index, without copying its parts together."""

    def __init__(self, table: pa.Table, columns: list[str]) -> None:
        self._batches = table.select(columns).to_batches()
        self._ends = np.cumsum([len(batch) for batch in self._batches])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def take(self, indices: np.ndarray) -> list[dict[str, Any]]:
        rows = []
        for index in indices.tolist():
            number = int(np.searchsorted(self._ends, index, side="right"))
            batch = self._batches[number]
            rows += batch.slice(index - int(self._ends[number]) + len(batch), 1).to_pylist()
        return rows
