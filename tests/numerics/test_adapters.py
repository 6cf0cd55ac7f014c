"""Adapters of stacked experts: their gradients, their training on ranks, and the merged model."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from plad_dist.config import Lora, Loss, Model, Optimizer, Training
from plad_dist.errors import UserError
from plad_dist.planning.sizes import size_of
from plad_dist.planning.training_memory import training_memory
from plad_dist.preflight import check_adapters
from plad_dist.training.batches.packing import collate
from plad_dist.training.checkpoints.export import _save_adapter
from plad_dist.training.checkpoints.snapshot import write_snapshot
from plad_dist.training.losses import group_losses
from plad_dist.training.model.adapters import (
    adapted_layers,
    adapted_parameters,
    add_adapters,
    low_rank_matrices,
    unadapted_name,
)
from plad_dist.training.model.attention import attention_of
from plad_dist.training.model.experts import route_in_float32
from plad_dist.training.model.families import row_support
from plad_dist.training.model.policy import Policy
from plad_dist.training.plan import _keys_of_all_phases
from tests.numerics.crash import store
from tests.numerics.workers import config_with_pairs, job_of, losses, make_run, train
from tests.small_families import GROUPS, config_of, make, separate_logps
from tests.tiny import make_random_model

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
LORA = Lora(r=3, alpha=6.0, target_parameters=EXPERTS)
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 32, "num_hidden_layers": 2,
    },
    "gpt_oss": {
        "num_local_experts": 8, "num_experts_per_tok": 2, "layer_types": ["sliding_attention"] * 2,
        "sliding_window": 8, "head_dim": 32, "num_hidden_layers": 2,
    },
}  # fmt: skip


def delta(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """Return what an adapter adds to a weight, expert by expert as peft stores its matrices."""
    scale = LORA.alpha / LORA.r
    if len(shape) == 2:
        return scale * b @ a
    by_expert = [
        scale * b.view(len(b), LORA.r, -1)[:, :, expert] @ a.view(-1, LORA.r, a.shape[1])[expert]
        for expert in range(shape[0])
    ]
    stacked = torch.stack(by_expert)
    return stacked if stacked.shape == shape else stacked.mT


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4", "gemma4, mixture"])
def test_gradients_of_adapters_are_those_of_merged_weights_in_float64(family: str) -> None:
    config = config_of(family)
    attention = attention_of(config, row_support(config, remote=False), None)
    model, exact = make(family, attention.implementation), make(family, None, torch.float64)
    add_adapters(model, LORA, seed=1)
    route_in_float32(model)
    weights, changed, pairs = dict(exact.named_parameters()), {}, []
    for name, module in adapted_parameters(model).items():
        torch.nn.init.normal_(low_rank_matrices(module)[1], std=0.1)  # they start at zero
        matrices = [matrix.detach().double().requires_grad_() for matrix in low_rank_matrices(module)]
        original = unadapted_name(name)
        changed[original] = weights[original].detach() + delta(*matrices, weights[original].shape)
        pairs += [
            (f"{original}, {matrix}", *both)
            for matrix, *both in zip("AB", low_rank_matrices(module), matrices, strict=True)
        ]
    assert sum(len(weight.shape) == 3 for weight in changed.values()) in (2, 4), "one or two layers of experts"
    loss = Loss(name="rank", mle_weight=0.5)
    batch = collate(GROUPS, filler=0, layout=attention.layout)

    class Merged:
        """The exact model with merged weights."""

        config = exact.config

        def __call__(self, **inputs: Any) -> Any:
            return torch.func.functional_call(exact, changed, kwargs=inputs)

    for logps_S in (separate_logps(Merged(), GROUPS).double(), Policy(model, attention)(batch)):
        group_losses(loss, batch.pairs, logps_S, batch.lengths_S, batch.initial_logps_S).sum().backward()

    largest = max(expected.grad.abs().max().item() for _, _, expected in pairs)
    for name, actual, expected in pairs:
        scale = max(expected.grad.abs().max().item(), 1e-3 * largest)
        torch.testing.assert_close(actual.grad.double(), expected.grad, rtol=0, atol=1e-3 * scale, msg=name)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lora_" not in name)


def prepared(folder: Path, family: str, **training: Any) -> tuple[dict[str, Any], Any]:
    """Return the config and the run of a mixture with adapters, one group a step."""
    folder.mkdir()
    raw = config_with_pairs(folder, max_steps=4, batch_groups=1, optimizer={"lr": 2e-2})
    lora = {"r": LORA.r, "alpha": LORA.alpha, "target_parameters": EXPERTS, "save_adapter": True}
    raw["training"] |= {"lora": lora, **training}
    make_random_model(folder / "student", 2, model_type=family, num_key_value_heads=1, **MIXTURES[family])
    return raw, make_run(raw)


@pytest.mark.engine
@pytest.mark.parametrize("family", MIXTURES)
def test_adapted_experts_train_on_two_ranks_resume_and_are_merged(tmp_path: Path, family: str) -> None:
    """In every step a rank has no groups. The model, the snapshot and the adapter agree."""
    all_losses = []
    for workers, recomputes in ((1, False), (2, True), (2, False)):
        folder = tmp_path / f"{workers}-{recomputes}"
        raw, run = prepared(folder, family, gradient_checkpointing=recomputes)
        if not recomputes:
            train(folder, raw, "round-0", workers, stop=2)
        train(folder, raw, "round-0", workers)
        all_losses.append(losses(run, "round-0"))
    one, recomputed, two = all_losses
    assert two == pytest.approx(one, rel=1e-5)
    assert recomputed == pytest.approx(one, rel=1e-5)
    folder, model = tmp_path / "2-False", run.model("round-0")
    start, merged = load_file(folder / "student/model.safetensors"), load_file(model / "model.safetensors")
    assert start.keys() == merged.keys()
    changed = {name for name in start if not torch.equal(start[name], merged[name])}
    assert any("experts" in name for name in changed)
    assert all("proj" in name for name in changed), "everything else is frozen"
    checkpoint = store(run).at(4)
    assert checkpoint is not None
    write_snapshot(job_of(raw, "round-0"), checkpoint, tmp_path / "snapshot")
    snapshot = load_file(tmp_path / "snapshot/model.safetensors")
    assert snapshot.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(snapshot[name], weight, rtol=0, atol=1e-6)
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "student"), model / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    whole = AutoModelForCausalLM.from_pretrained(model)
    torch.testing.assert_close(adapted(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next"])
def test_adapters_of_linear_layers_leave_stacked_experts_as_they_are(family: str) -> None:
    """By default peft takes `gate_proj` of shared experts for the stacked experts."""
    model = make(family, None)
    add_adapters(model, Lora(r=2), seed=1)
    adapted = {unadapted_name(name) for name in adapted_parameters(model)}
    assert any(name.endswith("gate_proj.weight") for name in adapted)
    assert not any(".experts." in name for name in adapted)
    with pytest.raises(UserError, match=r"training.lora.save_adapter: peft would load .*gate_proj.* set false"):
        add_adapters(make(family, None), Lora(r=2, save_adapter=True), seed=1)


def test_experts_alone_can_be_adapted() -> None:
    model = make("qwen3_moe", None)
    add_adapters(model, Lora(r=2, target_modules=[], target_parameters=EXPERTS[:1], save_adapter=True), seed=1)
    adapted = {unadapted_name(name) for name in adapted_parameters(model)}
    assert adapted == {f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in range(2)}


def test_a_saved_adapter_has_the_experts_of_families_that_keep_them_as_linear_layers(tmp_path: Path) -> None:
    from peft import PeftModel

    shape = {"d_kv": 16, "d_ff": 64, "num_layers": 2, "num_sparse_encoder_layers": 2, "num_experts": 2}
    sparse = shape | {"num_decoder_layers": 2, "num_sparse_decoder_layers": 2, "encoder_sparse_step": 1}
    student = make_random_model(tmp_path / "student", 2, model_type="switch_transformers", **sparse)
    model = AutoModelForSeq2SeqLM.from_pretrained(student)
    lora = Lora(r=2, target_modules=["wi", "wo"])
    add_adapters(model, lora, seed=1)
    adapters = adapted_parameters(model)
    assert all(".experts." in name for name in adapters)
    for module in adapters.values():
        torch.nn.init.normal_(low_rank_matrices(module)[1])  # they start at zero
    weights = {
        f"base_model.model.{name.replace('.default', '')}": parameter.detach()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    job = SimpleNamespace(lora=lora, start=str(student), settings=Model(path=str(student)))
    _save_adapter(tmp_path / "adapter", weights, adapted_layers(model), job)

    loaded = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(student), tmp_path / "adapter")
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "decoder_input_ids": torch.tensor([[0, 9, 10]])}
    torch.testing.assert_close(loaded(**ids).logits, model.eval()(**ids).logits)


def test_the_plan_counts_the_adapters_of_experts(tmp_path: Path) -> None:
    make_random_model(tmp_path / "student", 2, model_type="qwen3_moe", num_key_value_heads=1, **MIXTURES["qwen3_moe"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    add_adapters(model, LORA, seed=1)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert size_of(Model(path=str(tmp_path / "student")), "cpu").adapters(LORA) == trained


def test_the_plan_holds_the_adapted_experts_of_all_layers_or_of_one_that_is_recomputed(tmp_path: Path) -> None:
    shape = MIXTURES["qwen3_moe"] | {"num_hidden_layers": 3}
    make_random_model(tmp_path / "student", 2, model_type="qwen3_moe", num_key_value_heads=1, **shape)
    size = size_of(Model(path=str(tmp_path / "student")), "gpu")

    def activations(recomputes: bool, lora: Lora) -> float:
        training = Training(lora=lora, gradient_checkpointing=recomputes, micro_batch_tokens=16)
        return training_memory(size, training, Optimizer(), 2, "gpu").alternatives["activations and log-prob chunk"]

    layer = 2 * sum(map(math.prod, size.stacked_experts.values())) / 3
    for recomputes, layers in ((False, 3), (True, 1)):
        more = activations(recomputes, LORA) - activations(recomputes, Lora())
        assert more / layer == pytest.approx(layers + 1, rel=0.04), "the gradients of one layer are whole too"


def test_a_key_without_effect_leaves_the_fingerprint_of_earlier_adapters() -> None:
    earlier = {"r": 16, "alpha": 32.0, "target_modules": "all-linear", "save_adapter": False}
    assert _keys_of_all_phases(Training(lora=Lora())) == {"lora": earlier}
    assert _keys_of_all_phases(Training(lora=LORA))["lora"]["target_parameters"] == EXPERTS


@pytest.mark.parametrize(("family", "changes"), [("qwen3_moe", True), ("llama", False)])
def test_checkpoints_from_when_peft_changed_the_targets_in_a_mixture_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: bool
) -> None:
    raw = config_with_pairs(tmp_path, max_steps=1)
    make_random_model(tmp_path / "student", 2, model_type=family, num_key_value_heads=1, **MIXTURES.get(family, {}))
    make_run(raw)

    def fingerprint(lora: dict[str, Any] | None) -> str:
        return job_of(raw | {"training": raw["training"] | {"lora": lora}}, "round-0").fingerprint

    adapted, unadapted = fingerprint({"r": 2}), fingerprint(None)
    monkeypatch.setattr("plad_dist.training.plan.is_mixture", lambda model: False)
    assert (fingerprint({"r": 2}) != adapted) == changes
    assert fingerprint(None) == unadapted, "without adapters every checkpoint still fits"


def test_parameters_that_do_not_stack_experts_are_refused_with_those_that_do(tmp_path: Path) -> None:
    make_random_model(tmp_path / "student", 2, model_type="qwen3_moe", num_key_value_heads=1, **MIXTURES["qwen3_moe"])
    student = Model(path=str(tmp_path / "student")).pretrained()
    assert student is not None
    check_adapters(student, LORA)
    message = r"target_parameters: q_proj.weight: expected .*; the model has experts.down_proj, experts.gate_up_proj"
    with pytest.raises(UserError, match=message):
        check_adapters(student, Lora(target_parameters=["experts.down_proj", "q_proj.weight"]))
