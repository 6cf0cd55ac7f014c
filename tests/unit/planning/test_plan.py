"""The planner: sizes without weights, memory as it was measured, remedies that really help, and a refusal before a device is held."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plad_dist.cluster import refuse_unfit
from plad_dist.config import Config, Model, Optimizer, ScratchModel, Training
from plad_dist.config_file import load_config, parse_config
from plad_dist.data.models import load_model_config
from plad_dist.data.templates import load_tokenizer
from plad_dist.devices import GIB, GPUS, gpu_of
from plad_dist.errors import UserError
from plad_dist.holders import Holder
from plad_dist.planning.fit import check_fits, hardware_of, smallest
from plad_dist.planning.hardware import Hardware, hardware_of_nodes
from plad_dist.planning.memory import training_memory
from plad_dist.planning.needs import gpu_needs
from plad_dist.planning.plan import plan_run
from plad_dist.planning.sizes import ModelSize, size_of
from plad_dist.planning.workload import workload_of
from plad_dist.study import load_runs
from tests.conftest import in_this_process, tiny_config

EXAMPLES = sorted(Path("examples").glob("*.yaml"))
H100 = GPUS["h100-80g"]


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int = 32_000) -> ModelSize:
    architecture = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return size_of(
        Model(scratch=ScratchModel(architecture=architecture, vocab_size=vocabulary), template="{{ messages }}")
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-2-13b-hf", 13_015_864_320),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-72B-Instruct", 72_706_203_648),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("EleutherAI/gpt-neo-125m", 125_198_592),
    ],
)
def test_parameters_are_counted_without_weights(name: str, parameters: int) -> None:
    assert size_of(Model(path=name)).parameters == parameters


@pytest.mark.parametrize(
    ("size", "recomputed", "measured_gb"),
    [  # on one H200, micro-batches of 16,384 tokens: docs/benchmarks.md
        ((2048, 5632, 22, 32, 4), True, 28.1),
        ((2048, 5632, 22, 32, 4), False, 55.0),
        ((4096, 11008, 32, 32, 32), True, 130.7),
    ],
)
def test_gpu_memory_is_within_a_tenth_of_what_was_measured(
    size: tuple[int, int, int, int, int], recomputed: bool, measured_gb: float
) -> None:
    training = Training(micro_batch_tokens=16_384, gradient_checkpointing=recomputed)
    found = training_memory(llama(*size), training, Optimizer(), 1, "gpu")
    allocated = found.device - found.parts["CUDA and NCCL"]  # which PyTorch's own count leaves out
    assert abs(allocated / 1e9 - measured_gb) <= 0.1 * measured_gb


@given(workers=st.integers(1, 512), tokens=st.sampled_from([1024, 4096, 16_384]), recomputed=st.booleans())
@settings(max_examples=50)
def test_more_workers_and_shorter_micro_batches_never_take_more(workers: int, tokens: int, recomputed: bool) -> None:
    size = llama(1024, 2816, 8, 16, 4)

    def takes(workers: int, tokens: int) -> float:
        training = Training(micro_batch_tokens=tokens, gradient_checkpointing=recomputed)
        return training_memory(size, training, Optimizer(), workers, "gpu").device

    assert takes(workers + 1, tokens) <= takes(workers, tokens)
    assert takes(workers, tokens // 2) <= takes(workers, tokens)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_fits_the_hardware_that_it_names(path: Path) -> None:
    for _, config in load_runs(str(path), []):
        hardware = hardware_of(None, None, 8, config)
        plan = plan_run(config, hardware, price=2.0)
        assert plan["fits"], plan["problems"]
        json.dumps(plan, allow_nan=False)


def seventy_to_seven(**training: Any) -> Config:
    config = load_config("examples/qwen-72b-to-7b.yaml")
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


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
    config, hardware = seventy_to_seven(**training), Hardware(H100, None, 8, None)
    problems = check_fits(config, hardware)
    assert problems
    for problem in problems:
        assert problem.remedies
        for remedy in problem.remedies:
            changes = {}
            for setting in remedy.removesuffix(" or more").split():
                key, _, value = setting.partition("=")
                changes[key.removeprefix("training.")] = json.loads(value) if value[0] in "0123456789tf" else value
            changed = seventy_to_seven(**{**training, **changes})
            assert check_fits(changed, hardware) == [], remedy


def test_a_teacher_that_is_too_large_for_its_gpus_gets_the_parallelism_that_holds_it() -> None:
    config = load_config("examples/qwen-72b-to-7b.yaml", ["sampling.teacher.engine={tensor_parallel_size: 1}"])
    problem, *others = check_fits(config, Hardware(H100, None, 8, None))
    assert not others
    assert problem.what.startswith("teacher: an engine of Qwen/Qwen2.5-72B-Instruct (72.7B) takes")
    assert problem.remedies[0] == "sampling.teacher.engine.tensor_parallel_size=2"


def test_gpus_are_those_that_the_stages_need() -> None:
    config = load_config(
        "examples/qwen-72b-to-7b.yaml", ["sampling.teacher.replicas=4", "sampling.student.replicas=16"]
    )
    assert gpu_needs(config) == (8, 32)  # 4 x 4 of the teacher beside 16 of the student; the trainer's fewest and most
    problems = check_fits(config, Hardware(H100, 1, 4, None))
    assert "the config needs 8 GPUs at least, the cluster has 1 x 4" in [problem.what for problem in problems]


def test_what_the_run_has_measured_and_what_is_given_goes_before_assumptions(tmp_path: Path) -> None:
    config = parse_config(tiny_config(tmp_path), "test")
    hardware = Hardware(H100, 1, 8, None)
    assumed = plan_run(config, hardware)
    assert assumed["time"] is None
    assert "prompts: unknown: give --prompts" in assumed["assumptions"]
    given = plan_run(
        config, hardware, prompts=1_000_000, prompt_tokens=100, response_tokens=50,
        rates={"teacher": 1000.0, "student": 2000.0, "train": 500.0}, price=3.0,
    )  # fmt: skip
    sampled = given["time"]["stages"]["sample teacher"]
    tokens = 50 * (1_000_000 + 40 * 3)  # held-out prompts: greedy, sampled, and once for pairs
    assert sampled["tokens"] == tokens
    assert sampled["hours"] == pytest.approx(tokens / 1000 / 3600, rel=1e-3)  # one engine of one GPU
    assert given["cost"]["devices"] == pytest.approx(3.0 * given["time"]["device_hours"])


def test_an_endpoint_costs_what_its_prices_say() -> None:
    config = load_config("examples/endpoint-to-7b.yaml")
    plan = plan_run(config, Hardware(H100, None, 8, None), prompt_tokens=200, response_tokens=300)
    once = (200 * 2.5 + 300 * 10.0) / 1e6
    heldout = 300 * 3  # greedy, sampled, and once for pairs, however many are sampled for training
    assert plan["cost"]["endpoint teacher"] == pytest.approx((20_000 + heldout) * once, rel=1e-3)
    assert plan["time"]["stages"]["sample teacher"]["tokens"] == (20_000 + heldout) * 300
    config = load_config("examples/endpoint-to-7b.yaml", ["sampling.teacher.n=4"])
    plan = plan_run(config, Hardware(H100, None, 8, None), prompt_tokens=200, response_tokens=300)
    assert plan["cost"]["endpoint teacher"] == pytest.approx((4 * 20_000 + heldout) * once, rel=1e-3)
    unlimited = [f"teacher.endpoint.{key}=null" for key in ("requests_per_minute", "tokens_per_minute")]
    plan = plan_run(load_config("examples/endpoint-to-7b.yaml", unlimited), Hardware(H100, None, 8, None))
    assert plan["time"]["stages"]["sample teacher"]["hours"] is None
    assert "sample teacher: nothing says how fast the server is" in " ".join(plan["assumptions"])


def test_references_are_learnt_of_all_prompts_and_pairs_of_those_that_are_sampled(tmp_path: Path) -> None:
    config = parse_config(tiny_config(tmp_path) | {"sampling": {"limit": 1000}}, "test")
    given = {"prompts": 8000, "prompt_tokens": 100, "response_tokens": 50}
    plan = plan_run(config, Hardware(H100, 1, 8, None), **given)
    assert (plan["work"]["prompts"], plan["work"]["sampled_prompts"]) == (8000, 1000)
    training, stages = config.training, plan["time"]["stages"]
    assert training.warmup is not None
    assert training.warmup.data == "references"
    assert not training.warmup.max_steps
    assert stages["train warmup"]["tokens"] == training.warmup.epochs * 8000 * (100 + 50)
    group = 100 + 50 * (config.sampling.teacher.n + config.sampling.student.n)
    assert stages["train round-0"]["tokens"] == training.round.epochs * 1000 * group
    assert stages["train seqkd"]["tokens"] == stages["train round-0"]["tokens"]  # of equal compute


@pytest.mark.parametrize(
    ("pairing", "responses"), [({"combine": "one"}, 2), ({"combine": "all", "max_pairs_per_prompt": 3}, 6), ({}, 8)]
)
def test_only_the_responses_that_pairs_keep_are_trained_on(
    tmp_path: Path, pairing: dict[str, Any], responses: int
) -> None:
    raw = tiny_config(tmp_path) | {"sampling": {"teacher": {"n": 8}, "student": {"n": 8}}, "pairing": pairing}
    config = parse_config(raw, "test")
    work = workload_of(config, prompts=1000, prompt_tokens=100, response_tokens=50)
    assert work.group_tokens(config) == 100 + 50 * responses


def test_a_warm_up_by_the_teacher_learns_all_of_its_responses(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path) | {"sampling": {"limit": 500, "teacher": {"n": 4}}}
    raw["training"]["warmup"] = {"data": "teacher", "epochs": 2.0}
    work = workload_of(parse_config(raw, "test"), prompts=1000, prompt_tokens=100, response_tokens=50)
    assert work.trained_tokens(parse_config(raw, "test"), "warmup") == 2 * 500 * 4 * 150


def test_an_endpoint_that_would_cost_more_than_its_cap_is_told_of() -> None:
    plan = plan_run(
        load_config("examples/endpoint-to-7b.yaml", ["teacher.endpoint.max_spend=50"]), Hardware(H100, None, 8, None)
    )
    (problem,) = plan["problems"]
    assert problem["what"].startswith("teacher.endpoint.max_spend: 50.00: its answers cost about")
    assert not plan["fits"]


def test_no_more_is_held_out_than_the_data_set_has() -> None:
    config = load_config("examples/endpoint-to-7b.yaml")
    assert config.prompts.heldout is None
    assert workload_of(config, prompts=1000).heldout == round(1000 * config.prompts.heldout_fraction)
    assert workload_of(config, prompts=1_000_000).heldout == config.evaluation.limit


def test_what_does_not_fit_has_no_hours_and_no_cost() -> None:
    plan = plan_run(load_config("examples/qwen-72b-to-7b.yaml"), Hardware(GPUS["l4-24g"], None, 8, None), price=2.5)
    assert (plan["fits"], plan["time"], plan["cost"]) == (False, None, None)


def test_workers_beyond_the_groups_of_a_batch_make_nothing_faster() -> None:
    hours = [
        plan_run(
            load_config("examples/tldr-llama2-13b-to-7b.yaml", [f"training.num_workers={count}"]),
            Hardware(H100, None, 8, None),
        )
        for count in (64, 128)
    ]
    groups = load_config("examples/tldr-llama2-13b-to-7b.yaml").training.round.batch_groups
    assert groups <= 64
    assert len({plan["time"]["stages"]["train round-0"]["hours"] for plan in hours}) == 1


def test_servers_answer_while_engines_sample() -> None:
    config = load_config("examples/endpoint-to-7b.yaml", ["teacher.endpoint.requests_per_minute=1"])
    time = plan_run(config, Hardware(H100, None, 8, None))["time"]
    stages = {name: stage["hours"] for name, stage in time["stages"].items()}
    assert stages["sample teacher"] > stages["sample student"] > 0
    training = sum(hours for name, hours in stages.items() if name.startswith("train"))
    assert time["hours"] == pytest.approx(stages["sample teacher"] + training, abs=0.02)


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 1024}, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}, 32_768),
        ({"rope_type": "linear", "factor": 2.0}, 16_384),
        (None, 8192),
    ],
)  # fmt: skip
def test_positions_are_counted_as_vllm_does_and_the_cache_holds_the_models_own(
    tmp_path: Path, rope: dict[str, Any] | None, positions: int
) -> None:
    shape = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100,
             "intermediate_size": 64, "max_position_embeddings": 8192, "rope_theta": 10_000.0}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape | ({"rope_scaling": rope} if rope else {})))
    size = size_of(Model(path=str(tmp_path)))
    assert (size.positions, size.context) == (positions, 8192)


@pytest.mark.parametrize(("longest", "offered"), [(1500, {8192, 4096, 2048}), (3000, {8192, 4096}), (9000, set())])
def test_micro_batches_that_hold_no_group_are_no_remedy(longest: int, offered: set[int]) -> None:
    changes = {
        "num_workers": 8,
        "gradient_checkpointing": False,
        "micro_batch_tokens": 16_384,
        "max_group_tokens": longest,
    }
    config = seventy_to_seven(**changes)
    named = {
        int(found[1])
        for problem in check_fits(config, Hardware(H100, None, 8, None))
        for remedy in problem.remedies
        if (found := re.search(r"micro_batch_tokens=(\d+)", remedy))
    }
    assert named <= offered
    assert bool(named) == bool(offered)


@pytest.mark.parametrize("fewest", [1, 3])
@pytest.mark.parametrize("enough", [1, 3, 9, 64, 1000, 4096])
def test_a_remedy_names_the_fewest_workers_that_fit(fewest: int, enough: int) -> None:
    assert smallest(lambda workers: workers >= enough, fewest) == max(fewest, enough)


def test_no_number_of_workers_is_named_where_none_fits() -> None:
    assert smallest(lambda workers: False) is None


@pytest.mark.parametrize(
    ("override", "what"),
    [
        (
            "sampling.teacher.engine.tensor_parallel_size=3",
            "sampling.teacher.engine.tensor_parallel_size: 3: does not divide the 40 heads of meta-llama/Llama-2-13b-hf",
        ),
        ("student.max_length=100000", "student.max_length: 100,000: meta-llama/Llama-2-7b-hf has 4,096 positions"),
    ],
)
def test_what_an_engine_would_refuse_is_said_before_it_starts(override: str, what: str) -> None:
    config = load_config("examples/tldr-llama2-13b-to-7b.yaml", [override])
    assert [problem.what for problem in check_fits(config, Hardware(H100, 1, 8, None))] == [what]


def test_workers_that_share_a_node_are_told_of_the_whole() -> None:
    config = load_config("examples/tldr-llama2-13b-to-7b.yaml", ["training.num_workers=4"])
    problems = check_fits(config, Hardware(None, 1, 0, 64.0 * GIB))
    assert any("(4 share a node of 64.0 GiB)" in problem.what for problem in problems)


def test_a_config_without_end_is_refused_at_once(tmp_path: Path) -> None:
    architecture = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 100_000, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(architecture | {"vocab_size": 100, "intermediate_size": 64}))
    with pytest.raises(UserError, match="num_hidden_layers: 100,000, expected at most 1,000"):
        size_of(Model(path=str(tmp_path)))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged for the user."""
    monkeypatch.setattr(logging.getLogger("plad"), "propagate", True)
    caplog.set_level(logging.INFO, logger="plad")
    return caplog


def nodes(*kinds: str, gpus: float = 8.0) -> list[dict[str, float]]:
    """Resources of a head and of nodes with GPUs, as Ray has them."""
    head = {"CPU": 8.0, "memory": 16.0 * GIB}
    return [
        head,
        *({"CPU": 64.0, "memory": 500.0 * GIB, "GPU": gpus, f"accelerator_type:{kind}": 1.0} for kind in kinds),
    ]


def test_a_run_that_cannot_fit_is_refused_unless_told_otherwise(said: pytest.LogCaptureFixture) -> None:
    hardware = hardware_of_nodes(nodes("H100"))
    assert hardware is not None
    assert hardware.gpu == H100
    with pytest.raises(
        UserError, match=r"does not fit:\n  training of Qwen/Qwen2.5-7B-Instruct(.|\n)*cluster.unfit=warn"
    ):
        refuse_unfit(seventy_to_seven(num_workers=1), hardware)
    config = seventy_to_seven(num_workers=1)
    warned = config.model_copy(update={"cluster": config.cluster.model_copy(update={"unfit": "warn"})})
    refuse_unfit(warned, hardware)
    assert "may not fit: training of" in said.text
    refuse_unfit(seventy_to_seven(), hardware)


def test_what_is_done_already_is_not_held_against_a_run() -> None:
    hardware = hardware_of_nodes(nodes("L4", gpus=1.0))
    with pytest.raises(UserError, match="does not fit"):
        refuse_unfit(seventy_to_seven(), hardware)
    refuse_unfit(seventy_to_seven(), hardware, [])
    refuse_unfit(seventy_to_seven(), hardware, [Holder("judge")])


def test_an_elastic_group_is_refused_only_where_its_most_workers_do_not_fit_either(
    said: pytest.LogCaptureFixture,
) -> None:
    elastic = seventy_to_seven(num_workers=(1, 16), deepspeed="zero3")
    (problem,) = check_fits(elastic, Hardware(H100, None, 8, None), [Holder("train", "round-0")])
    assert not problem.always
    refuse_unfit(elastic, hardware_of_nodes(nodes("H100", "H100")))
    assert "may not fit: training of" in said.text


@pytest.mark.parametrize("kinds", [("Sunway",), ("H100-MIG-1g",), ("L4", "H100")])
def test_nothing_is_refused_that_an_unknown_or_a_larger_node_may_hold(kinds: tuple[str, ...]) -> None:
    hardware = hardware_of_nodes(nodes(*kinds))
    assert hardware is None or hardware.gpu == H100
    refuse_unfit(seventy_to_seven(), hardware)


def test_a_cluster_that_has_no_gpu_yet_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plad_dist.planning.hardware.engines_use_gpus", lambda: True)
    assert hardware_of_nodes(nodes()) is None


def test_a_model_that_cannot_be_sized_stops_no_run(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 100}))
    config = load_config("examples/qwen-72b-to-7b.yaml", [f"teacher.path={tmp_path}"])
    with pytest.raises(UserError, match="cannot be sized"):
        check_fits(config, Hardware(H100, 1, 8, None))
    refuse_unfit(config, hardware_of_nodes(nodes("H100")))
    assert "not planned" in said.text


def test_a_model_config_with_bad_values_is_named_where_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "abc"}))
    for load in (load_model_config, load_tokenizer):
        with pytest.raises(UserError, match=f"{tmp_path}: .*hidden_size"):
            load(str(tmp_path), Model(path=str(tmp_path)))


def small_llama(folder: Path, **more: Any) -> Path:
    """The config of a 7B Llama in a folder, without weights."""
    shape = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32_000}  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 131_072} | more))
    return folder


def teacher_problems(path: Path, *overrides: str) -> list[str]:
    arguments = [f"teacher.path={path}", "sampling.teacher.engine={tensor_parallel_size: 1}", "teacher.max_length=null"]
    config = load_config("examples/qwen-72b-to-7b.yaml", [*arguments, "prompts.max_tokens=null", *overrides])
    return [
        problem.what
        for problem in check_fits(config, Hardware(GPUS["l4-24g"], None, 8, None), [Holder("sample", "teacher")])
    ]


def test_quantized_models_and_shorter_contexts_are_planned_as_they_are(tmp_path: Path) -> None:
    plain = small_llama(tmp_path / "plain")
    assert teacher_problems(plain)
    assert not teacher_problems(plain, "sampling.teacher.engine={max_model_len: 4096}")
    awq = small_llama(
        tmp_path / "awq", max_position_embeddings=16_384, quantization_config={"quant_method": "awq", "bits": 4}
    )
    assert not teacher_problems(awq)
    assert not teacher_problems(awq, "sampling.teacher.engine={max_num_seqs: null, kv_cache_memory_bytes: null}")


def test_offloading_is_held_against_the_memory_of_the_node() -> None:
    offloaded = seventy_to_seven(num_workers=1, deepspeed="zero3_offload")
    assert not check_fits(offloaded, Hardware(H100, None, 8, 512 * GIB), [Holder("train", "round-0")])
    (problem,) = check_fits(offloaded, Hardware(H100, None, 8, 64 * GIB), [Holder("train", "round-0")])
    assert "GiB of a node's memory with 1 worker on it, 64.0 GiB are there" in problem.what


def test_deepspeed_values_that_are_auto_are_its_own(tmp_path: Path) -> None:
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "sub_group_size": "auto"}
    (tmp_path / "auto.json").write_text(json.dumps({"zero_optimization": zero}))
    assert not check_fits(seventy_to_seven(deepspeed=str(tmp_path / "auto.json")), Hardware(H100, None, 8, None))


def test_workers_on_one_node_share_its_memory(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path)
    raw["training"]["num_workers"] = 64
    config = parse_config(raw, "test")
    large, small = {"CPU": 64.0, "memory": 16.0 * GIB}, {"CPU": 4.0, "memory": 16.0 * GIB}
    assert check_fits(config, hardware_of_nodes([large] * 16))  # Ray Train packs them
    assert not check_fits(config, hardware_of_nodes([small] * 16))


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80g"), ("NVIDIA H200", "h200-141g"), ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100-PCIE-40GB", "a100-40g"), ("NVIDIA L40S", "l40s-48g"), ("NVIDIA L4", "l4-24g"), ("NVIDIA A10G", "a10g-24g"),
        ("A100-80G", "a100-80g"), ("A100", "a100-80g"), ("A100-40G", "a100-40g"), ("H20", "h20-96g"), ("NVIDIA L40", "l40-48g"),
    ],
)  # fmt: skip
def test_gpus_are_known_by_the_names_that_drivers_and_ray_give_them(reported: str, name: str) -> None:
    found = gpu_of(reported)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    "reported", ["NVIDIA GH200 480GB", "NVIDIA RTX A1000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "TPU-V4"]
)
def test_a_gpu_that_is_not_known_is_not_taken_for_another(reported: str) -> None:
    assert gpu_of(reported) is None


def test_the_command_says_what_does_not_fit_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(*arguments: str) -> tuple[int, str, str]:
        return in_this_process(monkeypatch, capsys, "plan", *arguments)

    code, said, told = plan("examples/qwen-72b-to-7b.yaml", "--gpu", "l4-24g", "training.num_workers=8")
    assert code == 1
    assert "Does not fit: training of Qwen/Qwen2.5-7B-Instruct (7.6B)" in said
    assert "Traceback" not in told
    code, said, _ = plan("examples/ablation.yaml", "--json")
    assert code == 0
    assert set(json.loads(said)["variants"]) >= {"rank", "dpo"}
    assert plan("examples/quickstart.yaml", "--price", "inf")[0] == 2
    code, _, told = plan("examples/quickstart.yaml", "--gpu", "h900")
    assert (code, "--gpu 'h900': not known; expected one of" in told) == (2, True)
