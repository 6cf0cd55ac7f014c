"""Choice of the engine of a model by its architecture."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from plad_dist.compat.vllm import generating_architectures
from plad_dist.config import Config, Model, RoleSampling
from plad_dist.config_file import parse_config
from plad_dist.errors import UserError
from plad_dist.preflight import check_inputs
from plad_dist.rundir import RunDir
from plad_dist.sampling.engine_arguments import check_engine_args
from plad_dist.sampling.engine_choice import check_chosen_engine, chosen_engine, missing_architecture, start_engine
from plad_dist.sampling.engine_placement import engines_use_gpus
from plad_dist.sampling.responders import fleet_of, student_responder
from plad_dist.sampling.warm import modules_of
from tests.tiny import sampling_config
from tests.tiny_generators import make_generator

T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def described(folder: Path, **config: Any) -> Model:
    """Return the section of a model of which only the config exists."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return Model(path=str(folder))


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, None),
        ({"model_type": "llama"}, None),
        ({"model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"]}, None),  # vLLM has ours
        ({"model_type": "helium", "architectures": ["HeliumForCausalLM"]}, None),  # by the code of transformers
        ({"model_type": "codegen", "architectures": ["CodeGenForCausalLM"]}, "CodeGenForCausalLM"),
        ({"model_type": "codegen"}, "CodeGenForCausalLM"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration"),
        ({"model_type": "t5", "architectures": ["T5WithLMHeadModel"]}, "T5WithLMHeadModel"),
        ({"model_type": "t5"}, "T5ForConditionalGeneration"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "BartForConditionalGeneration"),
        ({"model_type": "t5gemma"}, "T5GemmaForConditionalGeneration"),
        ({"model_type": "codegen", "architectures": ["Own"], "auto_map": {"AutoModelForCausalLM": "own.Own"}}, None),
        ({"model_type": "unheard_of", "architectures": ["Own"]}, None),  # another check reports it
    ],
)  # fmt: skip
def test_transformers_generates_what_vllm_cannot_run(
    tmp_path: Path, config: dict[str, Any], missing: str | None
) -> None:
    model = described(tmp_path / "model", **config)
    assert missing_architecture(model) == missing
    chosen = chosen_engine(model, {"max_num_seqs": 4})
    assert chosen == ({"name": "transformers"} if missing else {}) | {"max_num_seqs": 4}


def test_a_model_from_scratch_is_known_by_its_architecture() -> None:
    template = "{{ messages[0].content }}"
    scratch = {"architecture": T5, "vocab_size": 300}
    assert missing_architecture(Model(scratch=scratch, template=template)) == "T5ForConditionalGeneration"
    scratch["architecture"] = {"model_type": "llama"}
    assert missing_architecture(Model(scratch=scratch, template=template)) is None


def test_the_tables_of_vllm_hold_its_generating_models_alone() -> None:
    architectures = generating_architectures()
    assert {"LlamaForCausalLM", "Gemma3ForConditionalGeneration", "Olmo3ForCausalLM"} <= architectures
    assert not {"BertModel", "T5ForConditionalGeneration", "BartForConditionalGeneration"} & architectures


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"name": "transformers", "tensor_parallel_size": 2}, "tensor_parallel_size: transformers generates by"),
        ({"name": "transformers", "max_num_seqs": 0}, "max_num_seqs: expected a whole number of at least 1, got 0"),
        ({"name": "transformers", "dtype": "half"}, "dtype: expected one of bfloat16, float16, float32, float64, got"),
    ],
)
def test_an_argument_that_transformers_does_not_take_is_refused(engine: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_engine_args(engine, "sampling.student.engine")
    assert str(error.value).startswith(f"sampling.student.engine.{message}")


def test_arguments_of_vllm_for_a_model_that_it_lacks_are_refused(tmp_path: Path) -> None:
    model = described(tmp_path / "model", model_type="t5")
    check_chosen_engine(model, {"max_num_seqs": 8, "dtype": "float32"}, "sampling.student.engine", "student")
    with pytest.raises(UserError, match=r"student\.engine\.kv_cache_memory_bytes: .* vLLM has no T5ForConditional"):
        check_chosen_engine(model, {"kv_cache_memory_bytes": 1}, "sampling.student.engine", "student")
    check_chosen_engine(
        described(tmp_path / "llama", model_type="llama"), {"kv_cache_memory_bytes": 1}, "key", "student"
    )


def run_of(folder: Path, engine: Any) -> tuple[Config, RunDir]:
    raw = sampling_config(folder, 8)
    raw["student"]["path"] = str(make_generator(folder / "t5", "t5"))
    raw["sampling"]["student"] = {"max_tokens": 16, "cpus": 2.0, "engine": engine}
    raw["student"]["max_length"] = 96
    config = parse_config(raw, "test")
    return config, RunDir.of(config)


def test_the_run_says_once_which_model_transformers_generates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, run = run_of(tmp_path, {})
    with caplog.at_level("INFO", logger="plad"):
        check_inputs(config, run)
    assert [record.message for record in caplog.records if "vLLM" in record.message] == [
        "sampling.student: vLLM has no T5ForConditionalGeneration; transformers generates, which is slower"
    ]


def test_the_fleet_of_such_a_model_starts_the_engine_of_transformers(tmp_path: Path) -> None:
    config, run = run_of(tmp_path, {"max_num_seqs": 24})
    responder = student_responder(config, config.student.path or "")
    fleet = fleet_of(config, run, responder, [])
    backend: partial[Any] = fleet.arguments[2]
    assert backend.func is start_engine
    assert backend.args[2] == {"name": "transformers", "max_num_seqs": 24}
    assert fleet.placement.gpus == (1 if engines_use_gpus() else 0)
    assert fleet.window * config.prompts.block_size >= 4 * 24
    assert (fleet.arguments[0], fleet.arguments[4]) == ("transformers-2", ""), "a nursery without vLLM"
    assert not [module for module in modules_of("transformers-2") if "vllm" in module]
    assert [module for module in modules_of("engine-2") if "vllm" in module]


def test_the_engine_is_part_of_what_decides_samples_only_if_the_config_names_it(tmp_path: Path) -> None:
    unnamed, named = RoleSampling(engine={"max_num_seqs": 3}), RoleSampling(engine="transformers")  # type: ignore[arg-type]
    assert unnamed.deciding_engine() == {}
    assert named.engine == {"name": "transformers"}
    assert named.deciding_engine() == {"name": "transformers"}
    config, _ = run_of(tmp_path, {})
    assert student_responder(config, config.student.path or "").identity["engine"] == {}


@pytest.mark.parametrize("engine", ["transformers", None])
def test_a_rotary_embedding_that_depends_on_the_batch_is_refused_for_transformers(
    tmp_path: Path, engine: str | None
) -> None:
    raw = sampling_config(tmp_path, 4)
    teacher = Path(raw["teacher"]["path"]) / "config.json"
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 64}
    teacher.write_text(json.dumps(json.loads(teacher.read_text()) | {"rope_parameters": rope}))
    raw["sampling"]["teacher"] = raw["sampling"]["teacher"] | {"engine": engine or {}}
    config = parse_config(raw, "test")
    if engine is None:
        check_inputs(config, RunDir.of(config))
        return
    with pytest.raises(UserError, match=r"teacher: the rotary embedding \(dynamic\).*set teacher.max_length"):
        check_inputs(config, RunDir.of(config))


def test_an_encoder_decoder_without_a_context_length_needs_one_before_anything_starts(tmp_path: Path) -> None:
    raw = sampling_config(tmp_path, 4)
    raw["sampling"] = {}
    raw["student"] |= {"path": str(make_generator(tmp_path / "t5", "t5"))}
    config = parse_config(raw, "test")
    with pytest.raises(UserError, match=r"student\.max_length: is required"):
        check_inputs(config, RunDir.of(config))
    raw["student"]["max_length"] = 64
    config = parse_config(raw, "test")
    check_inputs(config, RunDir.of(config))
