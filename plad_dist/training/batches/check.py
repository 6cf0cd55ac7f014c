"""Whether pairs and texts can be trained on, before the first step: one pass over their columns, a block at a time."""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from plad_dist.config import Loss, Model
from plad_dist.data.models import load_model_config, vocabulary_size
from plad_dist.data.storage import Storage
from plad_dist.data.store import Dataset, part_name
from plad_dist.errors import UserError
from plad_dist.training.batches.groups import DataSpec, PairedRows, fit, group_counts, make_pairs, open_groups

logger = logging.getLogger("plad")

_READERS = 4
_TEXTS = 1000  # that are tokenized, those with the most bytes
_passed: set[tuple[object, ...]] = set()  # phases on the same data need one look
_SIDES = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")


@dataclass
class _Found:
    """What a block holds: tokens of its longest group as it is trained on, and what is wrong, with the row."""

    longest: int = 0
    longest_row: str = ""
    problem: str = ""


def check_pairs(
    spec: DataSpec, storage: Storage, model: str, settings: Model, loss: Loss, micro_batch_tokens: int
) -> None:
    """CheckpointProbe through all pairs of a phase.

    Raises:
        UserError: an empty response, a token that is not in the student's vocabulary, missing or non-finite scores where the
            loss needs them, or a group that no micro-batch holds. Part and row are named.
    """
    dataset = spec.dataset(storage)
    manifest = dataset.require("pair")
    parts = manifest.parts
    bounds = (spec.context, spec.longest, spec.shares, spec.over_long, micro_batch_tokens)  # not the kind of data
    checked = ("pairs", dataset.path, manifest.contents, bounds, loss.needs_scores, model)
    if checked in _passed:
        return
    vocabulary = vocabulary_size(load_model_config(model, settings))
    threads = ThreadPoolExecutor(_READERS)
    try:
        blocks = threads.map(
            lambda block: _check(dataset, spec, block, vocabulary, loss, model, micro_batch_tokens), range(len(parts))
        )
        for found in blocks:
            if found.problem:
                raise UserError(found.problem)
            if found.longest > micro_batch_tokens:
                raise UserError(
                    f"{found.longest_row}: its group has {found.longest:,} tokens, more than "
                    f"training.micro_batch_tokens={micro_batch_tokens:,} holds. Raise it, or set training.max_group_tokens and "
                    "training.over_long."
                )
    finally:
        threads.shutdown(cancel_futures=True)
    _passed.add(checked)


def check_texts(spec: DataSpec, storage: Storage, model: str, settings: Model, micro_batch_tokens: int) -> None:
    """CheckpointProbe for a prompt with a response, among the longest texts of a phase, that no micro-batch holds.

    No token of a text is shorter than a byte, and a template is taken to add no more than half of what a micro-batch holds: only
    texts with as many bytes as the other half are tokenized, and of these the longest. What is missed is refused when it comes.

    Raises:
        UserError: there is one. It is named.
    """
    if min(spec.context, spec.longest or spec.context) <= micro_batch_tokens:
        return
    dataset, groups = spec.dataset(storage), open_groups(spec, storage, model, settings)
    manifest = dataset.require("run")
    checked = ("texts", dataset.path, manifest.contents, spec, micro_batch_tokens, model)
    if checked in _passed:
        return
    logger.info("%s: looking for texts that no micro-batch holds", dataset.path)
    blocks = [block for block, count in enumerate(group_counts(spec, manifest.parts)) if count]
    look = partial(groups.longest, at_least=micro_batch_tokens // 2, most=_TEXTS)
    threads = ThreadPoolExecutor(_READERS)
    try:
        longest = heapq.nlargest(_TEXTS, chain.from_iterable(threads.map(look, blocks)))
    finally:
        threads.shutdown(cancel_futures=True)
    for group in groups.take(sorted(index for _, index in longest)):
        if group.tokens > micro_batch_tokens:
            raise UserError(
                f"{group.name}: with its response it has {group.tokens:,} tokens, more than "
                f"training.micro_batch_tokens={micro_batch_tokens:,} holds. Raise it, or set training.max_group_tokens to no more "
                "than that: training.over_long says what becomes of longer ones."
            )
    _passed.add(checked)


def _check(
    dataset: Dataset, spec: DataSpec, block: int, vocabulary: int, loss: Loss, model: str, micro_batch_tokens: int
) -> _Found:
    table, found = dataset.read_block(block), _Found()
    where = f"{dataset.path}/{part_name(block)}"
    for row, problem in _problems(table, vocabulary, loss, model):
        found.problem = f"{where}: row {row} (counted from 0), prompt {table['prompt_id'][row]}: {problem}"
        return found
    if not table.num_rows:
        return found
    bound, sequence, starts = _group_tokens(table, spec)
    limit = min(spec.longest or micro_batch_tokens, micro_batch_tokens)
    rows = PairedRows(table, None, where)
    for number in np.flatnonzero((bound > limit) | (sequence > spec.context)):  # exactly, where it may matter
        (group,) = make_pairs([rows.rows(int(number))])
        try:
            fitted = fit(group, spec)
        except UserError as error:
            found.problem = str(error)
            return found
        tokens = 0 if fitted is None else fitted.tokens if spec.shares else fitted.tokens_apart
        if tokens > found.longest:
            found.longest, found.longest_row = tokens, f"{where}: row {int(starts[number])} (counted from 0)"
    return found


def _problems(table: pa.Table, vocabulary: int, loss: Loss, model: str) -> Iterator[tuple[int, str]]:
    """(row, what is wrong) of the first row with each kind of problem."""
    for side in _SIDES:
        empty = np.flatnonzero(_lengths(table, side) == 0)
        if len(empty):
            yield int(empty[0]), f"{side} is empty: there is nothing to predict. Pair again with pairing.empty: drop."
        column = table[side].combine_chunks()
        outside = pc.or_(pc.less(column.values, 0), pc.greater_equal(column.values, vocabulary))
        if pc.any(outside).as_py():
            place = int(np.flatnonzero(outside.to_numpy(zero_copy_only=False))[0])
            row = int(pc.list_parent_indices(column)[place].as_py())
            yield (
                row,
                (
                    f"{side} holds token {column.values[place]}, the vocabulary of {model} has {vocabulary:,}: these pairs were "
                    "made with the tokenizer of another model. Pair again for this student."
                ),
            )
    if loss.needs_scores:
        for side in ("chosen_score", "rejected_score"):
            scores = table[side].to_pylist()
            for row, score in enumerate(scores):
                if score is None or not math.isfinite(score):
                    yield (
                        row,
                        f"{side} is {score}: the loss {loss.name} needs a finite score. Set pairing.score, or min_score_gap.",
                    )


def _group_tokens(table: pa.Table, spec: DataSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every group: its tokens, equal responses counted each, its longest sequence, and the row where it begins."""
    ids = np.asarray(table["prompt_id"].to_pylist(), dtype=object)
    starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
    prompt, chosen, rejected = (_lengths(table, side) for side in _SIDES)
    sequence = np.maximum.reduceat(prompt + np.maximum(chosen, rejected), starts)
    if spec.shares:
        return prompt[starts] + np.add.reduceat(chosen + rejected - 2, starts), sequence, starts
    return np.add.reduceat(2 * prompt + chosen + rejected - 2, starts), sequence, starts


def _lengths(table: pa.Table, column: str) -> Any:
    return pc.list_value_length(table[column]).to_numpy()
