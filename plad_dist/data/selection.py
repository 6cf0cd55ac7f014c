"""Selection of prompts: training or held-out set, teacher, duplicates and over-long prompts."""

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
from plad_dist.data.conversation import Conversation
from plad_dist.data.hashset import HashSet
from plad_dist.data.lengths import Lengths
from plad_dist.data.sources import JINJA, JINJA_ERRORS, Prompt, make_prompt, read_prompts
from plad_dist.errors import UserError
from plad_dist.harvest.python_functions import harvest

TRAIN, HELDOUT = "train", "heldout"
_BATCH_ROWS = 512  # rows that are deduplicated and tokenized at a time
Row = tuple[str, Prompt]  # TRAIN or HELDOUT, and the prompt


class Selection:
    """Stream of the prompts that a run keeps, each with its set, in the order of the sources.

    It can be iterated only once. Memory grows by 8 bytes per prompt, for the hashes that detect
    duplicates.

    Attributes:
        counts: counts of each set so far: kept `rows`, `references` among them, `duplicates`,
            `over_long` and `truncated` prompts, and dropped prompts as `dropped.` and the reason.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._router, self._lengths = Router(config), Lengths(config)
        self._seen, self._heldout = HashSet(), HashSet()
        self._unshown: list[str] = []
        self._first_invalid: str | None = None
        self.counts: dict[str, Counter[str]] = {TRAIN: Counter(), HELDOUT: Counter()}

    def __iter__(self) -> Iterator[Row]:
        """Yield the set and the prompt of every kept row.

        Raises:
            UserError: a row is invalid, or a set has no prompts.
        """
        rows = self._rows()
        while batch := list(islice(rows, _BATCH_ROWS)):
            unique = self._without_duplicates(self._without_heldout(batch))
            if self._config.teachers:
                unique = [(name, replace(prompt, teacher=self._router.teacher_of(prompt))) for name, prompt in unique]
            for name, prompt in self._without_over_long(unique):
                self.counts[name]["rows"] += 1
                self.counts[name]["references"] += prompt.reference is not None
                yield name, prompt
        for name, key in ((TRAIN, "prompts.source"), (HELDOUT, "prompts.heldout")):
            if not self.counts[name]["rows"]:
                raise UserError(self._empty_set_message(name, key))

    def _rows(self) -> Iterator[Row]:
        """Yield all rows of the sources.

        The rows of `prompts.heldout` come first, because they are dropped from the training set.
        """
        prompts, seed = self._config.prompts, self._config.run.seed
        if prompts.heldout is not None:
            rows = read_prompts(prompts.heldout, "prompts.heldout", lambda error: self._drop_invalid(HELDOUT, error))
            yield from ((HELDOUT, prompt) for prompt in rows)
        if isinstance(prompts.source, PythonFunctionsSource):
            train, heldout = harvest(prompts.source, seed)
            for name, functions in ((TRAIN, train), (HELDOUT, heldout if prompts.heldout is None else [])):
                for index, item in enumerate(functions):
                    content, reference = item.description, item.name
                    if prompts.source.answer == "description":
                        content, reference = reference, content
                    conversation = Conversation([{"role": "user", "content": content}])
                    location, meta = f"python_functions: row {index}", {"package": item.package}
                    yield name, make_prompt("python_functions", index, location, conversation, reference, meta)
            return
        share = prompts.heldout_fraction if prompts.heldout is None else 0.0
        for prompt in read_prompts(prompts.source, on_invalid=lambda error: self._drop_invalid(TRAIN, error)):
            # The hash covers the content alone, so equal prompts are in the same set.
            yield (HELDOUT if _unit_hash(seed, f"{prompt.content:016x}") < share else TRAIN), prompt

    def _drop_invalid(self, name: str, error: UserError) -> None:
        """Count a row that `invalid_rows` drops."""
        self.counts[name]["dropped.invalid"] += 1
        self._first_invalid = self._first_invalid or str(error)

    def _empty_set_message(self, name: str, key: str) -> str:
        """Return why a set has no prompts, and what to do."""
        kind = "training" if name == TRAIN else "held-out"
        if set(self.counts[name]) == {"dropped.heldout"}:
            return f"{key}: no {kind} prompts remain: prompts.heldout has all of them; use other held-out prompts"
        if dropped := [
            f"{n:,} {key.removeprefix('dropped.')}" for key, n in self.counts[name].items() if "dropped" in key
        ]:
            return (
                f"{key}: no {kind} prompts remain, all were dropped: {', '.join(dropped)}; see prompts.duplicates, "
                "prompts.over_long and invalid_rows of the source"
            )
        rows = self.counts[HELDOUT if name == TRAIN else TRAIN]["rows"]
        if self._config.prompts.heldout is not None or not rows:
            return f"{key}: no {kind} prompts; add rows"
        return (
            f"prompts.heldout_fraction: {self._config.prompts.heldout_fraction:g} of {rows:,} rows leaves no {kind} "
            "prompts: each is held out with this probability, by a hash of its text; add rows, set another "
            "fraction, or set prompts.heldout"
        )

    def _without_heldout(self, rows: list[Row]) -> list[Row]:
        """Drop training rows that are also in `prompts.heldout`, which is read before them."""
        if self._config.prompts.heldout is None:
            return rows
        hashes = _hashes(rows)
        is_heldout = np.array([name == HELDOUT for name, _ in rows])
        self._heldout.add(hashes[is_heldout])
        is_dropped = ~is_heldout & self._heldout.contains(hashes)
        self.counts[TRAIN]["dropped.heldout"] += int(is_dropped.sum())
        return [row for row, dropped in zip(rows, is_dropped, strict=True) if not dropped]

    def _without_duplicates(self, rows: list[Row]) -> list[Row]:
        """Count duplicates, and apply `prompts.duplicates` to them."""
        unique = []
        for (name, prompt), is_new in zip(rows, self._seen.add(_hashes(rows)), strict=True):
            if not is_new:
                self.counts[name]["duplicates"] += 1
                match self._config.prompts.duplicates:
                    case "fail":
                        raise UserError(
                            f"{prompt.location}: repeats an earlier prompt word for word; remove it, or set "
                            "prompts.duplicates to keep or drop"
                        )
                    case "drop":
                        self.counts[name]["dropped.duplicates"] += 1
                        continue
            unique.append((name, prompt))
        return unique

    def _without_over_long(self, rows: list[Row]) -> list[Row]:
        """Count over-long prompts, and apply `prompts.over_long` to them."""
        prompts = [prompt for _, prompt in rows]
        self._lengths.check_rendering(prompts)
        self._unshown += self._lengths.unshown(prompts)
        excesses = self._lengths.over_long(prompts)
        fitting = []
        for index, (name, prompt) in enumerate(rows):
            if index in excesses:
                self.counts[name]["over_long"] += 1
                match self._config.prompts.over_long:
                    case "fail":
                        raise UserError(
                            f"{prompt.location}: the prompt has {excesses[index]}; shorten it, or set "
                            "prompts.over_long to drop or truncate (prompts.max_tokens sets the limit)"
                        )
                    case "drop":
                        self.counts[name]["dropped.over_long"] += 1
                        continue
                    case "truncate":
                        self.counts[name]["truncated"] += 1
                        prompt = self._lengths.truncated(prompt)
            fitting.append((name, prompt))
        return fitting

    def summary(self) -> list[str]:
        """Return log lines on duplicate, over-long and dropped prompts, none if all is normal.

        They also warn of templates that leave out tools or their calls, and if neither references
        nor judges can measure the quality of responses.
        """
        total = self.counts[TRAIN] + self.counts[HELDOUT]
        prompts, participles = self._config.prompts, {"keep": "kept", "drop": "dropped", "truncate": "truncated"}
        changes = [
            (total["duplicates"], f"duplicates {participles.get(prompts.duplicates)}"),
            (total["over_long"], f"over-long {participles.get(prompts.over_long)}"),
            (total["dropped.invalid"], f"invalid rows dropped, the first: {self._first_invalid}"),
            (total["dropped.heldout"], "dropped from training because prompts.heldout has them"),
        ]
        lines = [f"{count:,} {change}" for count, change in changes if count] + self._unshown
        if not self.counts[HELDOUT]["references"] and not self._config.evaluation.judges:
            lines.append(
                "no held-out prompt has a reference and evaluation.judges is empty, so nothing can measure the quality "
                "of responses"
            )
        return lines


class Router:
    """Assigns one of several teachers to every prompt, by their filters and shares."""

    def __init__(self, config: Config) -> None:
        self._seed = config.run.seed
        self._teachers = [
            (name, teacher.share, _compile_filter(teacher.filter, f"teachers.{name}.filter"))
            for name, teacher in config.all_teachers().items()
        ]

    def teacher_of(self, prompt: Prompt) -> str:
        """Return the name of the teacher that responds to a prompt.

        Raises:
            UserError: no teacher's filter accepts the prompt, or a filter fails on it. The message
                names the row.
        """
        candidates = [(name, share) for name, share, accepts in self._teachers if accepts(prompt)]
        if not candidates:
            raise UserError(
                f"{prompt.location}: no teacher's `filter` accepts this prompt; widen the filter of a teacher or "
                "remove it"
            )
        # This hash is independent of the one that holds prompts out, so the shares also hold for
        # held-out prompts.
        position = _unit_hash(self._seed, f"teacher\0{prompt.prompt_id}") * sum(share for _, share in candidates)
        for name, share in candidates:
            position -= share
            if position < 0:
                return name
        return candidates[-1][0]  # rounding error


def _compile_filter(filter: str | None, key: str) -> Callable[[Prompt], bool]:
    """Return a predicate of prompts from a teacher's filter, a Jinja expression."""
    if filter is None:
        return lambda _: True
    try:
        expression = JINJA.compile_expression(filter, undefined_to_none=False)
    except jinja2.TemplateError as error:
        raise UserError(f"{key}: {filter!r}: not a valid Jinja expression: {error}") from None

    def accepts(prompt: Prompt) -> bool:
        row: dict[str, Any] = {"messages": prompt.messages, "reference": prompt.reference, "meta": prompt.meta}
        try:
            return bool(expression(row))
        except JINJA_ERRORS as error:
            raise UserError(
                f"{prompt.location}: {key}: {filter!r}: {error}; `meta` has {', '.join(prompt.meta)}, and "
                "prompts.source.meta_columns adds to it"
            ) from None

    return accepts


def _hashes(rows: list[Row]) -> Any:
    return np.array([prompt.content for _, prompt in rows], dtype=np.uint64)


def _unit_hash(seed: int, name: str) -> float:
    """Return a number in [0, 1) that depends on the seed and the name alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8]) / 2**64
