"""Log-likelihoods and gradients against plain float64 references."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from plad_dist.config import Loss
from plad_dist.training import logprobs
from plad_dist.training.batching import Group, collate
from plad_dist.training.losses import group_losses
from plad_dist.training.policy import Policy

GROUPS = [
    Group([5, 6, 7, 8, 9], [[10, 11, 12, 2], [20, 21, 2]]),
    Group([4], [[30, 2], [31, 32, 33, 34, 2]]),
    Group([9, 8, 7], [[40], [41, 42]]),
]


def tiny_model(family: str) -> torch.nn.Module:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 97}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        **shape,
        **({"sliding_window": None} if family == "mistral" else {}),
        intermediate_size=48,
        num_key_value_heads=1,
        max_position_embeddings=128,
        head_dim=16,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


def separate_logps(model: torch.nn.Module, groups: list[Group]) -> torch.Tensor:
    """Every sequence by itself through the plain model."""
    rows = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response]])
            logps = model(input_ids=ids).logits[0].log_softmax(-1)
            start = len(group.prompt)
            targets = torch.tensor(response)
            rows.append(logps[start - 1 : start - 1 + len(response)].gather(1, targets[:, None]).sum())
    return torch.stack(rows).view(len(groups), -1)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt_neox"])
def test_packed_logps_and_gradients_equal_those_of_separate_sequences(family: str) -> None:
    model = tiny_model(family)
    reference = tiny_model(family).double()
    reference.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    loss = Loss(name="rank", margin=1.0, mle_weight=0.5)
    lengths_BK = torch.tensor([[len(r) for r in group.responses] for group in GROUPS])

    expected = separate_logps(reference, GROUPS)
    group_losses(loss, expected, lengths_BK).sum().backward()

    policy = Policy(model)
    batch = collate(GROUPS, filler=0)
    logps_BK = policy(batch)
    assert torch.equal(batch.lengths_BK, lengths_BK)
    group_losses(loss, logps_BK, batch.lengths_BK).sum().backward()

    torch.testing.assert_close(logps_BK.double(), expected, rtol=1e-5, atol=0)
    ours = dict(policy.model.named_parameters())
    for name, parameter in reference.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(ours[name].grad.double(), parameter.grad, rtol=0, atol=1e-5 * max(scale, 1e-3))


@pytest.mark.parametrize("bias", [False, True])
def test_chunks_of_the_output_layer_change_nothing(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", 3 * 50)
    torch.manual_seed(1)
    layer = torch.nn.Linear(8, 50, bias=bias).double()
    hidden_NH = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    targets_N = torch.randint(50, (10,))
    weights_N = torch.randn(10, dtype=torch.float64)

    logps_N = layer(hidden_NH).log_softmax(-1).gather(1, targets_N[:, None]).squeeze(1)
    wanted = torch.autograd.grad((logps_N * weights_N).sum(), [hidden_NH, *layer.parameters()])

    head = logprobs.LogprobHead(layer)
    got_N = head(hidden_NH, targets_N)
    got = torch.autograd.grad((got_N * weights_N).sum(), [hidden_NH, *head.parameters()])

    torch.testing.assert_close(got_N.double(), logps_N, rtol=1e-5, atol=1e-6)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_rank_is_the_hinge_on_sequence_log_likelihoods_with_its_anchor() -> None:
    logps_BK = torch.tensor([[-3.0, -5.0], [-4.0, -3.5], [-1.0, -1.5]], dtype=torch.float64)
    lengths_BK = torch.tensor([[3, 5], [2, 2], [1, 1]])
    hinge = group_losses(Loss(name="rank", margin=1.0, mle_weight=0.0), logps_BK, lengths_BK)
    assert hinge.tolist() == [0.0, 1.5, 0.5]
    anchored = group_losses(Loss(name="rank", margin=1.0, mle_weight=2.0), logps_BK, lengths_BK)
    assert anchored.tolist() == [6.0, 9.5, 2.5]
    means = group_losses(Loss(name="rank", margin=1.0, mle_weight=0.0, length_normalize=True), logps_BK, lengths_BK)
    assert means.tolist() == [1.0, 1.25, 0.5]
    assert group_losses(Loss(name="mle"), logps_BK, lengths_BK).tolist() == [3.0, 4.0, 1.0]
