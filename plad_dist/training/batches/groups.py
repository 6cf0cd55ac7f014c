"""Groups of a phase: the references of the prompts, teacher responses, or pairs.

Blocks are opened on demand, and only the most recent ones stay open, so memory does not grow with
the data. The manifest lists the number of groups in each block.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from plad_dist.config import Model
from plad_dist.data.dataset import Dataset
from plad_dist.data.models import load_model_config, vocabulary_size
from plad_dist.data.parts import Part, part_name
from plad_dist.data.prompts import train_prompts
from plad_dist.data.schemas import INITIAL_LOGPS, PAIRS, SAMPLES
from plad_dist.data.storage import Storage
from plad_dist.data.teacher_texts import TeacherForms
from plad_dist.data.templates import Renderer
from plad_dist.errors import UserError
from plad_dist.training.batches.blocks import GroupRows, PairRows, ReferenceRows, ResponseRows, Row
from plad_dist.training.batches.building import TextGroupBuilder, chosen_groups, list_groups, pair_groups
from plad_dist.training.batches.micro_batch import Group, Layout

GroupKind = Literal["references", "teacher", "pairs", "lists", "chosen"]
_OPEN_BLOCKS = 256  # the most blocks that stay open
_OpenBlock = Callable[[int, bool], GroupRows]
_BuildGroups = Callable[[list[list[Row]]], Sequence[Group | None]]


@dataclass(frozen=True)
class DataSpec:
    """Groups of a phase, described by plain values because the description travels to the workers.

    Attributes:
        kind: `references` of the training prompts, finished responses of the `teacher`, `pairs`,
            `lists` (all responses of a prompt, ranked by score), or the `chosen` responses of
            pairs.
        path: dataset of the pairs or samples; empty for references.
        context: most tokens of a sequence, which is a prompt with one response.
        max_group_tokens: most tokens that the model may compute for a group, padding included.
            None for no limit.
        layout: layout that counts the tokens of a group; it says nothing of the rows of a
            micro-batch.
        over_long: treatment of a group beyond `context` or `max_group_tokens`.
        end_ids: tokens that end a response; only `lists` use them.
        forms: how responses of each `teacher` become responses of the model that is trained.
        initial_logps: dataset with log-likelihoods under the starting student; empty if the loss
            needs none.
    """

    kind: GroupKind
    path: str
    context: int
    max_group_tokens: int | None = None
    layout: Layout = field(default_factory=Layout)
    over_long: Literal["fail", "drop", "truncate", "keep"] = "fail"
    end_ids: tuple[int, ...] = ()
    forms: TeacherForms = field(default_factory=TeacherForms)
    initial_logps: str = ""

    @property
    def groups_count(self) -> str:
        """Name of the count in a part that is its number of groups."""
        return {"references": "references", "teacher": "finished"}.get(self.kind, "groups")

    def dataset(self, storage: Storage) -> Dataset:
        """Return the dataset whose parts count the groups."""
        match self.kind:
            case "references":
                return train_prompts(storage)
            case "teacher":
                return Dataset(storage, self.path, SAMPLES)
            case _:
                return Dataset(storage, self.path, PAIRS)

    @property
    def limit_identity(self) -> Any:
        """Value for fingerprints of `max_group_tokens`, which counts padding without sharing."""
        limit = self.max_group_tokens
        return limit if limit is None or self.layout.shares_prompts else [limit, "padded"]


def group_counts(spec: DataSpec, parts: Sequence[Part]) -> list[int]:
    """Return the number of groups in every block."""
    return [part.counts.get(spec.groups_count, 0) for part in parts]


def open_groups(spec: DataSpec, storage: Storage, model: str, settings: Model) -> GroupSource:
    """Open the groups of a phase, in the tokens of a model."""
    counts = group_counts(spec, spec.dataset(storage).require("run").parts)
    if spec.kind in ("references", "teacher"):
        vocabulary = vocabulary_size(load_model_config(model, settings))
        return GroupSource(
            counts, _open_texts(spec, storage), TextGroupBuilder(Renderer(model, settings), vocabulary), spec
        )
    build: _BuildGroups
    match spec.kind:
        case "pairs":
            build = pair_groups
        case "chosen":
            build = chosen_groups
        case "lists":
            build = partial(list_groups, set(spec.end_ids))
    return GroupSource(counts, _open_pairs(spec, storage), build, spec)


def _open_texts(spec: DataSpec, storage: Storage) -> _OpenBlock:
    prompts = train_prompts(storage)
    if spec.kind == "references":
        return lambda block, verify: ReferenceRows(prompts.read_block(block, verify))
    samples = spec.dataset(storage)
    return lambda block, verify: ResponseRows(
        prompts.read_block(block, verify), samples.read_block(block, verify), spec.forms
    )


def _open_pairs(spec: DataSpec, storage: Storage) -> _OpenBlock:
    pairs = spec.dataset(storage)
    initial_logps = Dataset(storage, spec.initial_logps, INITIAL_LOGPS) if spec.initial_logps else None

    def open_block(block: int, verify: bool) -> GroupRows:
        logps = initial_logps.read_block(block, verify) if initial_logps else None
        return PairRows(pairs.read_block(block, verify), logps, f"{pairs.path}/{part_name(block)}")

    return open_block


class GroupSource:
    """A fixed list of groups with random access.

    Args:
        counts: number of groups in every block.
        open_block: opens a block by its number, and verifies the checksums of its parts if the
            second argument is True.
        build: builds groups from their rows.

    Attributes:
        changed: how many over-long groups were `dropped` and how many were `cut`; and how many
            texts had a `control_token` and were left out.
    """

    def __init__(self, counts: Sequence[int], open_block: _OpenBlock, build: _BuildGroups, spec: DataSpec) -> None:
        self._ends = np.cumsum(np.asarray(counts, dtype=np.int64))
        self._open_block, self._build, self._spec = open_block, build, spec
        self._open: OrderedDict[int, GroupRows] = OrderedDict()
        self._verified: set[int] = set()
        self.changed: Counter[str] = Counter()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def take(self, indices: Sequence[int] | NDArray[np.integer]) -> list[Group]:
        """Return groups by index, in the order of the indices.

        Over-long groups are refused, dropped or cut as the spec demands.

        Raises:
            UserError: a group is refused; the message names it.
        """
        groups = []
        for group in self._build([self._rows(int(index)) for index in indices]):
            if group is None:
                self.changed["control_token"] += 1
                continue
            fitted = fit(group, self._spec)
            self.changed["dropped"] += fitted is None
            self.changed["cut"] += fitted is not None and fitted is not group
            if fitted is not None:
                groups.append(fitted)
        return groups

    def longest(self, block: int, at_least: int, limit: int) -> list[tuple[int, int]]:
        """Return (bytes of text, index) of the longest groups of a block, the longest first.

        Only for groups of texts. Safe to call from several threads.

        Args:
            at_least: groups with fewer bytes of text are left out.
            limit: the most groups to return.
        """
        rows = self._open_block(block, True)
        assert isinstance(rows, ReferenceRows | ResponseRows)
        sizes, first = rows.sizes(), self._first_of(block)
        numbers = np.flatnonzero(sizes >= at_least)
        longest = numbers[np.argsort(-sizes[numbers], kind="stable")[:limit]]
        return [(int(sizes[number]), first + int(number)) for number in longest]

    def _rows(self, index: int) -> list[Row]:
        block = int(np.searchsorted(self._ends, index, side="right"))
        if block in self._open:
            self._open.move_to_end(block)
        else:
            self._open[block] = self._open_block(block, block not in self._verified)
            self._verified.add(block)
            if len(self._open) > _OPEN_BLOCKS:
                self._open.popitem(last=False)
        return self._open[block].rows(index - self._first_of(block))

    def _first_of(self, block: int) -> int:
        """Return the index of a block's first group."""
        return int(self._ends[block - 1]) if block else 0


def fit(group: Group, spec: DataSpec) -> Group | None:
    """Return a group within the bounds of a spec: unchanged, cut, or None if it is to be dropped.

    The beginning of the prompt is cut first. If the group is too long even with a prompt of one
    token, the ends of the responses are cut too.

    Raises:
        UserError: the group is too long, and the spec demands failure.
    """
    sequence = len(group.prompt) + max(map(len, group.responses))
    tokens = spec.layout.places(group)
    limit = spec.max_group_tokens if spec.max_group_tokens is not None else tokens
    if (sequence <= spec.context and tokens <= limit) or spec.over_long == "keep":
        return group
    if spec.over_long == "drop":
        return None
    if spec.over_long == "fail":
        raise UserError(_over_long_message(group, sequence, spec))
    copies = 1 if spec.layout.shares_prompts else len(group.responses)  # of the prompt
    surplus = max(sequence - spec.context, -(-(tokens - limit) // copies))
    if surplus < len(group.prompt):
        return replace(group, prompt=group.prompt[surplus:])
    computed = (limit - copies) // len(group.responses)  # tokens of each response
    # Without an encoder, the last token of a response is predicted but not computed.
    response_tokens = max(1, min(computed + (spec.layout.decoder_start is None), spec.context - 1))
    return replace(
        group, prompt=group.prompt[-1:], responses=[response[:response_tokens] for response in group.responses]
    )


def _over_long_message(group: Group, sequence: int, spec: DataSpec) -> str:
    if sequence > spec.context:
        problem = (
            f"the prompt with a response has {sequence:,} tokens, but the student's context holds {spec.context:,}"
        )
    else:
        problem = f"{spec.layout.size_text(group)}, but training.max_group_tokens is {spec.max_group_tokens:,}"
    return f"{group.name}: {problem}; set training.over_long to drop or truncate"
