"""Auxiliary loss of mixtures: transformers' own on separate sequences in float64, on any ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from plad_dist.compat.routers import routers_of
from plad_dist.config import Loss
from plad_dist.config_file import parse_config
from plad_dist.errors import UserError
from plad_dist.rundir import RunDir
from plad_dist.training.batches.micro_batch import Group, Layout, MicroBatch
from plad_dist.training.batches.packing import collate
from plad_dist.training.losses import group_losses
from plad_dist.training.model.attention import attention_of
from plad_dist.training.model.balance import ExpertBalance
from plad_dist.training.model.experts import route_in_float32
from plad_dist.training.model.families import row_support
from plad_dist.training.model.policy import Policy
from plad_dist.training.model.probe import check_balance
from plad_dist.training.plan import phase_inputs, plan_phase
from plad_dist.training.records.metrics_file import read_metrics
from plad_dist.training.worker.gradient import update_weights
from plad_dist.training.worker.partition_report import partition_report
from plad_dist.training.worker.step_data import StepData
from tests.numerics.workers import config_with_pairs, losses, make_run, train
from tests.small_families import GROUPS, config_of, make, separate_logps
from tests.tiny import make_random_model

MIXTURES = [
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "gpt_oss", "deepseek_v3", "llama4", "gemma4, mixture",
]  # fmt: skip
EXPERTS, CHOSEN = 4, 2
FACTOR = 0.3
SMALL = {
    "num_hidden_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "head_dim": 32,
}


def balanced(family: str, dtype: torch.dtype = torch.float32) -> tuple[Policy, ExpertBalance]:
    """Return a small mixture as the trainer calls it."""
    config = config_of(family)
    attention = attention_of(config, row_support(config, remote=False), None)
    model = make(family, attention.implementation, dtype)
    route_in_float32(model)
    balance = ExpertBalance(model, FACTOR)
    return Policy(model, attention, balance), balance


def computed_logits(family: str, model: Any, groups: list[Group], layout: Layout) -> list[Tensor]:
    """Return the router logits of each layer, from separate sequences, for the computed tokens.

    A prompt that its responses share is computed once, and the last token of a response is not.
    """
    routers, index = routers_of(model)
    layers: list[list[Tensor]] = [[] for _ in routers]
    kept = slice(0)

    def keep(layer: int, output: Any) -> None:
        logits = output[index].log() if family.startswith("gemma4") else output[index]
        layers[layer].append(logits[kept])

    for layer, router in enumerate(routers):
        router.register_forward_hook(lambda _, __, output, layer=layer: keep(layer, output))
    for group in groups:
        for number, response in enumerate(group.responses):
            kept = slice(len(group.prompt) if number and layout.shares_prompts else 0, None)
            model(input_ids=torch.tensor([[*group.prompt, *response[:-1]]]), use_cache=False)
    return [torch.cat(logits) for logits in layers]


def exact_loss(logits: list[Tensor]) -> Tensor:
    """Return the mean of transformers' loss over the layers."""
    return torch.stack([load_balancing_loss_func((layer,), EXPERTS, CHOSEN) for layer in logits]).mean()


def gradients(model: Any) -> dict[str, Tensor]:
    """Return the gradients of a model by name, without those that are None."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Compare gradients up to the rounding of float32."""
    largest = max(grad.abs().max().item() for grad in exact.values())
    for name, grad in exact.items():
        scale = max(grad.abs().max().item(), 1e-3 * largest)
        torch.testing.assert_close(actual[name].double(), grad.double(), rtol=0, atol=1e-3 * scale, msg=name)


def run_forward_and_backward(policy: Policy, balance: ExpertBalance, batch: MicroBatch, scale: float) -> Tensor:
    """Add the gradients of a micro-batch by the losses of its groups; return the balance's sums."""
    balance.begin(batch, scale)
    loss = Loss(name="rank", mle_weight=0.5)
    logps_S = policy(batch)
    group_losses(loss, batch.pairs, logps_S, batch.lengths_S, batch.initial_logps_S).sum().backward()
    balance.end()
    return balance.take_sums()


@pytest.mark.parametrize("family", MIXTURES)
def test_value_and_gradient_are_those_of_transformers_on_separate_sequences(family: str) -> None:
    policy, balance = balanced(family)
    batch = collate(GROUPS, filler=0, layout=policy.attention.layout)
    assert (batch.prompt_starts_RT >= 0).sum() == batch.tokens
    exact_model = make(family, None, torch.float64)
    logits = computed_logits(family, exact_model, GROUPS, policy.attention.layout)
    exact = exact_loss(logits)
    loss = Loss(name="rank", mle_weight=0.5)
    logps_S = separate_logps(exact_model, GROUPS).double()
    of_groups = group_losses(loss, batch.pairs, logps_S, batch.lengths_S, batch.initial_logps_S).sum()
    (of_groups + 50 * exact).backward()

    sums = run_forward_and_backward(policy, balance, batch, 50 / batch.tokens)

    assert sums[0] / batch.tokens == pytest.approx(exact.item(), rel=1e-5)
    loads = [layer.topk(CHOSEN).indices.flatten().bincount(minlength=EXPERTS) for layer in logits]
    assert sums[1:].tolist() == torch.cat(loads).tolist()
    assert_same_gradients(gradients(policy.model), gradients(exact_model))
    assert not balance.take_sums().any(), "the sums were taken"


def test_recomputed_layers_count_once() -> None:
    results = []
    for recomputes in (False, True):
        policy, balance = balanced("qwen3_moe")
        if recomputes:
            policy.model.enable_input_require_grads()
            policy.model.gradient_checkpointing_enable({"use_reentrant": True})
        policy.train()
        batch = collate(GROUPS, filler=0, layout=policy.attention.layout)
        results.append((run_forward_and_backward(policy, balance, batch, 0.1), gradients(policy.model)))
    (sums, plain), (recomputed_sums, recomputed) = results
    assert torch.equal(recomputed_sums, sums)
    assert plain.keys() == recomputed.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(recomputed[name], grad)


def test_the_loss_alone_spreads_the_tokens_over_the_experts() -> None:
    policy, balance = balanced("qwen3_moe")
    optimizer = torch.optim.Adam([router.weight for router in balance.routers], lr=0.02)
    batch = collate(GROUPS, filler=0, layout=policy.attention.layout)
    history = []
    for _ in range(30):
        balance.begin(batch, 1.0)
        (policy(batch).sum() * 0.0).backward()
        balance.end()
        history.append(balance.take_sums())
        optimizer.step()
        optimizer.zero_grad()
    assert history[-1][0] < history[0][0]
    assert history[-1][1:].max() < 0.8 * history[0][1:].max()


class Engine:
    """Stands for DeepSpeed on one of two ranks: no partition, no update."""

    def __init__(self, policy: Policy) -> None:
        self.module = policy

    def __call__(self, batch: MicroBatch) -> Tensor:
        logps_S: Tensor = self.module(batch)
        return logps_S

    def zero_optimization_stage(self) -> int:
        """Return the stage of a partition of all parameters."""
        return 3

    def train(self) -> None:
        """Change nothing: there is no dropout."""

    def step(self) -> None:
        """Keep the weights."""

    def set_gradient_accumulation_boundary(self, is_last: bool) -> None:
        """Keep the gradients."""

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients."""
        loss.backward()


def test_the_gradient_of_a_step_weighs_its_micro_batches_by_tokens() -> None:
    """The average over the ranks divides by their number, and an empty micro-batch adds nothing."""
    policy, balance = balanced("qwen3_moe")
    exact_model, layout = make("qwen3_moe", None, torch.float64), policy.attention.layout
    parts = [GROUPS[:2], [], GROUPS[2:]]
    micro_batches = [(collate(part, filler=0, layout=layout), ["name"] * len(part)) for part in parts]
    tokens, world = 2 * sum(batch.tokens for batch, _ in micro_batches), 2  # the other rank has as many
    data = StepData(micro_batches, ["name"] * 8, tokens)
    no_loss = Loss(name="rank", margin=0.0, mle_weight=0.0)
    for part in parts:
        if part:
            exact = exact_loss(computed_logits("qwen3_moe", exact_model, part, layout))
            (FACTOR * world * exact * sum(map(layout.tokens, part)) / tokens).backward()
            batch = collate(part, filler=0, layout=layout)
            logps_S = separate_logps(exact_model, part).double()
            of_groups = group_losses(no_loss, batch.pairs, logps_S, batch.lengths_S, batch.initial_logps_S)
            (of_groups.sum() * world / 8).backward()
        for router in routers_of(exact_model)[0]:
            router._forward_hooks.clear()

    update_weights(Engine(policy), data, no_loss, torch.device("cpu"), world, lambda totals, losses: None)

    assert_same_gradients(gradients(policy.model), gradients(exact_model))
    assert balance.take_sums()[1:].sum() == len(balance.routers) * CHOSEN * tokens / world


def test_outside_a_micro_batch_of_training_nothing_changes_by_a_bit() -> None:
    """Evaluations, and training without the loss, compute what they did."""
    policy, balance = balanced("qwen3_moe")
    plain, _ = balanced("qwen3_moe")
    for router in routers_of(plain.model)[0]:
        del router.forward  # as transformers built it
    batch = collate(GROUPS, filler=0, layout=policy.attention.layout)
    balance.begin(batch, 1.0)
    balance.end()
    for each in (policy, plain):
        each(batch).sum().backward()
    balance.begin(batch, 1.0)
    with torch.no_grad():
        assert torch.equal(policy(batch), plain(batch))
    assert not balance.take_sums().any()
    ours, theirs = gradients(policy.model), gradients(plain.model)
    assert all(torch.equal(ours[name], grad) for name, grad in theirs.items())


def test_the_loss_of_a_model_in_half_precision_is_computed_in_float32() -> None:
    policy, balance = balanced("qwen3_moe", torch.bfloat16)
    seen: list[torch.dtype] = []
    for router in balance.routers:
        observe = router.forward.observe
        router.forward.observe = lambda outputs, observe=observe: (seen.append(outputs[0].dtype), observe(outputs))[1]
    run_forward_and_backward(policy, balance, collate(GROUPS, filler=0, layout=policy.attention.layout), 1.0)
    assert seen == [torch.float32] * 2


@pytest.mark.parametrize(
    ("family", "factor", "words"),
    [
        ("qwen3_moe", FACTOR, "; router_aux_loss 0.3 balances the experts"),
        ("qwen3_moe", 0.0, "; no auxiliary loss balances the experts (training.router_aux_loss: 0)"),
        ("llama", 0.0, ""),
    ],
)
def test_the_log_line_of_a_start_says_if_experts_are_balanced(family: str, factor: float, words: str) -> None:
    model = make(family)
    route_in_float32(model)
    policy = Policy(model, attention_of(model.config, "tree", None), ExpertBalance(model, factor) if factor else None)
    line = partition_report(Engine(policy), world=2, step=0, steps=10, groups=5)
    assert line.endswith(f"step 0 of 10; 5 groups{words}")


# -- refusals


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_that_can_be_balanced_is_accepted(family: str) -> None:
    check_balance(config_of(family), remote=False)


@pytest.mark.parametrize("family", ["deepseek_v3", "minimax_m2", "glm4_moe", "afmoe"])
def test_mixtures_of_further_families_are_accepted_at_their_default_size(family: str) -> None:
    check_balance(AutoConfig.for_model(family), remote=False)


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(UserError, match=r"training.router_aux_loss: llama models .* have no experts .*; set 0"):
        check_balance(config_of("llama"), remote=False)


@pytest.mark.parametrize("family", ["jetmoe", "switch_transformers"])
def test_a_family_whose_routers_cannot_be_read_is_refused(family: str) -> None:
    """JetMoe has no separate modules for them, and routers of an encoder see other tokens."""
    with pytest.raises(UserError, match=rf"training.router_aux_loss: the routers of {family} .* cannot be read; set 0"):
        check_balance(AutoConfig.for_model(family), remote=False)


# -- on several ranks


def trained(folder: Path, workers: int, factor: float, **training: Any) -> list[dict[str, float]]:
    """Train a mixture on one group a step, and return the figures of the steps."""
    folder.mkdir()
    raw = config_with_pairs(folder, max_steps=6, batch_groups=1)
    raw["training"] |= {"router_aux_loss": factor, **training}
    make_random_model(folder / "student", 2, model_type="qwen3_moe", num_key_value_heads=1, **SMALL)
    run = make_run(raw)
    train(folder, raw, "round-0", workers)
    assert len(losses(run, "round-0")) == 6
    steps: list[dict[str, float]] = read_metrics(run.root / "events" / "round-0")[0]
    return steps


@pytest.mark.engine
def test_a_rank_without_groups_takes_part_and_the_figures_are_those_of_one_rank(tmp_path: Path) -> None:
    one, two, recomputed = (
        trained(tmp_path / "one", 1, 100.0),
        trained(tmp_path / "two", 2, 100.0),
        trained(tmp_path / "recomputed", 2, 100.0, gradient_checkpointing=True),
    )
    for name in ("loss", "grad_norm", "router_aux_loss", "largest_expert_load"):
        expected = pytest.approx([step[name] for step in one], rel=1e-4)
        assert [step[name] for step in two] == expected
        assert [step[name] for step in recomputed] == expected


@pytest.mark.engine
def test_without_the_key_no_figure_tells_of_the_loss(tmp_path: Path) -> None:
    assert "router_aux_loss" not in trained(tmp_path / "off", 1, 0.0)[-1]


def test_the_factor_decides_the_model_and_none_leaves_the_identity_as_it_was(tmp_path: Path) -> None:
    raw = config_with_pairs(tmp_path)
    make_random_model(tmp_path / "student", 2, model_type="qwen3_moe", num_key_value_heads=1, **SMALL)
    make_run(raw)
    identities = set()
    for factor in (None, 0.0, 0.5):
        changed = raw | {"training": raw["training"] | ({} if factor is None else {"router_aux_loss": factor})}
        config = parse_config(changed, "test")
        run = RunDir.of(config)
        identities.add((plan_phase("round-0", config, run).fingerprint, phase_inputs("round-0", config, run)))
    assert len(identities) == 2
