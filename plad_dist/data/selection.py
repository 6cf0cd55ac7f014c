"""What becomes of every row of the prompt sources: which set it is in, which teacher answers it, whether it is kept."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import jinja2
import numpy as np

from plad_dist.config import Config, PythonFunctionsSource
from plad_dist.data.hashset import HashSet
from plad_dist.data.lengths import Lengths
from plad_dist.data.sources import JINJA, JINJA_ERRORS, Prompt, make_prompt, read_prompts
from plad_dist.errors import UserError
from plad_dist.harvest.python_functions import harvest

TRAIN, HELDOUT = "train", "heldout"
_BATCH = 512  # rows that are looked up and tokenized at a time
Row = tuple[str, Prompt]  # TRAIN or HELDOUT, and the prompt


class Selection:
    """The prompts of a run that are kept, in the order of their sources, each with its set. Read once, as a stream.

    Memory grows by 8 bytes a prompt, the hashes that duplicates are found by.

    Attributes:
        counts: of each set so far: `rows` that are kept, `references` among them, `duplicates`, `over_long`, `truncated`, and `dropped.` by reason.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._route, self._lengths = Router(config), Lengths(config)
        self._seen, self._held = HashSet(), HashSet()
        self.counts: dict[str, Counter[str]] = {TRAIN: Counter(), HELDOUT: Counter()}

    def __iter__(self) -> Iterator[Row]:
        """Raises :class:`UserError` for a bad row, and where no prompts are left to train on or to evaluate with."""
        rows = _rows(self._config)
        while batch := list(islice(rows, _BATCH)):
            kept = self._without_duplicates(self._without_heldout(batch))
            if self._config.teachers:
                kept = [(name, replace(prompt, teacher=self._route(prompt))) for name, prompt in kept]
            for name, prompt in self._without_over_long(kept):
                self.counts[name]["rows"] += 1
                self.counts[name]["references"] += prompt.reference is not None
                yield name, prompt
        for name, key in ((TRAIN, "prompts.source"), (HELDOUT, "prompts.heldout")):
            if not self.counts[name]["rows"]:
                raise UserError(self._none_left(name, key))

    def _none_left(self, name: str, key: str) -> str:
        """Why a set has no prompts, and what to do."""
        what = "training" if name == TRAIN else "held-out"
        if set(self.counts[name]) == {"dropped.heldout"}:
            return f"{key}: no {what} prompts are left: prompts.heldout has them all. Give it other prompts"
        if dropped := [
            f"{n:,} {key.removeprefix('dropped.')}" for key, n in self.counts[name].items() if "dropped" in key
        ]:
            return f"{key}: no {what} prompts are left, all are dropped: {', '.join(dropped)}; see prompts.duplicates and .over_long"
        other = self.counts[HELDOUT if name == TRAIN else TRAIN]["rows"]
        if self._config.prompts.heldout is not None or not other:
            return f"{key}: no {what} prompts; give more rows"
        return (
            f"prompts.heldout_fraction: {self._config.prompts.heldout_fraction:g} of these {other:,} rows leaves no {what} prompts; "
            "give more rows, set another fraction, or prompts.heldout"
        )

    def _without_heldout(self, rows: list[Row]) -> list[Row]:
        """Training rows that `prompts.heldout`, which is read before them, has too are left out."""
        if self._config.prompts.heldout is None:
            return rows
        hashes = _hashes(rows)
        heldout = np.array([name == HELDOUT for name, _ in rows])
        self._held.add(hashes[heldout])
        out = ~heldout & self._held.holds(hashes)
        self.counts[TRAIN]["dropped.heldout"] += int(out.sum())
        return [row for row, left_out in zip(rows, out, strict=True) if not left_out]

    def _without_duplicates(self, rows: list[Row]) -> list[Row]:
        kept = []
        for (name, prompt), new in zip(rows, self._seen.add(_hashes(rows)), strict=True):
            if not new:
                self.counts[name]["duplicates"] += 1
                match self._config.prompts.duplicates:
                    case "fail":
                        raise UserError(
                            f"{prompt.where}: this prompt was there before, word for word. Remove it, or set "
                            "prompts.duplicates to keep or drop."
                        )
                    case "drop":
                        self.counts[name]["dropped.duplicates"] += 1
                        continue
            kept.append((name, prompt))
        return kept

    def _without_over_long(self, rows: list[Row]) -> list[Row]:
        prompts = [prompt for _, prompt in rows]
        self._lengths.check_rendering(prompts)
        too_long = self._lengths.over_long(prompts)
        kept = []
        for index, (name, prompt) in enumerate(rows):
            if index in too_long:
                self.counts[name]["over_long"] += 1
                match self._config.prompts.over_long:
                    case "fail":
                        raise UserError(
                            f"{prompt.where}: the prompt has {too_long[index]}. Shorten it, or set prompts.over_long to "
                            "drop or truncate (prompts.max_tokens sets the limit)."
                        )
                    case "drop":
                        self.counts[name]["dropped.over_long"] += 1
                        continue
                    case "truncate":
                        self.counts[name]["truncated"] += 1
                        prompt = self._lengths.truncated(prompt)
            kept.append((name, prompt))
        return kept

    def summary(self) -> str | None:
        """What is not as the sources have it, and whether anything will tell how good outputs are, in words; None where all is well."""
        total = self.counts[TRAIN] + self.counts[HELDOUT]
        prompts, done = self._config.prompts, {"keep": "kept", "drop": "dropped", "truncate": "truncated"}
        said = [
            (total["duplicates"], f"duplicates {done.get(prompts.duplicates)}"),
            (total["over_long"], f"over-long {done.get(prompts.over_long)}"),
            (total["dropped.heldout"], "left out of training because prompts.heldout has them"),
        ]
        told = [f"{count:,} {what}" for count, what in said if count]
        if not self.counts[HELDOUT]["references"] and not self._config.evaluation.judges:
            told.append(
                "no held-out prompt has a reference and evaluation.judges is empty, so that nothing will tell how good outputs are"
            )
        return ", ".join(told) or None


class Router:
    """Gives every prompt one of several teachers, by their filters and shares."""

    def __init__(self, config: Config) -> None:
        self._seed = config.run.seed
        self._teachers = [
            (name, teacher.share, _compiled(teacher.filter, f"teachers.{name}.filter"))
            for name, teacher in config.teachers.items()
        ]

    def __call__(self, prompt: Prompt) -> str:
        """Raises :class:`UserError` naming the row that no teacher takes, or on which a filter fails."""
        takers = [(name, share) for name, share, takes in self._teachers if takes(prompt)]
        if not takers:
            raise UserError(
                f"{prompt.where}: no teacher takes this prompt. Give one of the teachers a wider `filter`, or none."
            )
        # Apart from the hash that holds prompts out: held-out prompts are shared out like all others.
        left = _unit_hash(self._seed, f"teacher\0{prompt.prompt_id}") * sum(share for _, share in takers)
        for name, share in takers:
            left -= share
            if left < 0:
                return name
        return takers[-1][0]  # float error


def _compiled(filter: str | None, key: str) -> Callable[[Prompt], bool]:
    if filter is None:
        return lambda _: True
    try:
        expression = JINJA.compile_expression(filter, undefined_to_none=False)
    except jinja2.TemplateError as error:
        raise UserError(f"{key}: {filter!r}: not a valid Jinja expression: {error}") from None

    def takes(prompt: Prompt) -> bool:
        row: dict[str, Any] = {"messages": prompt.messages, "reference": prompt.reference, "meta": prompt.meta}
        try:
            return bool(expression(row))
        except JINJA_ERRORS as error:
            raise UserError(
                f"{prompt.where}: {key}: {filter!r}: {error}. `meta` has {', '.join(prompt.meta)}; "
                "prompts.source.meta_columns adds to it."
            ) from None

    return takes


def _rows(config: Config) -> Iterator[Row]:
    """All rows of the sources. Those of `prompts.heldout` come first: the training set is kept clear of them."""
    prompts, seed = config.prompts, config.run.seed
    if prompts.heldout is not None:
        yield from ((HELDOUT, prompt) for prompt in read_prompts(prompts.heldout, "prompts.heldout"))
    if isinstance(prompts.source, PythonFunctionsSource):
        train, heldout = harvest(prompts.source, seed)
        for name, functions in ((TRAIN, train), (HELDOUT, heldout if prompts.heldout is None else [])):
            for index, item in enumerate(functions):
                asked, answer = item.description, item.name
                if prompts.source.answer == "description":
                    asked, answer = answer, asked
                messages = [{"role": "user", "content": asked}]
                where, meta = f"python_functions: row {index}", {"package": item.package}
                yield name, make_prompt("python_functions", index, where, messages, answer, meta)
        return
    share = prompts.heldout_fraction if prompts.heldout is None else 0.0
    for prompt in read_prompts(prompts.source):
        # By content, so that equal prompts are on one side.
        yield (HELDOUT if _unit_hash(seed, f"{prompt.content:016x}") < share else TRAIN), prompt


def _hashes(rows: list[Row]) -> Any:
    return np.array([prompt.content for _, prompt in rows], dtype=np.uint64)


def _unit_hash(seed: int, name: str) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8]) / 2**64
