"""Where a phase's groups come from: references of the prompts, answers of the teacher, or pairs.

Blocks are opened as they are needed and only a few are held open, whatever the size of the data; how many groups each
holds is in the manifest.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from plad_dist.config import Model
from plad_dist.data.models import load_model_config, vocabulary_size
from plad_dist.data.prompts import train_prompts
from plad_dist.data.schemas import INITIAL_LOGPS, PAIRS, SAMPLES, is_answer
from plad_dist.data.storage import Storage
from plad_dist.data.store import Dataset, Part, part_name
from plad_dist.data.templates import Renderer
from plad_dist.errors import RunFailed, UserError
from plad_dist.training.batches.packing import Group

_OPEN_BLOCKS = 256
_TEXTS = ["chosen_text", "rejected_text"]  # of pairs, which are trained on by their tokens
Row = dict[str, Any]
NAN = float("nan")


@dataclass(frozen=True)
class DataSpec:
    """Names a phase's groups. Plain values: it travels to the workers.

    Attributes:
        kind: `references` of the training prompts, finished `teacher` samples, `pairs`, `lists` (all responses of a prompt,
            ranked by score), or the `chosen` side of pairs.
        path: of the dataset of pairs or samples; empty for references.
        context: most tokens of a sequence, a prompt with one response.
        longest: most tokens of a group as the model computes them, None for any.
        shares: responses share one pass over their prompt.
        over_long: what becomes of a longer one.
        end_ids: tokens that end a response.
        initial_logps: path of the dataset with log-likelihoods by the starting student; empty for none.
    """

    kind: Literal["references", "teacher", "pairs", "lists", "chosen"]
    path: str
    context: int
    longest: int | None = None
    shares: bool = True
    over_long: Literal["fail", "drop", "truncate", "keep"] = "fail"
    end_ids: tuple[int, ...] = ()
    initial_logps: str = ""

    @property
    def counted(self) -> str:
        """Name of the count in a part that says how many groups it holds."""
        return {"references": "references", "teacher": "finished"}.get(self.kind, "groups")

    def dataset(self, storage: Storage) -> Dataset:
        """The dataset whose parts count the groups."""
        match self.kind:
            case "references":
                return train_prompts(storage)
            case "teacher":
                return Dataset(storage, self.path, SAMPLES)
            case _:
                return Dataset(storage, self.path, PAIRS)


def group_counts(spec: DataSpec, parts: Sequence[Part]) -> list[int]:
    """Groups in every block."""
    return [part.counts.get(spec.counted, 0) for part in parts]


def open_groups(spec: DataSpec, storage: Storage, model: str, settings: Model) -> GroupSource:
    """The groups that a spec names, in the tokens of a model."""
    dataset = spec.dataset(storage)
    counts = group_counts(spec, dataset.require("run").parts)
    if spec.kind in ("references", "teacher"):
        make = _Tokenize(Renderer(model, settings), vocabulary_size(load_model_config(model, settings)))
        prompts = train_prompts(storage)
        if spec.kind == "references":
            return GroupSource(counts, lambda block, check: _Referenced(prompts.read_block(block, check)), make, spec)

        def answers(block: int, check: bool) -> _Block:
            return _Answered(prompts.read_block(block, check), dataset.read_block(block, check))

        return GroupSource(counts, answers, make, spec)
    initial_logps = Dataset(storage, spec.initial_logps, INITIAL_LOGPS) if spec.initial_logps else None

    def pairs(block: int, check: bool) -> _Block:
        known = initial_logps.read_block(block, check) if initial_logps else None
        return PairedRows(dataset.read_block(block, check), known, f"{dataset.path}/{part_name(block)}")

    makers: dict[str, Callable[[list[list[Row]]], list[Group]]] = {
        "pairs": make_pairs,
        "chosen": _chosen,
        "lists": partial(_lists, set(spec.end_ids)),
    }
    return GroupSource(counts, pairs, makers[spec.kind], spec)


class GroupSource:
    """A fixed, randomly accessible list of groups.

    Args:
        counts: groups in every block.
        open_block: gives the rows of the groups of a block, by their number in it; verifies its parts where it is told to.
        make: turns rows into groups.

    Attributes:
        changed: groups that were `dropped` or `cut` because they were too long.
    """

    def __init__(
        self,
        counts: Sequence[int],
        open_block: Callable[[int, bool], _Block],
        make: Callable[[list[list[Row]]], list[Group]],
        spec: DataSpec,
    ) -> None:
        self._ends = np.cumsum(np.asarray(counts, dtype=np.int64))
        self._open_block, self._make, self._spec = open_block, make, spec
        self._open: OrderedDict[int, _Block] = OrderedDict()
        self._verified: set[int] = set()
        self.changed: Counter[str] = Counter()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def take(self, indices: Sequence[int] | np.ndarray) -> list[Group]:
        """Groups by index, in this order. Over-long ones are refused, left out or cut, as the spec says.

        Raises :class:`UserError` naming a group that is refused.
        """
        kept = []
        for group in self._make([self._rows(int(index)) for index in indices]):
            fitted = fit(group, self._spec)
            self.changed["dropped"] += fitted is None
            self.changed["cut"] += fitted is not None and fitted is not group
            if fitted is not None:
                kept.append(fitted)
        return kept

    def longest(self, block: int, at_least: int, most: int) -> list[tuple[int, int]]:
        """(bytes of text, index) of the groups of a block with so many bytes, the longest ones. From any thread.

        Only where groups are texts.
        """
        opened = self._open_block(block, True)
        assert isinstance(opened, _Referenced | _Answered)
        sizes, first = opened.sizes(), int(self._ends[block - 1]) if block else 0
        places = np.flatnonzero(sizes >= at_least)
        kept = places[np.argsort(-sizes[places], kind="stable")[:most]]
        return [(int(sizes[place]), first + int(place)) for place in kept]

    def _rows(self, index: int) -> list[Row]:
        block = int(np.searchsorted(self._ends, index, side="right"))
        if block in self._open:
            self._open.move_to_end(block)
        else:
            self._open[block] = self._open_block(block, block not in self._verified)
            self._verified.add(block)
            if len(self._open) > _OPEN_BLOCKS:
                self._open.popitem(last=False)
        return self._open[block].rows(index - (int(self._ends[block - 1]) if block else 0))


def fit(group: Group, spec: DataSpec) -> Group | None:
    """A group within the bounds of a spec: as it is, None where it is to be dropped, or cut.

    Cut is the beginning of the prompt, and where a single token of it is left, the ends of the responses.
    """
    sequence = len(group.prompt) + max(map(len, group.responses))
    tokens = group.tokens if spec.shares else group.tokens_apart
    longest = spec.longest if spec.longest is not None else tokens
    if (sequence <= spec.context and tokens <= longest) or spec.over_long == "keep":
        return group
    if spec.over_long == "drop":
        return None
    if spec.over_long == "fail":
        raise UserError(too_long(group.name, sequence, spec.context, tokens, spec.longest))
    copies = 1 if spec.shares else len(group.responses)
    surplus = max(sequence - spec.context, -(-(tokens - longest) // copies))
    if surplus < len(group.prompt):
        return replace(group, prompt=group.prompt[surplus:])
    most = min((longest - copies) // len(group.responses) + 1, spec.context - 1)
    return replace(
        group, prompt=group.prompt[-1:], responses=[response[: max(1, most)] for response in group.responses]
    )


def too_long(name: str, sequence: int, context: int, tokens: int, longest: int | None) -> str:
    """What is wrong with a group over the bounds, and what to do."""
    if sequence > context:
        what = f"its prompt with a response has {sequence:,} tokens, the student's context holds {context:,}"
    else:
        what = f"its prompt and responses have {tokens:,} tokens, training.max_group_tokens is {longest:,}"
    return f"{name}: {what}. Set training.over_long to drop or truncate."


# -------------------------------------------------------------------------------------------------------------- blocks


class _Block(Protocol):
    """The rows of one block."""

    def rows(self, number: int) -> list[Row]:
        """Those of one group."""


class _Referenced:
    """Prompts that have a reference."""

    def __init__(self, prompts: pa.Table) -> None:
        self._prompts = prompts.select(["prompt_id", "messages", "reference"])
        self._places = np.flatnonzero(prompts["reference"].is_valid().to_numpy(zero_copy_only=False))

    def rows(self, number: int) -> list[Row]:
        rows: list[Row] = self._prompts.slice(int(self._places[number]), 1).to_pylist()
        return rows

    def sizes(self) -> np.ndarray:
        """Bytes of text of each group."""
        return (_bytes_of(self._prompts["messages"]) + _bytes(self._prompts["reference"]))[self._places]


class _Answered:
    """Answers among the samples, each with the messages that it answers."""

    def __init__(self, prompts: pa.Table, samples: pa.Table) -> None:
        self._messages = dict(zip(prompts["prompt_id"].to_pylist(), range(prompts.num_rows), strict=True))
        self._prompts, self._samples = prompts, samples.select(["prompt_id", "text"])
        rows = samples.select(["text", "finish_reason"]).to_pylist()
        self._places = np.array([place for place, row in enumerate(rows) if is_answer(row)], np.int64)

    def rows(self, number: int) -> list[Row]:
        sample = self._samples.slice(int(self._places[number]), 1).to_pylist()[0]
        messages = self._prompts["messages"][self._messages[sample["prompt_id"]]].as_py()
        return [{"prompt_id": sample["prompt_id"], "messages": messages, "reference": sample["text"]}]

    def sizes(self) -> np.ndarray:
        """Bytes of text of each group."""
        prompts = [self._messages[prompt_id] for prompt_id in self._samples["prompt_id"].to_pylist()]
        return (_bytes_of(self._prompts["messages"])[prompts] + _bytes(self._samples["text"]))[self._places]


def _bytes_of(messages: pa.ChunkedArray) -> np.ndarray:
    """Bytes of text in all messages of each row."""
    column = messages.combine_chunks()
    sizes = _bytes(column.flatten().field("content"))
    return np.bincount(pc.list_parent_indices(column).to_numpy(), sizes, len(column)).astype(np.int64)


def _bytes(texts: pa.Array | pa.ChunkedArray) -> np.ndarray:
    sizes: np.ndarray = pc.fill_null(pc.binary_length(texts), 0).to_numpy()
    return sizes


class PairedRows:
    """Pairs, those of one prompt together."""

    def __init__(self, pairs: pa.Table, initial_logps: pa.Table | None, name: str) -> None:
        if initial_logps is not None:
            if not initial_logps["prompt_id"].equals(pairs["prompt_id"]):
                raise RunFailed(f"{name}: its initial log-likelihoods belong to other rows; delete initial-logps-*")
            for column in ("chosen_initial_logp", "rejected_initial_logp"):
                pairs = pairs.append_column(column, initial_logps[column])
        self._pairs, self._name = pairs.drop_columns(_TEXTS), name
        ids = np.asarray(pairs["prompt_id"].to_pylist(), dtype=object)
        self.starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1])) if len(ids) else np.empty(0, np.int64)
        self._ends = np.append(self.starts[1:], len(ids))

    def rows(self, number: int) -> list[Row]:
        start, end = int(self.starts[number]), int(self._ends[number])
        rows: list[Row] = self._pairs.slice(start, end - start).to_pylist()
        for place, row in enumerate(rows):
            row["name"] = f"{self._name}: row {start + place} (counted from 0), prompt {row['prompt_id']}"
        return rows


# -------------------------------------------------------------------------------------------------------------- groups


class _Tokenize:
    """Prompts with one response, tokenized when they are taken."""

    def __init__(self, renderer: Renderer, vocabulary: int) -> None:
        self._renderer, self._vocabulary = renderer, vocabulary

    def __call__(self, rows: list[list[Row]]) -> list[Group]:
        flat = [row for (row,) in rows]
        prompts = self._renderer.prompt_ids([row["messages"] for row in flat])
        responses = self._renderer.response_ids([row["reference"] for row in flat])
        for row, prompt, response in zip(flat, prompts, responses, strict=True):
            if not prompt:
                raise UserError(
                    f"prompt {row['prompt_id']}: renders to no token, so that nothing would predict its response's first. "
                    "Leave it out, or set a template that always gives a token."
                )
            if (token := max(*prompt, *response)) >= self._vocabulary:
                raise UserError(
                    f"prompt {row['prompt_id']}: its tokenizer gives token {token}, the vocabulary of {self._renderer.model} has "
                    f"{self._vocabulary:,}: it is the tokenizer of another model"
                )
        return [
            Group(prompt, [response], name=f"prompt {row['prompt_id']}")
            for row, prompt, response in zip(flat, prompts, responses, strict=True)
        ]


def make_pairs(rows: list[list[Row]]) -> list[Group]:
    return [_responses(group) for group in rows]


def _chosen(rows: list[list[Row]]) -> list[Group]:
    """The chosen responses alone."""
    found = []
    for pairs in rows:
        group = _responses(pairs)
        kept = [group.responses[place] for place in group.anchored]
        found.append(Group(group.prompt, kept, anchored=range(len(kept)), name=group.name))
    return found


def _lists(end_ids: set[int], rows: list[list[Row]]) -> list[Group]:
    """All responses of a prompt, the one with the best score first, compared each with each.

    Responses that were cut at the token limit come after all that ended, and are never raised by the anchor. Of equal responses
    the first is kept, and between those of equal score nothing is wanted.
    """
    found = []
    for pairs in rows:
        group = _responses(pairs)
        ended = [response[-1] in end_ids for response in group.responses]
        worth = [(not end, -score) for end, score in zip(ended, group.scores, strict=True)]
        kept = {tuple(group.responses[place]): place for place in reversed(range(len(worth)))}.values()
        order = sorted(kept, key=lambda place: (worth[place], place))
        ranked: dict[str, Any] = {
            name: [getattr(group, name)[place] for place in order]
            for name in ("responses", "scores", "initial_logps", "sampled")
            if getattr(group, name)
        }
        rank = {value: number for number, value in enumerate(sorted({worth[place] for place in order}))}
        ranks = [
            (better, worse, rank[worth[order[worse]]] - rank[worth[order[better]]])
            for better, worse in combinations(range(len(order)), 2)
            if worth[order[better]] != worth[order[worse]]
        ]
        found.append(replace(group, pairs=ranks, anchored=(0,) if ended[order[0]] else (), **ranked))
    return found


def _responses(pairs: list[Row]) -> Group:
    """A prompt's pairs as a group: every response once, the chosen ones first."""
    places: dict[tuple[str, tuple[int, ...]], int] = {}
    figures: list[tuple[float, float, float]] = []
    for side in ("chosen", "rejected"):
        for row in pairs:
            key = side, tuple(row[f"{side}_token_ids"])
            if key not in places:
                places[key] = len(places)
                logprob = row.get("rejected_logprob") if side == "rejected" else None
                figures.append(
                    (_number(row[f"{side}_score"]), _number(row.get(f"{side}_initial_logp")), _number(logprob))
                )
    compared = [
        (places["chosen", tuple(row["chosen_token_ids"])], places["rejected", tuple(row["rejected_token_ids"])], 1)
        for row in pairs
    ]
    scores, initial_logps, sampled = zip(*figures, strict=True)
    return Group(
        prompt=pairs[0]["prompt_token_ids"],
        responses=[list(tokens) for _, tokens in places],
        pairs=compared,
        anchored=sorted({chosen for chosen, _, _ in compared}),
        scores=scores,
        initial_logps=initial_logps,
        sampled=sampled,
        name=pairs[0]["name"],
        prompt_id=pairs[0]["prompt_id"],
    )


def _number(value: float | None) -> float:
    return NAN if value is None else value
