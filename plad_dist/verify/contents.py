"""Check of datasets against each other: inputs exist, and every prompt has its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from plad_dist.data.dataset import Dataset
from plad_dist.data.manifest import MANIFEST
from plad_dist.data.prompts import rows_by_block
from plad_dist.errors import RunFailed
from plad_dist.verify.result import DatasetResult

SampleKey = tuple[str, int]  # prompt_id, sample_index


def check_inputs(results: Sequence[DatasetResult], dataset_paths: set[str]) -> None:
    """Report datasets that are missing although a complete dataset was made from them.

    A dataset that is being rebuilt is not missing.

    Args:
        dataset_paths: paths of all datasets of the catalog, whose inputs also include models.
    """
    by_path = {result.path: result for result in results}
    for result in results:
        if result.state != "complete" or result.entry is None:
            continue
        for path in [path for path in result.entry.inputs if path in dataset_paths]:
            source = by_path.get(path)
            if source is None or (source.state == "incomplete" and not source.is_started):
                owner = source or result
                problem = f"{path}/{MANIFEST}: missing, though {result.path} was made from it"
                if problem not in owner.problems:
                    owner.problems.append(problem)


def check_rows(results: Sequence[DatasetResult]) -> None:
    """Check that sound datasets have every row exactly once, in the order of the prompts.

    A dataset whose prompts are not sound is left out.
    """
    sound = {result.path for result in results if result.state == "complete" and not result.problems}
    for result in results:
        entry = result.entry
        if result.path not in sound or entry is None or entry.prompts is None or entry.rows_per_prompt is None:
            continue
        if entry.prompts.path in sound:
            _check_rows(result, entry.prompts, entry.limit, entry.rows_per_prompt)


def _check_rows(result: DatasetResult, prompts: Dataset, limit: int | None, rows_per_prompt: int) -> None:
    expected_prompts = rows_by_block(prompts.require("prepare"), limit)
    parts = result.dataset.require(result.command).parts
    if len(parts) != len(expected_prompts):
        result.add_problem(
            MANIFEST,
            f"{MANIFEST}: lists {len(parts):,} parts, where {len(expected_prompts):,} blocks of prompts were to be "
            "sampled",
        )
        result.wrong_rows.add(MANIFEST)
    for block, (part, count) in enumerate(zip(parts, expected_prompts, strict=False)):
        try:
            prompt_ids = prompts.read_block(block)["prompt_id"].slice(0, count).to_pylist()
            table = result.dataset.read_block(block).select(["prompt_id", "sample_index"])
        except RunFailed as error:  # damaged since its bytes were checked
            result.add_problem(part.name, str(error))
            continue
        actual = list(zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True))
        expected = [(prompt_id, index) for prompt_id in prompt_ids for index in range(rows_per_prompt)]
        if actual != expected:
            difference = _difference(actual, expected)
            result.add_problem(
                part.name, f"{part.name}: not exactly one sample for each prompt and index: {difference}"
            )
            result.wrong_rows.add(part.name)


def _difference(actual: list[SampleKey], expected: list[SampleKey]) -> str:
    counts = Counter(actual)
    if repeated := [key for key, count in counts.items() if count > 1]:
        return f"{repeated[0]} occurs twice"
    if missing := [key for key in expected if key not in counts]:
        return f"{missing[0]} is missing"
    return "in another order" if len(actual) == len(expected) else f"{len(actual) - len(expected)} too many"
