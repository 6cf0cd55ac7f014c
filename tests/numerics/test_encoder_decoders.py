"""Encoder-decoders on several ranks: the same student as on one, however it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from plad_dist.errors import UserError
from plad_dist.training.batches.groups import DataSpec, fit
from plad_dist.training.batches.micro_batch import Group, Layout
from plad_dist.training.batches.packing import collate
from plad_dist.training.model.attention import attention_of
from plad_dist.training.model.policy import Policy, disable_dropout
from tests.numerics.workers import config_with_pairs, losses, make_run, train
from tests.small_families import GROUPS, separate_logps
from tests.tiny import make_random_model

PHASE = "round-0"
SHAPES: dict[str, dict[str, Any]] = {
    "t5": {"d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2},
    "bart": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
        "decoder_attention_heads": 2, "decoder_ffn_dim": 64,
    },
}  # fmt: skip


def config_with_student(folder: Path, family: str, **round_: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    raw = config_with_pairs(folder, **round_)
    make_random_model(folder / "student", 2, model_type=family, **SHAPES[family])
    return raw


@pytest.mark.engine
@pytest.mark.parametrize("family", SHAPES)
def test_two_ranks_train_like_one_with_empty_micro_batches_and_after_a_resume(tmp_path: Path, family: str) -> None:
    """With one group in a step, one of two ranks has an empty micro-batch."""
    all_losses = {}
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        raw = config_with_student(folder, family, max_steps=4, batch_groups=1)
        raw["training"]["gradient_checkpointing"] = workers == 2
        run = make_run(raw)
        if workers == 2:
            train(folder, raw, PHASE, workers, stop=2)
        train(folder, raw, PHASE, workers)
        all_losses[workers] = losses(run, PHASE)
    assert len(all_losses[2]) == 4
    assert all_losses[2] == pytest.approx(all_losses[1], rel=1e-5)
    start, after = (load_file(folder / "model.safetensors") for folder in (folder / "student", run.model(PHASE)))
    assert start.keys() == after.keys()
    unchanged = {name for name in start if torch.equal(start[name], after[name])}
    assert unchanged <= {"final_logits_bias"}, "both stacks learn"


@pytest.mark.engine
def test_adapters_of_both_stacks_are_merged(tmp_path: Path) -> None:
    raw = config_with_student(tmp_path, "t5", max_steps=3, optimizer={"lr": 2e-2})
    raw["training"]["lora"] = {"r": 4, "alpha": 8}
    run = make_run(raw)
    train(tmp_path, raw, PHASE, 2)
    start, merged = load_file(tmp_path / "student/model.safetensors"), load_file(run.model(PHASE) / "model.safetensors")
    changed = {name for name in start if not torch.equal(start[name], merged[name])}
    for part in ("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.v"):
        assert f"{part}.weight" in changed
    assert "shared.weight" not in changed


@pytest.mark.parametrize("family", SHAPES)
def test_an_exported_model_has_the_log_likelihoods_of_the_trainer(tmp_path: Path, family: str) -> None:
    folder = make_random_model(tmp_path / "model", 2, model_type=family, **SHAPES[family])
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float64)
    expected_S = separate_logps(model, GROUPS)
    attention = attention_of(model.config, "tree" if family == "t5" else "sequences", None)
    logps_S = Policy(model, attention)(collate(GROUPS, filler=0, layout=attention.layout))
    torch.testing.assert_close(logps_S.double(), expected_S, rtol=1e-5, atol=0)


@pytest.mark.parametrize("packs_rows", [True, False])
@pytest.mark.parametrize("limit", [7, 20, 40])
def test_a_truncated_group_fits_and_keeps_the_end_of_its_prompt(packs_rows: bool, limit: int) -> None:
    layout = Layout(packs_rows=packs_rows, decoder_start=0)
    group = Group(list(range(10, 30)), [[5] * 9, [6] * 4, [7]])
    spec = DataSpec("pairs", "", context=100, max_group_tokens=limit, layout=layout, over_long="truncate")
    fitted = fit(group, spec)
    assert fitted is not None
    assert layout.places(fitted) <= limit
    assert fitted.prompt[-1] == 29
    whole = collate([fitted], 0, layout)
    assert whole.encoder is not None
    assert whole.input_ids_RT.numel() + whole.encoder.input_ids_RE.numel() == layout.places(fitted)


def test_a_prompt_is_encoded_once_for_all_its_responses() -> None:
    group = Group([5] * 10, [[6] * 3] * 4)
    packed = collate([group], 0, Layout(decoder_start=0))
    assert packed.encoder is not None
    assert (tuple(packed.encoder.input_ids_RE.shape), tuple(packed.input_ids_RT.shape)) == ((1, 10), (1, 12))
    single = collate([group], 0, Layout(packs_rows=False, decoder_start=0))
    assert single.encoder is not None
    assert (tuple(single.encoder.input_ids_RE.shape), tuple(single.input_ids_RT.shape)) == ((1, 10), (4, 3))


@pytest.mark.parametrize("family", ["bart", "m2m_100", "opt"])
def test_no_layer_is_dropped_in_training(family: str) -> None:
    names = ("encoder_layerdrop", "decoder_layerdrop", "layerdrop", "dropout", "attention_dropout")
    config = disable_dropout(AutoConfig.for_model(family, **dict.fromkeys(names, 0.5)))
    assert {getattr(config, name) for name in names} == {0.0}


def test_a_config_without_the_token_that_begins_a_response_is_refused() -> None:
    from transformers import T5Config

    with pytest.raises(UserError, match="decoder_start_token_id"):
        attention_of(T5Config(), "tree", None)


@pytest.mark.engine
def test_an_output_layer_that_only_the_files_untie_is_trained_apart(tmp_path: Path) -> None:
    """transformers ties the output layer of T5 1.1 until it finds another one in the files."""
    raw = config_with_student(tmp_path, "t5", max_steps=2)
    file = tmp_path / "student/model.safetensors"
    weights = load_file(file)
    torch.manual_seed(0)
    weights["lm_head.weight"] = 0.1 * torch.randn_like(weights["shared.weight"])
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "student/config.json").read_text())
    del config["scale_decoder_outputs"]
    (tmp_path / "student/config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    run = make_run(raw)
    train(tmp_path, raw, PHASE, 2, stop=1)
    train(tmp_path, raw, PHASE, 2)
    start = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "student")
    model = AutoModelForSeq2SeqLM.from_pretrained(run.model(PHASE))
    assert not model.config.scale_decoder_outputs
    for name in ("shared", "lm_head"):
        before, after = (getattr(each, name).weight for each in (start, model))
        torch.testing.assert_close(after, before, rtol=0, atol=0.02)
        assert not torch.equal(after, before)
