"""Families: packed rows of every tested one equal separate sequences in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from plad_dist.config import Loss
from plad_dist.errors import UserError
from plad_dist.training.batches.packing import collate
from plad_dist.training.losses import group_losses
from plad_dist.training.model import probe as probe_module
from plad_dist.training.model.attention import attention_of
from plad_dist.training.model.experts import route_in_float32
from plad_dist.training.model.families import TESTED, row_support
from plad_dist.training.model.policy import Policy
from plad_dist.training.model.probe import probe
from plad_dist.training.model.tree_attention import FLEX_ATTENTION
from plad_dist.training.worker.speed import Speed
from tests.numerics.workers import config_with_pairs, losses, make_run, train
from tests.small_families import FAMILIES, GROUPS, SHAPE, config_of, make, separate_logps
from tests.tiny import make_random_model

GROUP_LIMIT = 100  # tokens; the longest group has fewer
ONE_SEQUENCE_A_ROW = {"qwen3_5", "qwen3_next", "falcon_h1", "nemotron_h", "llama4", "bloom"}
UNPACKED_FAMILIES = ONE_SEQUENCE_A_ROW | {"bart"}
SHARING_FAMILIES = set(FAMILIES) - ONE_SEQUENCE_A_ROW - {"gpt_neo, windows shorter than rows"}


def test_every_family_that_counts_as_tested_is_tested_here() -> None:
    assert {model_type for model_type, _ in FAMILIES.values()} - {"bloom"} == set(TESTED)


@pytest.mark.parametrize("piecewise", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logps_and_gradients_equal_those_of_separate_sequences(family: str, piecewise: bool) -> None:
    config = config_of(family)
    attention = attention_of(config, row_support(config, remote=False), GROUP_LIMIT)
    if piecewise and attention.layout.min_piece_tokens is None:
        pytest.skip("its attention is never computed piece by piece")
    if piecewise:
        attention = replace(attention, layout=replace(attention.layout, min_piece_tokens=1))
    assert attention.layout.shares_prompts == (family in SHARING_FAMILIES)
    assert attention.layout.packs_rows == (family not in UNPACKED_FAMILIES)
    assert (attention.no_sharing_reason is None) == attention.layout.shares_prompts
    model = make(family, attention.implementation)
    exact_model = make(family, None if family in UNPACKED_FAMILIES else "eager", torch.float64)
    loss = Loss(name="rank", margin=1.0, mle_weight=0.5)

    expected_S = separate_logps(exact_model, GROUPS).double()  # some models return their logits in float32
    batch = collate(GROUPS, filler=0, layout=attention.layout)
    assert bool(batch.pieces) == piecewise
    group_losses(loss, batch.pairs, expected_S, batch.lengths_S, batch.initial_logps_S).sum().backward()

    policy = Policy(model, attention)
    logps_S = policy(batch)
    group_losses(loss, batch.pairs, logps_S, batch.lengths_S, batch.initial_logps_S).sum().backward()

    torch.testing.assert_close(logps_S.double(), expected_S, rtol=1e-5, atol=0)
    trained = dict(policy.model.named_parameters())
    grads = {name: parameter.grad for name, parameter in exact_model.named_parameters() if parameter.grad is not None}
    largest = max(grad.abs().max().item() for grad in grads.values())
    for name, grad in grads.items():  # some are zero up to rounding, such as those of the biases of keys
        scale = max(grad.abs().max().item(), 1e-3 * largest)
        torch.testing.assert_close(trained[name].grad.double(), grad, rtol=0, atol=1e-3 * scale)


# -- the probe of other families


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gemma2",
        "gemma3, multimodal",
        "gpt_oss",
        "qwen3_moe",
        "deepseek_v3",
        "phi3",
        "nemotron_h",
        "llama4",
        "t5",
        "umt5",
        "bart",
    ],
)
def test_a_probe_finds_what_the_tests_of_families_promise(family: str) -> None:
    config = config_of(family)
    assert probe(config, remote=False) == TESTED[config.model_type]


@pytest.mark.parametrize(
    ("family", "support"),
    [
        ("olmo", "tree"),
        ("starcoder2", "tree"),
        ("seed_oss", "tree"),
        ("gpt2", "scores"),
        ("bloom", "sequences"),
    ],
)
def test_families_that_are_not_tested_are_probed_at_their_default_size(family: str, support: str) -> None:
    config = AutoConfig.for_model(family)
    assert family not in TESTED
    assert row_support(config, remote=False) == support


def test_a_probe_of_a_giant_runs_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture with 128 wide experts is probed with four narrow ones."""
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4,
        head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536, intermediate_size=12288,
        vocab_size=151936,
    )  # fmt: skip
    sizes: list[int] = []
    build = probe_module._build

    def counting(*arguments: Any) -> Any:
        model = build(*arguments)
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
        return model

    monkeypatch.setattr(probe_module, "_build", counting)
    assert probe(config, remote=False) == "tree"
    assert sizes
    assert max(sizes) < 1_000_000


def test_a_family_whose_output_layer_is_not_plain_is_refused() -> None:
    """The logits of this family have a factor that the trainer does not know."""
    config = AutoConfig.for_model("hyperclovax", **SHAPE, logits_scaling=2.0)
    with pytest.raises(UserError, match=r"hyperclovax models cannot be trained: .* output layer is not a plain one"):
        row_support(config, remote=False)


def test_a_tested_family_with_layers_of_another_type_is_probed() -> None:
    config = AutoConfig.for_model("qwen3", **SHAPE)
    config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(UserError, match="qwen3 models cannot be trained"):
        row_support(config, remote=False)


# -- mixtures of experts on several ranks

MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 32},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 1},
    "gpt_oss": {
        "num_local_experts": 8, "num_experts_per_tok": 1, "layer_types": ["sliding_attention"], "sliding_window": 8,
        "head_dim": 32,
    },
}  # fmt: skip


@pytest.mark.engine
@pytest.mark.parametrize("family", MIXTURES)
def test_ranks_that_route_differently_train_like_one_and_do_not_hang(tmp_path: Path, family: str) -> None:
    """With one group in a step, one of two ranks has an empty micro-batch of few experts."""
    all_losses = {}
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        raw = config_with_pairs(folder, max_steps=4, batch_groups=1)
        make_random_model(folder / "student", 2, model_type=family, num_key_value_heads=1, **MIXTURES[family])
        run = make_run(raw)
        train(folder, raw, "round-0", workers)
        all_losses[workers] = losses(run, "round-0")
        AutoModelForCausalLM.from_pretrained(run.model("round-0"))
    assert len(all_losses[2]) == 4
    assert all_losses[2] == pytest.approx(all_losses[1], rel=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "llama4"])
def test_routers_compute_in_float32_in_a_model_of_half_precision(family: str) -> None:
    model = make(family, None, torch.bfloat16)
    names = list(model.state_dict())
    block = next(module for module in model.modules() if hasattr(module, "experts"))
    router = getattr(block, "gate", None) or block.router
    hidden = torch.randn(64, SHAPE["hidden_size"]).to(torch.bfloat16)
    rounded = router(hidden)
    exact = copy.deepcopy(router).float()(hidden.float())
    route_in_float32(model)
    outputs = router(hidden)
    for output, expected, before in zip(outputs, exact, rounded, strict=True):
        assert torch.equal(output, expected.to(before.dtype)), "only the result is rounded"
    assert not all(map(torch.equal, outputs, rounded))
    outputs[0].float().sum().backward()
    assert router.weight.grad.dtype == torch.bfloat16
    assert list(model.state_dict()) == names


def test_a_token_of_a_mixture_counts_the_arithmetic_of_its_experts_alone() -> None:
    config = AutoConfig.for_model(
        "qwen3_moe", **(SHAPE | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 24})
    )
    model = AutoModelForCausalLM.from_config(config)
    speed = Speed(Policy(model, attention_of(config, "tree", None)), torch.device("cpu"))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    others = sum(size for name, size in sizes.items() if ".experts." not in name and "embed" not in name)
    assert routed > 10 * others
    assert speed._body == 6 * (others - sizes.get("lm_head.weight", 0) + routed * 8 / 128)


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("minimax_m2", SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("afmoe", SHAPE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    ],
)
def test_routers_with_further_arguments_compute_in_float32_too(family: str, shape: dict[str, Any]) -> None:
    """These pass a bias of the scores to the router."""
    config = AutoConfig.for_model(family, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ids = torch.arange(3, 40)[None]
    expected = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    expected.load_state_dict(model.state_dict())
    route_in_float32(model)
    route_in_float32(expected)
    close = model(ids).logits.float() - expected(ids).logits
    assert close.abs().max() < 0.1


def test_a_window_that_the_family_does_not_have_is_found_by_the_probe() -> None:
    """Llama ignores a window of the config, so a mask with it would be wrong."""
    config = AutoConfig.for_model("llama", **SHAPE)
    config.sliding_window = 4096
    assert row_support(config, remote=False) == "sequences"


def test_a_probe_does_not_depend_on_the_devices_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver may have a GPU while the workers have none, and the reverse."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = AutoConfig.for_model("olmo", **SHAPE)
    assert probe(config, remote=False) == "tree"
    assert attention_of(config, "tree", None).implementation == FLEX_ATTENTION


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss"])
def test_changed_scores_are_not_left_to_flex_attention_on_a_gpu(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """GPT-2 takes no block mask, and the sinks of gpt-oss would be rounded to half precision."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert attention_of(AutoConfig.for_model(family), "scores", None).implementation == "eager"
    assert attention_of(AutoConfig.for_model("gemma2"), "scores", None).implementation == FLEX_ATTENTION
