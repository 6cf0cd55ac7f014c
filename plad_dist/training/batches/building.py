"""Groups from rows: tokenized texts, the pairs of a prompt, or lists of ranked responses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from plad_dist.data.conversation import Conversation
from plad_dist.data.teacher_texts import OutsideText, learn
from plad_dist.data.templates import Renderer
from plad_dist.errors import UserError
from plad_dist.training.batches.blocks import Row
from plad_dist.training.batches.micro_batch import Group


class TextGroupBuilder:
    """Builder of groups with one response, which tokenizes the texts of prompt and response.

    A response with a control token of the model is no group, but None.

    Args:
        vocabulary: number of tokens that the model has embeddings for.
    """

    def __init__(self, renderer: Renderer, vocabulary: int) -> None:
        self._renderer, self._vocabulary = renderer, vocabulary

    def __call__(self, rows_of_groups: list[list[Row]]) -> list[Group | None]:
        rows = [row for (row,) in rows_of_groups]
        prompts = self._renderer.prompt_ids([Conversation.from_row(row) for row in rows])
        texts = [row.get("response") or OutsideText(row["reference"]) for row in rows]
        groups: list[Group | None] = []
        for row, prompt, text in zip(rows, prompts, learn(texts, self._renderer), strict=True):
            if text is None:
                groups.append(None)
                continue
            name, response = f"prompt {row['prompt_id']}", [*text.ids, self._renderer.end_id]
            self._check(name, prompt, response)
            groups.append(Group(prompt, [response], name=name))
        return groups

    def _check(self, name: str, prompt: Sequence[int], response: Sequence[int]) -> None:
        if not prompt:
            raise UserError(
                f"{name}: renders to no tokens, so the first token of its response cannot be predicted; "
                "remove the prompt, or set a template that always renders to at least one token"
            )
        if (token := max(*prompt, *response)) >= self._vocabulary:
            raise UserError(
                f"{name}: the tokenizer of {self._renderer.model} returns token {token}, but the model has embeddings "
                f"for {self._vocabulary:,} tokens; use the tokenizer of this model"
            )


def pair_groups(rows_of_groups: list[list[Row]]) -> list[Group]:
    """Return one group for the pairs of each prompt."""
    return [_group(pairs) for pairs in rows_of_groups]


def chosen_groups(rows_of_groups: list[list[Row]]) -> list[Group]:
    """Return groups of the chosen responses only, without comparisons."""
    groups = []
    for group in pair_groups(rows_of_groups):
        chosen = [group.responses[index] for index in group.anchored]
        groups.append(Group(group.prompt, chosen, anchored=range(len(chosen)), name=group.name))
    return groups


def list_groups(end_ids: set[int], rows_of_groups: list[list[Row]]) -> list[Group]:
    """Return groups whose responses are ranked by score, the best first.

    Every response is compared with every other. Responses that were cut at the token limit rank
    behind all finished ones, and the anchor never raises them. Responses of equal score are not
    compared. Of identical responses, only the first is kept.

    Args:
        end_ids: tokens that end a finished response.
    """
    return [_ranked(group, end_ids) for group in pair_groups(rows_of_groups)]


def _ranked(group: Group, end_ids: set[int]) -> Group:
    is_finished = [response[-1] in end_ids for response in group.responses]
    # Smaller is better.
    sort_keys = [(not finished, -score) for finished, score in zip(is_finished, group.scores, strict=True)]
    first_of_equal = {tuple(group.responses[index]): index for index in reversed(range(len(sort_keys)))}
    order = sorted(first_of_equal.values(), key=lambda index: (sort_keys[index], index))
    reordered: dict[str, Any] = {
        name: [getattr(group, name)[index] for index in order]
        for name in ("responses", "scores", "initial_logps", "sampled_logps")
        if getattr(group, name)
    }
    rank_of_key = {key: rank for rank, key in enumerate(sorted({sort_keys[index] for index in order}))}
    ranks = [rank_of_key[sort_keys[index]] for index in order]
    pairs = [
        (better, worse, ranks[worse] - ranks[better])
        for better, worse in combinations(range(len(order)), 2)
        if ranks[worse] != ranks[better]
    ]
    return replace(group, pairs=pairs, anchored=(0,) if is_finished[order[0]] else (), **reordered)


def _group(pairs: list[Row]) -> Group:
    """Return the pairs of a prompt as a group with every response once, the chosen ones first."""
    indices: dict[tuple[str, tuple[int, ...]], int] = {}  # of responses, by side and tokens
    scores: list[float] = []
    initial_logps: list[float] = []
    sampled_logps: list[float] = []
    for side in ("chosen", "rejected"):
        for row in pairs:
            key = side, tuple(row[f"{side}_token_ids"])
            if key in indices:
                continue
            indices[key] = len(indices)
            scores.append(_number(row[f"{side}_score"]))
            initial_logps.append(_number(row.get(f"{side}_initial_logp")))
            # Pairs have the engine's log-likelihood of rejected responses only.
            sampled_logps.append(_number(row.get("rejected_logprob") if side == "rejected" else None))
    compared = [
        (indices["chosen", tuple(row["chosen_token_ids"])], indices["rejected", tuple(row["rejected_token_ids"])], 1)
        for row in pairs
    ]
    return Group(
        prompt=pairs[0]["prompt_token_ids"],
        responses=[list(tokens) for _, tokens in indices],
        pairs=compared,
        anchored=sorted({chosen for chosen, _, _ in compared}),
        scores=scores,
        initial_logps=initial_logps,
        sampled_logps=sampled_logps,
        name=pairs[0]["name"],
        prompt_id=pairs[0]["prompt_id"],
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
