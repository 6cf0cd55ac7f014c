"""The stage `pair`: one part per block, identical whoever builds it and however often it dies."""

from __future__ import annotations

import asyncio
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from plad_dist.config import Config
from plad_dist.data.dataset import Dataset
from plad_dist.data.parts import part_name
from plad_dist.data.prompts import heldout_prompts, train_prompts
from plad_dist.data.schemas import PROMPTS, SAMPLES
from plad_dist.errors import RunFailed, UserError
from plad_dist.fleet.protocol import BlockResult, BlockWorker, Hints
from plad_dist.pairing import build
from plad_dist.pairing.build import build_pairs, is_paired, pair_jobs, pair_worker_args
from plad_dist.pairing.facts import PairFacts
from plad_dist.pairing.worker import PairWorker
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir
from plad_dist.training.model.scratch import train_tokenizer
from tests.conftest import SHAPE, tiny_config
from tests.in_process import build_in_process, run_pair_jobs

BLOCK, PROMPTS_SAMPLED = 2, 9


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "run_pair_jobs", run_pair_jobs)


def write(dataset: Dataset, rows: list[dict[str, Any]], per_block: int) -> None:
    """Commit rows as a complete dataset."""
    blocks = [rows[start : start + per_block] for start in range(0, len(rows), per_block)]
    for block, part in enumerate(blocks):
        dataset.commit(block, pa.Table.from_pylist(part, schema=dataset.schema), fingerprint="f", attempt="a")
    dataset.finish(len(blocks), fingerprint="f", facts={})


def samples(prompts: list[dict[str, Any]], role: str, n: int) -> list[dict[str, Any]]:
    """Return `n` samples per prompt.

    The teacher's samples of prompts 4 and 5, which are a whole block, are truncated.
    """
    return [
        {
            "prompt_id": prompt["prompt_id"],
            "sample_index": index,
            "role": role,
            "text": f"{role} {number % 3} {index}" + (" one" * (number % 4) if role == "teacher" else ""),
            "token_ids": [10 + number, 20 + index, 2],
            "logprob": -1.0,
            "num_tokens": 3,
            "finish_reason": "length" if role == "teacher" and number in (4, 5) else "stop",
            "error": None,
            "model": "m",
            "round": 0,
        }
        for number, prompt in enumerate(prompts)
        for index in range(n)
    ]


def make_config(folder: Path, **pairing: Any) -> Config:
    raw = tiny_config(folder)
    raw["prompts"]["block_size"] = BLOCK
    raw["sampling"]["limit"] = PROMPTS_SAMPLED
    for role in ("teacher", "student"):
        raw["sampling"][role]["n"] = 2
    raw["evaluation"]["limit"] = 3
    raw["pairing"] = pairing
    return Config.model_validate(raw)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run whose samples are complete."""
    folder = tmp_path_factory.mktemp("sampled")
    run = RunDir.of(make_config(folder))
    assert PROMPTS.names[:2] == ["prompt_id", "messages"]
    for prompts, samples_of, limit, n in (
        (train_prompts(run.storage), run.samples, PROMPTS_SAMPLED, 2),
        (heldout_prompts(run.storage), run.heldout_samples, 3, 1),
    ):
        rows: list[dict[str, Any]] = [
            {
                "prompt_id": f"{prompts.path}-{number}",
                "messages": [{"role": "user", "content": f"two {number}"}],
                "reference": "teacher one one" if number % 2 else None,
                "meta": "{}",
            }
            for number in range(limit + 3)
        ]
        write(prompts, rows, BLOCK)
        for role in ("teacher", "student"):
            assert samples_of(role).schema == SAMPLES
            write(samples_of(role), samples(rows[:limit], role, n), n * BLOCK)
    student = run.model("warmup")
    train_tokenizer(iter(["teacher student one two three " * 5]), 300).save_pretrained(student)
    (student / "config.json").write_text(json.dumps(SHAPE))
    return folder


@pytest.fixture
def folder(sampled: Path, tmp_path: Path) -> Path:
    """Return a copy of the sampled run that a test may change."""
    shutil.copytree(sampled, tmp_path, dirs_exist_ok=True)
    return tmp_path


def outputs(run: RunDir) -> list[Any]:
    """Return rows, facts, counts and fingerprint of both pairs datasets."""
    results = []
    for dataset in (run.pairs(), run.heldout_pairs()):
        manifest = dataset.require("pair")
        blocks = [dataset.read_block(block).to_pylist() for block in range(len(manifest.parts))]
        results.append((blocks, manifest.facts, [part.counts for part in manifest.parts], manifest.fingerprint))
    return results


def test_every_block_is_one_part_and_the_facts_are_their_sums(folder: Path) -> None:
    config = make_config(folder)
    run = RunDir.of(config)
    facts = build_pairs(config, run, Progress())
    manifest = run.pairs().require("pair")
    assert [part.rows for part in manifest.parts] == [8, 8, 0, 8, 4]
    assert facts == PairFacts.from_manifest(manifest)
    assert facts.as_dict() == manifest.facts
    assert manifest.facts == manifest.facts | {
        "prompts": PROMPTS_SAMPLED,
        "pairs": 28,
        "drops": {"chosen_truncated": 8},
        "teacher_better_share": 1.0,
        "teacher_worse_share": 0.0,
        "scored": 12,
        "unscored": 16,
        "first_tokens": {"chosen": {"a space": 28}, "rejected": {"a digit": 4, "another character": 24}},
        "thoughts": {"chosen": 0, "rejected": 0},
        "unmatched_tags": {"chosen": 0, "rejected": 0},
    }
    assert facts.pairs == manifest.rows == manifest.count("pairs")
    assert run.heldout_pairs().require("pair").facts["prompts"] == 3
    assert is_paired(config, run)


class KilledError(BaseException):
    """Stands for the end of the process."""


class DyingWorker(PairWorker):
    """Worker that ends the process after a number of commits, before it reports the last one."""

    def __init__(self, *args: Any, commits: int = 1 << 30) -> None:
        super().__init__(*args)
        self.remaining, self.committed = commits, 0

    async def work(self, *args: Any) -> BlockResult:
        if self.remaining == 0:
            raise KilledError
        result = await super().work(*args)
        self.remaining -= 1
        self.committed += 1
        if self.remaining == 0:
            raise KilledError
        return result


@pytest.mark.parametrize("journal", ["kept", "lost"])
@pytest.mark.parametrize("commits", range(8))
def test_a_stage_killed_after_any_block_ends_with_the_same_pairs_and_facts(
    folder: Path, sampled: Path, tmp_path_factory: pytest.TempPathFactory, commits: int, journal: str
) -> None:
    config = make_config(folder)
    run = RunDir.of(config)
    args = pair_worker_args(config, run)
    with pytest.raises(KilledError):
        build_in_process(pair_jobs(config, run), DyingWorker(*args, commits=commits), run.storage, Progress())
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "run").rglob("pairs/**/part-*")}
    assert len(before) == commits
    if journal == "lost":
        for path in (folder / "run").rglob("journal"):
            shutil.rmtree(path)
    worker = DyingWorker(*args)
    build_in_process(pair_jobs(config, run), worker, run.storage, Progress())
    assert worker.committed == 7 - commits
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(sampled, whole, dirs_exist_ok=True)
    undisturbed = make_config(whole)
    build_pairs(undisturbed, RunDir.of(undisturbed), Progress())
    for resumed, expected in zip(outputs(run), outputs(RunDir.of(undisturbed)), strict=True):
        assert resumed[:3] == expected[:3]


def test_jobs_come_with_the_number_of_prompts_in_each_block(folder: Path) -> None:
    config = make_config(folder)
    (train, units), (heldout, heldout_units) = pair_jobs(config, RunDir.of(config))
    assert (train.output, units) == ("pairs/round-0", [2, 2, 2, 2, 1])
    assert (heldout.output, heldout_units) == ("eval/round-0/pairs", [2, 1])


def test_workers_get_absolute_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    config = make_config(folder, score="reward_model", reward_model={"path": "run/models/warmup"})
    _, student, _, pairing, _, working_directory = pair_worker_args(config, RunDir.of(config))
    assert pairing.reward_model is not None
    assert pairing.reward_model.path == student == str(folder / "run" / "models" / "warmup")
    assert working_directory == str(folder)


def test_committed_pairs_are_not_built_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(folder)
    run = RunDir.of(config)
    first = build_pairs(config, run, Progress())
    monkeypatch.setattr(PairWorker, "start", None)
    assert build_pairs(config, run, Progress()) == first


def test_a_run_without_any_pair_fails_before_it_writes_a_manifest(folder: Path) -> None:
    config = make_config(folder, min_score_gap=2.0)
    run = RunDir.of(config)
    with pytest.raises(RunFailed, match=r"no pair was left of 9 prompts.*score_gap"):
        build_pairs(config, run, Progress())
    assert run.pairs().manifest() is None


def test_a_missing_input_is_named_with_the_command_that_creates_it(folder: Path) -> None:
    config = make_config(folder)
    run = RunDir.of(config)
    shutil.rmtree(run.model("warmup"))
    with pytest.raises(UserError, match="run `plad train --phase warmup` first"):
        pair_jobs(config, run)
    (folder / "run" / "samples" / "student" / "round-0" / "manifest.json").unlink()
    with pytest.raises(UserError, match="student/round-0: not complete yet; run `plad sample` first"):
        pair_jobs(config, run)


def test_the_fingerprint_covers_everything_that_decides_the_pairs_and_nothing_else(folder: Path) -> None:
    def fingerprint(**pairing: Any) -> str:
        config = make_config(folder, **pairing)
        return pair_jobs(config, RunDir.of(config))[0][0].fingerprint

    reward = {"path": str(folder / "run" / "models" / "warmup")}
    scored = {"score": "reward_model", "reward_model": reward}
    assert fingerprint(workers=3, cpus_per_worker=2.0, gpus_per_worker=1.0) == fingerprint()
    assert fingerprint(**scored | {"reward_model": reward | {"batch_size": 2}}) == fingerprint(**scored)
    assert (
        len(
            {
                fingerprint(),
                fingerprint(**scored),
                fingerprint(max_pairs_per_prompt=2),
                fingerprint(length_ratio=(0.5, 2.0)),
                fingerprint(score="none"),
            }
        )
        == 5
    )
    before = fingerprint(**scored), fingerprint()
    (folder / "run" / "models" / "warmup" / "config.json").write_text(
        json.dumps(SHAPE | {"max_position_embeddings": 32})
    )
    assert not {fingerprint(**scored), fingerprint()} & set(before)


# -- the worker


def started(folder: Path, **pairing: Any) -> tuple[Any, PairWorker, RunDir]:
    config = make_config(folder, **pairing)
    run = RunDir.of(config)
    worker = PairWorker(*pickle.loads(pickle.dumps(pair_worker_args(config, run))))
    assert asyncio.run(worker.start()) is None
    return pickle.loads(pickle.dumps(pair_jobs(config, run)[0][0])), worker, run


def test_a_worker_builds_many_concurrent_blocks_and_sends_heartbeats(folder: Path) -> None:
    job, worker, run = started(folder)
    as_block_worker: BlockWorker = worker

    async def work() -> list[BlockResult]:
        results = await asyncio.gather(*(as_block_worker.work(job, block, "a", Hints()) for block in range(5)))
        heartbeat = await worker.heartbeat()
        # The last block holds a prompt beyond the limit.
        assert (heartbeat.finished, heartbeat.in_flight) == (PROMPTS_SAMPLED + 1, 0)
        return list(results)

    results = asyncio.run(work())
    assert all(result.is_first for result in results)
    expected = PairFacts.from_parts([result.part for result in results])
    shutil.rmtree(folder / "run" / "pairs")
    assert build_pairs(make_config(folder), run, Progress()) == expected


def test_a_late_attempt_is_told_that_another_one_was_first(folder: Path) -> None:
    job, worker, _ = started(folder)
    first = asyncio.run(worker.work(job, 0, "a", Hints()))
    late = asyncio.run(worker.work(job, 0, "b", Hints()))
    assert (first.is_first, late.is_first) == (True, False)
    assert late.part == first.part


def test_a_failure_in_a_block_names_the_block_and_the_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "user_scores.py").write_text(
        "class Odd(Exception):\n"
        "    def __init__(self, a, b): super().__init__(f'{a} and {b}')\n"
        "def f(answers): raise Odd(1, 2)\n"
        "def g(answers): return [1]\n"
    )
    monkeypatch.chdir(folder)
    for name, kind, reason in (("f", RunFailed, "raised Odd: 1 and 2"), ("g", UserError, "expected a list of")):
        job, worker, _ = started(folder, score="function", score_function=f"user_scores:{name}")
        with pytest.raises(
            kind, match=rf"pairs/round-0: block 1: pairing.score_function user_scores:{name}: {reason}"
        ) as caught:
            asyncio.run(worker.work(job, 1, "a", Hints()))
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    job, worker, _ = started(folder)
    monkeypatch.setattr("plad_dist.pairing.pairs._table", lambda pairs, round_: 1 / 0)
    with pytest.raises(RunFailed, match="block 0: ZeroDivisionError: division by zero"):
        asyncio.run(worker.work(job, 0, "a", Hints()))
    path = folder / "run" / "samples" / "teacher" / "round-0" / part_name(3)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RunFailed, match=r"block 3: .*part-00003\.arrow: damaged"):
        asyncio.run(worker.work(job, 3, "a", Hints()))
    assert asyncio.run(worker.heartbeat()).in_flight == 0


def test_a_worker_that_cannot_start_stops_the_stage_with_the_reason(folder: Path) -> None:
    config = make_config(folder, score="function", score_function="not_there:f")
    with pytest.raises(UserError, match="No module named 'not_there'"):
        build_pairs(config, RunDir.of(config), Progress())


def test_pairs_depend_on_how_the_texts_of_another_writer_are_learnt(folder: Path) -> None:
    """The samples of two writers may be equal and become other tokens."""

    def pairs_of(rejected: dict[str, Any] | None, **sections: Any) -> tuple[list[str], str | None]:
        raw = make_config(folder).model_dump(mode="json") | sections
        raw["sampling"] |= {"rejected": rejected}
        config = Config.model_validate(raw)
        run = RunDir.of(config)
        return [job.fingerprint for job, _ in pair_jobs(config, run)], build._inputs(config, run)

    path = str(RunDir.of(make_config(folder)).model("warmup"))
    own, other = pairs_of(None)[0], pairs_of({"path": path})[0]
    assert not set(own) & set(other)
    inputs = []
    for reasoning in ("strip", "keep"):
        teachers = {"strong": {"path": path}, "weak": {"path": path, "reasoning": reasoning, "sampling": {"n": 2}}}
        sections = {"teacher": None, "teachers": teachers, "training": {"warmup": {}}}
        inputs.append(pairs_of({"teacher": "weak"}, **sections)[1])
    assert inputs[0] != inputs[1]
