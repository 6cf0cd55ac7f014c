"""Samples of a run, and ways to damage them, for tests of `plad verify` and `plad status`."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from plad_dist.data.dataset import Dataset
from plad_dist.data.parts import part_name
from plad_dist.data.prompts import train_prompts
from plad_dist.data.schemas import SAMPLES
from plad_dist.evaluation.metrics import compare
from plad_dist.rundir import RunDir
from plad_dist.systems import PLAD
from plad_dist.text_metrics import Output
from plad_dist.verify.run import verify


def write_samples(output: Dataset, prompts: Dataset, n: int, fingerprint: str = "f") -> None:
    """Write a complete dataset with `n` samples of every prompt."""
    blocks = len(prompts.require("prepare").parts)
    for block in range(blocks):
        output.commit(block, samples_of(prompts, block, n), fingerprint=fingerprint, attempt="a")
    output.finish(blocks, fingerprint=fingerprint, facts={})


def samples_of(prompts: Dataset, block: int, n: int) -> pa.Table:
    """Return `n` samples of every prompt of a block."""
    rows = [
        {"prompt_id": prompt, "sample_index": index, "role": "teacher", "text": "x", "token_ids": [1], "logprob": -1.0,
         "num_tokens": 1, "finish_reason": "stop", "error": None, "model": "m", "round": 0}
        for prompt in prompts.read_block(block)["prompt_id"].to_pylist()
        for index in range(n)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def problems_of(run: RunDir) -> list[str]:
    """Return all problems that a verification finds."""
    results, other_problems = verify(run.storage.url)
    return [f"{item.path}: {problem}" for item in results for problem in item.problems] + other_problems


def part_path(run: RunDir, block: int = 1) -> Path:
    """Return the path of a part of the teacher's samples, which most of the damages concern."""
    return run.root / "samples/teacher/round-0" / part_name(block)


def remove(run: RunDir) -> None:
    part_path(run).unlink()


def truncate(run: RunDir) -> None:
    path = part_path(run)
    path.write_bytes(path.read_bytes()[:-100])


def alter(run: RunDir) -> None:
    data = bytearray(part_path(run).read_bytes())
    data[len(data) // 2] ^= 1
    part_path(run).write_bytes(data)


def add(run: RunDir) -> None:
    part_path(run, 99).write_bytes(part_path(run).read_bytes())


def damage_manifest(run: RunDir) -> None:
    (run.root / "samples/teacher/round-0/manifest.json").write_text("{")


def remove_manifest(run: RunDir) -> None:
    (run.root / "prompts/manifest.json").unlink()


def alter_config(run: RunDir) -> None:
    path = run.root / "run.yaml"
    path.write_text(path.read_text().replace("seed: 5", "seed: 6"))


def sample_of_another_model(run: RunDir) -> None:
    rewrite(run, "other", samples_of(train_prompts(run.storage), 1, 2))


def sample_twice(run: RunDir) -> None:
    table = samples_of(train_prompts(run.storage), 1, 2)
    rewrite(run, "f", pa.concat_tables([table.slice(0, 2), table.slice(0, 2), table.slice(4)]))


def lose_a_row(run: RunDir) -> None:
    rewrite(run, "f", samples_of(train_prompts(run.storage), 1, 2).slice(2))


def other_columns(run: RunDir) -> None:
    dataset = run.samples("teacher")
    part_path(run).unlink()
    narrow = Dataset(run.storage, dataset.path, pa.schema([SAMPLES.field("prompt_id")]))
    narrow.commit(1, samples_of(train_prompts(run.storage), 1, 2).select(["prompt_id"]), fingerprint="f", attempt="b")
    narrow.finish(len(train_prompts(run.storage).require("prepare").parts), fingerprint="f", facts={})


def damage_prompts(run: RunDir) -> None:
    path = run.root / "prompts" / part_name(0)
    path.write_bytes(path.read_bytes()[:-50])
    alter(run)


def too_many_blocks(run: RunDir) -> None:
    dataset = run.samples("teacher")
    blocks = len(dataset.require("sample").parts)
    table = samples_of(train_prompts(run.storage), 0, 2)
    dataset.commit(blocks, table, fingerprint="f", attempt="b")
    dataset.finish(blocks + 1, fingerprint="f", facts={})


def too_few_blocks(run: RunDir) -> None:
    for block in range(2, len(run.samples("teacher").require("sample").parts)):
        part_path(run, block).unlink()
    run.samples("teacher").finish(2, fingerprint="f", facts={})


def alter_a_journaled_part(run: RunDir) -> None:
    dataset = run.samples("teacher")
    manifest = dataset.require("sample")
    dataset.rewrite_journal("f", manifest.parts)
    (run.root / dataset.path / "manifest.json").unlink()
    alter(run)


def cut_figures(run: RunDir) -> None:
    run.storage.replace(run.metrics, b'{"systems": [')


def no_figures(run: RunDir) -> None:
    run.storage.replace(run.metrics, b"[]")


def figures_without_responses(run: RunDir) -> None:
    outputs = {(PLAD, "greedy"): [Output("text", 1, finished=True)]}
    metrics = compare(outputs, ["text"], temperatures={"greedy": 0.0}, resamples=100, seed=0)
    run.storage.replace(run.metrics, metrics.to_bytes())


def rewrite(run: RunDir, fingerprint: str, table: pa.Table) -> None:
    """Replace a part, with a manifest that lists the new one."""
    dataset = run.samples("teacher")
    (run.root / dataset.path / "manifest.json").unlink()
    part_path(run).unlink()
    dataset.commit(1, table, fingerprint=fingerprint, attempt="b")
    blocks = len(train_prompts(run.storage).require("prepare").parts)
    known = dataset.committed_parts()
    dataset.finish(blocks, fingerprint="f", facts={}, known_parts=known.values())
