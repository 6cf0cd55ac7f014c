"""Numerics on a CUDA device: compiled FlexAttention, bfloat16, NCCL and DeepSpeed's kernels."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import training
from plad_dist.config import Loss
from plad_dist.training.batches.micro_batch import Group, single_pair
from plad_dist.training.batches.packing import collate
from plad_dist.training.losses import group_losses
from plad_dist.training.model import logprobs
from plad_dist.training.model.attention import attention_of
from plad_dist.training.model.families import row_support
from plad_dist.training.model.policy import Policy
from plad_dist.training.model.tree_attention import FLEX_ATTENTION

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WIDE = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 997, "intermediate_size": 192,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "head_dim": 32, "initializer_range": 0.1,
}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 50}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", WIDE),
    "mistral with a sliding window": ("mistral", WIDE | {"sliding_window": 60}),
    "qwen3": ("qwen3", WIDE),
    "gemma2 with softcaps": (
        "gemma2",
        WIDE | SLIDING | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": ("gemma3_text", WIDE | SLIDING),
    "opt": (
        "opt",
        {
            "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 997, "ffn_dim": 192,
            "max_position_embeddings": 1024, "word_embed_proj_dim": 128, "init_std": 0.1,
        },
    ),
}  # fmt: skip
LOSS = Loss(name="rank", margin=1.0, mle_weight=0.5)
STEPS, KILLED_AT = 6, 4


def pairs_of_several_lengths(times: int = 1) -> list[Group]:
    """Return pairs of several lengths, some longer than one block of 128 tokens of a block mask."""
    torch.manual_seed(3)

    def tokens(count: int) -> list[int]:
        return [int(token) for token in torch.randint(3, 997, (count,))]

    lengths = [(5, 4, 3), (1, 2, 5), (300, 70, 20), (40, 130, 129), (128, 128, 1), (257, 3, 90)]
    return [
        single_pair(tokens(prompt), tokens(chosen), tokens(rejected)) for prompt, chosen, rejected in lengths * times
    ]


def separate_logps(model: Any, groups: list[Group]) -> torch.Tensor:
    """Return the log-likelihood of every response, from forward passes of separate sequences."""
    logps = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response]], device="cuda")
            logits = model(input_ids=ids).logits[0, len(group.prompt) - 1 : -1]
            targets = torch.tensor(response, device="cuda")
            dtype = torch.promote_types(logits.dtype, torch.float32)
            logps.append(logits.to(dtype).log_softmax(-1).gather(1, targets[:, None]).sum())
    return torch.stack(logps).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_under_flex_attention_equal_separate_sequences(family: str) -> None:
    model_type, shape = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **shape)
    attention = attention_of(config, row_support(config, remote=False), None)
    assert attention.implementation == FLEX_ATTENTION

    def model(implementation: str | None, dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        random_model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation)
        return random_model.to("cuda", dtype).eval()

    groups = pairs_of_several_lengths()
    batch = collate(groups, filler=0, layout=attention.layout).to(torch.device("cuda"))
    exact_model = model("eager", torch.float64)
    expected_S = separate_logps(exact_model, groups)
    lengths_S, initial_logps_S = batch.lengths_S, batch.initial_logps_S
    group_losses(LOSS, batch.pairs, expected_S, lengths_S, initial_logps_S).sum().backward()

    policy = Policy(model(attention.implementation, torch.float32), attention)
    logps_S = policy(batch)
    group_losses(LOSS, batch.pairs, logps_S, lengths_S, initial_logps_S).sum().backward()
    torch.testing.assert_close(logps_S.double(), expected_S, rtol=2e-5, atol=1e-4)
    trained = dict(policy.model.named_parameters())
    grads = {name: parameter.grad for name, parameter in exact_model.named_parameters() if parameter.grad is not None}
    largest = max(grad.abs().max().item() for grad in grads.values())
    for name, grad in grads.items():
        scale = max(grad.abs().max().item(), 1e-3 * largest)
        torch.testing.assert_close(trained[name].grad.double(), grad, rtol=0, atol=2e-3 * scale)

    many = pairs_of_several_lengths(8)
    batch = collate(many, filler=0, layout=attention.layout).to(torch.device("cuda"))
    with torch.no_grad():
        expected_S = separate_logps(model("eager", torch.bfloat16).double(), many)
        half_S = Policy(model(attention.implementation, torch.bfloat16), attention)(batch).double()
        plain_S = separate_logps(model("sdpa" if model_type != "gemma2" else "eager", torch.bfloat16), many)
    error, plain_error = ((logps_S - expected_S).square().mean().sqrt().item() for logps_S in (half_S, plain_S))
    print(f"{family}: error of bfloat16 {error:.4f} nat a response, of a plain forward pass {plain_error:.4f}")
    assert error <= 1.25 * plain_error


@pytest.mark.parametrize(("bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.5, 2.0)])
def test_log_probabilities_of_half_precision_weights_are_not_rounded(
    monkeypatch: pytest.MonkeyPatch, bias: bool, scale: float, softcap: float | None
) -> None:
    """bfloat16 keeps 8 bits, so logits of 10 would be rounded by 0.03."""
    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS_GPU", 100 * 5003)
    torch.manual_seed(1)
    layer = torch.nn.Linear(256, 5003, bias=bias, device="cuda", dtype=torch.bfloat16)
    hidden = (8 * torch.randn(777, 256, device="cuda")).bfloat16().requires_grad_()
    targets, weights = torch.randint(5003, (777,), device="cuda"), torch.randn(777, device="cuda")
    weights[::3] = 0
    logps = logprobs.LogprobHead(layer, scale, softcap)(hidden, targets)
    grads = torch.autograd.grad((logps * weights).sum(), [hidden, *layer.parameters()])

    wide = torch.nn.Linear(256, 5003, bias=bias, device="cuda", dtype=torch.float64)
    wide.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    exact = hidden.detach().double().requires_grad_()
    logits = wide(exact) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    expected_grads = torch.autograd.grad((expected * weights.double()).sum(), [exact, *wide.parameters()])
    torch.testing.assert_close(logps.double(), expected, rtol=0, atol=2e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad.double() - expected_grad).norm() <= 5e-3 * expected_grad.norm()


def train_one_rank(folder: str, model: str, killed_at: int | None) -> None:
    """Run one rank of a phase as Ray Train starts it; exit before step `killed_at` if it is set."""
    from plad_dist.training.worker.loop import Worker

    os.environ |= training.RANK
    torch.cuda.set_device(0)
    training.start_one_rank("nccl")
    rows = training.make_pairs("tldr", 16)
    job = training.worker_job(
        Path(folder), Path(model), rows, 4096, STEPS, dtype="bfloat16", gradient_checkpointing=True, attention="auto"
    )
    job = replace(job, phase=job.phase.model_copy(update={"checkpoint_every": 2}))
    worker = Worker(job, torch.device("cuda", 0))
    step = Worker.train_step

    def dying(self: Worker) -> Any:
        if self.state.step == killed_at:
            self.checkpoints.drain()
            os._exit(9)
        return step(self)

    Worker.train_step = dying  # type: ignore[method-assign]
    worker.run()
    worker.close()


def test_a_phase_killed_and_resumed_on_a_gpu_gives_the_same_weights_bit_by_bit(tmp_path: Path) -> None:
    model = training.make_model(tmp_path / "model")
    processes = multiprocessing.get_context("spawn")
    for folder, killed_at, code in (("whole", None, 0), ("killed", KILLED_AT, 9), ("killed", None, 0)):
        process = processes.Process(target=train_one_rank, args=(str(tmp_path / folder), str(model), killed_at))
        process.start()
        process.join()
        assert process.exitcode == code
    whole, killed = (next((tmp_path / name).rglob("model*.safetensors")) for name in ("whole", "killed"))
    expected, resumed = load_file(whole), load_file(killed)
    start = load_file(model / "model.safetensors")
    assert any(not torch.equal(expected[name].float(), start[name]) for name in start), "nothing was trained"
    for name in expected:
        assert torch.equal(resumed[name], expected[name]), name
