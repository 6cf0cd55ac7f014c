"""Configs that do not fit are found, with remedies that make them fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from plad_dist.config_file import load_config, parse_config
from plad_dist.devices import GIB, GPUS
from plad_dist.holders import Holder
from plad_dist.planning.engines import gpu_needs
from plad_dist.planning.fit import check_fits
from plad_dist.planning.hardware import Hardware, hardware_of_nodes
from plad_dist.planning.training_fit import smallest_group
from tests.conftest import tiny_config
from tests.unit.planning.configs import H100, H100_NODES, qwen_72b_to_7b


@pytest.mark.parametrize(
    "training",
    [
        {"num_workers": 8, "gradient_checkpointing": False},
        {"num_workers": 2},
        {"num_workers": 1, "deepspeed": "zero3"},
        {"num_workers": (1, 32), "deepspeed": "zero3", "gradient_checkpointing": False},
    ],
)
def test_every_remedy_makes_the_config_fit(training: dict[str, Any]) -> None:
    problems = check_fits(qwen_72b_to_7b(**training), H100_NODES)
    assert problems
    for problem in problems:
        assert problem.remedies
        for remedy in problem.remedies:
            changes = {}
            for setting in remedy.removesuffix(" or more").split():
                key, _, value = setting.partition("=")
                changes[key.removeprefix("training.")] = json.loads(value) if value[0] in "0123456789tf" else value
            changed = qwen_72b_to_7b(**{**training, **changes})
            assert check_fits(changed, H100_NODES) == [], remedy


@pytest.mark.parametrize(("longest", "offered"), [(1500, {8192, 4096, 2048}), (3000, {8192, 4096}), (9000, set())])
def test_micro_batches_that_hold_no_group_are_no_remedy(longest: int, offered: set[int]) -> None:
    config = qwen_72b_to_7b(
        num_workers=8, gradient_checkpointing=False, micro_batch_tokens=16_384, max_group_tokens=longest
    )
    named = {
        int(match[1])
        for problem in check_fits(config, H100_NODES)
        for remedy in problem.remedies
        if (match := re.search(r"micro_batch_tokens=(\d+)", remedy))
    }
    assert named <= offered
    assert bool(named) == bool(offered)


@pytest.mark.parametrize("fewest", [1, 3])
@pytest.mark.parametrize("enough", [1, 3, 9, 64, 1000, 4096])
def test_a_remedy_names_the_fewest_workers_that_fit(fewest: int, enough: int) -> None:
    assert smallest_group(lambda workers: workers >= enough, fewest) == max(fewest, enough)


def test_no_number_of_workers_is_named_if_none_fits() -> None:
    assert smallest_group(lambda workers: False) is None


def test_too_few_gpus_for_a_stage_are_a_problem() -> None:
    overrides = ["sampling.teacher.replicas=4", "sampling.student.replicas=16"]
    config = load_config("examples/qwen-72b-to-7b.yaml", overrides)
    # Engines of 4 GPUs for the teacher beside 16 of one GPU for the student; the trainer's smallest
    # and largest group.
    assert gpu_needs(config) == (8, 32)
    problems = check_fits(config, Hardware(H100, 1, 4, None))
    assert "the config needs 8 GPUs at least, the cluster has 1 x 4" in [problem.description for problem in problems]


def test_workers_that_share_a_node_are_given_its_whole_memory_in_the_message() -> None:
    config = load_config("examples/tldr-llama2-13b-to-7b.yaml", ["training.num_workers=4"])
    problems = check_fits(config, Hardware(None, 1, 0, 64.0 * GIB))
    assert any("(4 share a node of 64.0 GiB)" in problem.description for problem in problems)


def test_workers_on_one_node_share_its_memory(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path)
    raw["training"]["num_workers"] = 64
    config = parse_config(raw, "test")
    large, small = {"CPU": 64.0, "memory": 16.0 * GIB}, {"CPU": 4.0, "memory": 16.0 * GIB}
    assert check_fits(config, hardware_of_nodes([large] * 16))  # Ray Train packs workers onto few nodes
    assert not check_fits(config, hardware_of_nodes([small] * 16))


def test_offloaded_states_must_fit_the_memory_of_the_node() -> None:
    offloaded = qwen_72b_to_7b(num_workers=1, deepspeed="zero3_offload")
    assert not check_fits(offloaded, Hardware(H100, None, 8, 512 * GIB), [Holder("train", "round-0")])
    (problem,) = check_fits(offloaded, Hardware(H100, None, 8, 64 * GIB), [Holder("train", "round-0")])
    assert "GiB of a node's memory with 1 worker on it, 64.0 GiB are available" in problem.description


def test_auto_in_a_deepspeed_config_means_deepspeeds_default(tmp_path: Path) -> None:
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "sub_group_size": "auto"}
    (tmp_path / "auto.json").write_text(json.dumps({"zero_optimization": zero}))
    assert not check_fits(qwen_72b_to_7b(deepspeed=str(tmp_path / "auto.json")), H100_NODES)


# -- engines


def test_a_teacher_that_is_too_large_for_its_gpus_gets_the_parallelism_that_holds_it() -> None:
    config = load_config("examples/qwen-72b-to-7b.yaml", ["sampling.teacher.engine={tensor_parallel_size: 1}"])
    (problem,) = check_fits(config, H100_NODES)
    assert problem.description.startswith("teacher: an engine of Qwen/Qwen2.5-72B-Instruct (72.7B) takes")
    assert problem.remedies[0] == "sampling.teacher.engine.tensor_parallel_size=2"


@pytest.mark.parametrize(
    ("override", "description"),
    [
        (
            "sampling.teacher.engine.tensor_parallel_size=3",
            "sampling.teacher.engine.tensor_parallel_size: 3: does not divide the 40 heads of "
            "meta-llama/Llama-2-13b-hf",
        ),
        ("student.max_length=100000", "student.max_length: 100,000: meta-llama/Llama-2-7b-hf has 4,096 positions"),
    ],
)
def test_arguments_that_an_engine_would_refuse_are_reported_before_it_starts(override: str, description: str) -> None:
    config = load_config("examples/tldr-llama2-13b-to-7b.yaml", [override])
    assert [problem.description for problem in check_fits(config, Hardware(H100, 1, 8, None))] == [description]


def llama_7b_config(folder: Path, **settings: Any) -> Path:
    """Write the config of a 7B Llama model without weights, and return its folder."""
    architecture = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32_000, "max_position_embeddings": 131_072,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(architecture | settings))
    return folder


def teacher_problems(path: Path, *overrides: str) -> list[str]:
    """Return the problems of sampling a teacher on an L4."""
    arguments = [f"teacher.path={path}", "sampling.teacher.engine={tensor_parallel_size: 1}", "teacher.max_length=null"]
    config = load_config("examples/qwen-72b-to-7b.yaml", [*arguments, "prompts.max_tokens=null", *overrides])
    return [
        problem.description
        for problem in check_fits(config, Hardware(GPUS["l4-24g"], None, 8, None), [Holder("sample", "teacher")])
    ]


def test_quantized_weights_and_shorter_contexts_save_memory(tmp_path: Path) -> None:
    plain = llama_7b_config(tmp_path / "plain")
    assert teacher_problems(plain)
    assert not teacher_problems(plain, "sampling.teacher.engine={max_model_len: 4096}")
    quantization = {"quant_method": "awq", "bits": 4}
    awq = llama_7b_config(tmp_path / "awq", max_position_embeddings=16_384, quantization_config=quantization)
    assert not teacher_problems(awq)
    assert not teacher_problems(awq, "sampling.teacher.engine={max_num_seqs: null, kv_cache_memory_bytes: null}")
