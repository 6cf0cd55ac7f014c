"""Checks of pairs and texts before the first step, in one pass over the columns that matter."""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from plad_dist.config import Loss, Model
from plad_dist.data.dataset import Dataset
from plad_dist.data.models import load_model_config, vocabulary_size
from plad_dist.data.parts import part_name
from plad_dist.data.storage import Storage
from plad_dist.errors import UserError
from plad_dist.training.batches.blocks import PairRows, group_starts
from plad_dist.training.batches.building import pair_groups
from plad_dist.training.batches.groups import DataSpec, fit, group_counts, open_groups
from plad_dist.training.batches.micro_batch import Layout

logger = logging.getLogger("plad")

_READERS = 4
_LONGEST_TEXTS = 1000  # texts that are tokenized
_SIDES = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
_passed: set[tuple[object, ...]] = set()  # checks that this process need not repeat for another phase


@dataclass
class _BlockCheck:
    """Result for one block: the first problem, or the largest of the exactly counted groups."""

    problem: str = ""
    largest_places: int = 0
    largest: str = ""


def check_pairs(
    spec: DataSpec, storage: Storage, model: str, settings: Model, loss: Loss, micro_batch_tokens: int
) -> None:
    """Check all pairs of a phase.

    Raises:
        UserError: a response or a prompt is empty, a token is not in the student's vocabulary, a
            score that the loss needs is missing or not finite, or a group is too long. The message
            names part and row.
    """
    dataset = spec.dataset(storage)
    manifest = dataset.require("pair")
    bounds = (spec.context, spec.max_group_tokens, spec.layout, spec.over_long, micro_batch_tokens)
    identity = ("pairs", dataset.path, manifest.contents, bounds, loss.needs_scores, model)  # not the kind of groups
    if identity in _passed:
        return
    checker = _PairChecker(
        dataset, spec, loss, model, vocabulary_size(load_model_config(model, settings)), micro_batch_tokens
    )
    threads = ThreadPoolExecutor(_READERS)
    try:
        for check in threads.map(checker.check, range(len(manifest.parts))):
            if check.problem:
                raise UserError(check.problem)
            if check.largest_places > micro_batch_tokens:
                raise UserError(
                    f"{check.largest}, more than training.micro_batch_tokens={micro_batch_tokens:,} holds; raise "
                    "it, or set training.max_group_tokens and training.over_long"
                )
    finally:
        threads.shutdown(cancel_futures=True)
    _passed.add(identity)


def check_texts(spec: DataSpec, storage: Storage, model: str, settings: Model, micro_batch_tokens: int) -> None:
    """Check that every prompt with its response fits in a micro-batch.

    Tokenizing all texts would take too long, so only the longest are tokenized. A token of a text
    has at least one byte, and the template is assumed to add at most half of a micro-batch: texts
    with fewer bytes than the other half fit. A group that this check misses is refused when
    training reaches it.

    Raises:
        UserError: a group does not fit; the message names its prompt.
    """
    if min(spec.context, spec.max_group_tokens or spec.context) <= micro_batch_tokens:
        return
    dataset, groups = spec.dataset(storage), open_groups(spec, storage, model, settings)
    manifest = dataset.require("run")
    identity = ("texts", dataset.path, manifest.contents, spec, micro_batch_tokens, model)
    if identity in _passed:
        return
    logger.info("%s: checking the longest texts against training.micro_batch_tokens", dataset.path)
    blocks = [block for block, count in enumerate(group_counts(spec, manifest.parts)) if count]
    longest_of = partial(groups.longest, at_least=micro_batch_tokens // 2, limit=_LONGEST_TEXTS)
    threads = ThreadPoolExecutor(_READERS)
    try:
        longest = heapq.nlargest(_LONGEST_TEXTS, chain.from_iterable(threads.map(longest_of, blocks)))
    finally:
        threads.shutdown(cancel_futures=True)
    for group in groups.take(sorted(index for _, index in longest)):
        tokens = spec.layout.places(group)
        if tokens > micro_batch_tokens:
            raise UserError(
                f"{group.name}: with its response it has {tokens:,} tokens, more than "
                f"training.micro_batch_tokens={micro_batch_tokens:,} holds; raise it, or set training.max_group_tokens "
                "to at most that number, and training.over_long to drop or truncate"
            )
    _passed.add(identity)


@dataclass(frozen=True)
class _PairChecker:
    """Check of the pairs of one block at a time, from several threads."""

    dataset: Dataset
    spec: DataSpec
    loss: Loss
    model: str
    vocabulary: int
    micro_batch_tokens: int

    def check(self, block: int) -> _BlockCheck:
        table = self.dataset.read_block(block)
        part = f"{self.dataset.path}/{part_name(block)}"
        for row, problem in self._bad_rows(table):
            return _BlockCheck(f"{part}: row {row} (counted from 0), prompt {table['prompt_id'][row]}: {problem}")
        return self._check_lengths(table, part)

    def _check_lengths(self, table: pa.Table, part: str) -> _BlockCheck:
        result = _BlockCheck()
        if not table.num_rows:
            return result
        upper_bounds, sequences = _group_lengths(table, self.spec.layout)
        limit = min(self.spec.max_group_tokens or self.micro_batch_tokens, self.micro_batch_tokens)
        rows = PairRows(table, None, part)
        # Building groups is slow, so only groups that may be too long are counted exactly.
        for number in np.flatnonzero((upper_bounds > limit) | (sequences > self.spec.context)):
            (group,) = pair_groups([rows.rows(int(number))])
            try:
                fitted = fit(group, self.spec)
            except UserError as error:
                return _BlockCheck(str(error))
            places = 0 if fitted is None else self.spec.layout.places(fitted)
            if fitted is not None and places > result.largest_places:
                row = f"{part}: row {int(rows.starts[number])} (counted from 0)"
                result = _BlockCheck("", places, f"{row}: {self.spec.layout.size_text(fitted)}")
        return result

    def _bad_rows(self, table: pa.Table) -> Iterator[tuple[int, str]]:
        """Yield (row, problem) for the first row with each kind of problem."""
        for side in _SIDES:
            empty = np.flatnonzero(_lengths(table, side) == 0)
            if len(empty):
                yield (
                    int(empty[0]),
                    f"{side} is empty, so nothing can be predicted; pair again with pairing.empty: drop",
                )
            column = table[side].combine_chunks()
            outside = pc.or_(pc.less(column.values, 0), pc.greater_equal(column.values, self.vocabulary))
            if pc.any(outside).as_py():
                first = int(np.flatnonzero(outside.to_numpy(zero_copy_only=False))[0])
                yield (
                    int(pc.list_parent_indices(column)[first].as_py()),
                    f"{side} holds token {column.values[first]}, but the vocabulary of {self.model} has "
                    f"{self.vocabulary:,} tokens: the pairs were built with the tokenizer of another model; "
                    "pair again for this student",
                )
        if self.loss.needs_scores:
            for side in ("chosen_score", "rejected_score"):
                for row, score in enumerate(table[side].to_pylist()):
                    if score is None or not math.isfinite(score):
                        yield (
                            row,
                            f"{side} is {score}, but the loss {self.loss.name} needs a finite score; "
                            "set pairing.score or pairing.min_score_gap",
                        )


def _group_lengths(table: pa.Table, layout: Layout) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return, for every group, an upper bound of its places and the tokens of its longest sequence.

    The bound counts a response once for each pair that it is in.
    """
    starts = group_starts(table)
    prompt, chosen, rejected = (_lengths(table, side) for side in _SIDES)
    sequences = np.maximum.reduceat(prompt + np.maximum(chosen, rejected), starts)
    if layout.packs_rows and layout.shares_prompts:
        return prompt[starts] + np.add.reduceat(chosen + rejected, starts), sequences
    pairs = np.diff(np.append(starts, table.num_rows))
    return 2 * pairs * sequences, sequences


def _lengths(table: pa.Table, column: str) -> NDArray[np.int32]:
    lengths: NDArray[np.int32] = pc.list_value_length(table[column]).to_numpy()
    return lengths
