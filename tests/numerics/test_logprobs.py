"""Log-likelihoods and gradients of packed rows, compared with separate sequences in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoConfig

from plad_dist.errors import UserError
from plad_dist.training.batches.micro_batch import Layout
from plad_dist.training.batches.packing import collate
from plad_dist.training.model import logprobs
from plad_dist.training.model.attention import Attention, attention_of, check_rope
from plad_dist.training.model.policy import Policy, logit_scaling
from plad_dist.training.model.tree_attention import FLEX_ATTENTION
from tests.small_families import GROUPS, config_of, make, separate_logps


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(shares_prompts=False), Layout(shares_prompts=False, packs_rows=False), Layout(row_tokens=512)],
)
def test_every_layout_gives_the_same_logps(layout: Layout) -> None:
    policy = Policy(make("qwen3"), Attention(layout, "sdpa", has_mask_per_layer_type=True))
    batch = collate(GROUPS, filler=0, layout=layout)
    torch.testing.assert_close(
        policy(batch).double(), separate_logps(make("qwen3").double(), GROUPS), rtol=1e-5, atol=0
    )
    assert batch.tokens == sum(layout.tokens(group) for group in GROUPS)


@pytest.mark.parametrize("window", [None, 5])
def test_flex_attentions_block_mask_follows_the_rule_of_the_dense_mask(window: int | None) -> None:
    """The rule of the mask does not depend on the device, so no GPU is needed."""
    from plad_dist.training.model.attention import _block_mask, _dense_mask, _tree_rule

    batch = collate(GROUPS, filler=0, layout=Layout(row_tokens=256))
    dense = _dense_mask(batch, window)[:, 0]
    rows, tokens = batch.input_ids_RT.shape
    expected = torch.zeros_like(dense)
    sees = _tree_rule(batch, window)
    for row in range(rows):
        for query in range(tokens):
            for key in range(tokens):
                expected[row, query, key] = bool(sees(row, 0, query, key))
    assert torch.equal(expected, dense)
    blocks = _block_mask(batch, window)
    assert blocks.shape == (rows, 1, tokens, tokens)


def test_flex_attention_gives_the_logps_of_separate_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.flex_attention import WrappedFlexAttention

    model = make("llama", FLEX_ATTENTION).requires_grad_(False)  # no backward pass on a CPU
    batch = collate(GROUPS, filler=0, layout=Layout(row_tokens=256))
    # The uncompiled implementation, because the compiler is not under test.
    monkeypatch.setattr(WrappedFlexAttention, "__init__", lambda self, training: None)
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: flex_attention)
    logps_S = Policy(model, Attention(Layout(), FLEX_ATTENTION))(batch)
    torch.testing.assert_close(logps_S.double(), separate_logps(make("llama").double(), GROUPS), rtol=1e-5, atol=0)


# -- the output layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 2.0), (0.5, 1.5)])
def test_the_log_prob_head_equals_the_plain_output_layer_in_chunks(
    monkeypatch: pytest.MonkeyPatch, bias: bool, scale: float, softcap: float | None
) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", 3 * 50)
    torch.manual_seed(1)
    layer = torch.nn.Linear(8, 50, bias=bias).double()
    hidden_NH = 3 * torch.randn(10, 8, dtype=torch.float64)
    hidden_NH.requires_grad_()
    targets_N = torch.randint(50, (10,))
    weights_N = torch.randn(10, dtype=torch.float64)
    weights_N[2:5] = 0.0  # tokens of satisfied pairs

    logits_NV = layer(hidden_NH) * scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    logps_N = logits_NV.log_softmax(-1).gather(1, targets_N[:, None]).squeeze(1)
    expected_grads = torch.autograd.grad((logps_N * weights_N).sum(), [hidden_NH, *layer.parameters()])

    head = logprobs.LogprobHead(layer, scale, softcap)
    head_logps_N = head(hidden_NH, targets_N)
    head_grads = torch.autograd.grad((head_logps_N * weights_N).sum(), [hidden_NH, *head.parameters()])

    torch.testing.assert_close(head_logps_N.double(), logps_N, rtol=1e-5, atol=1e-6)
    for grad, expected in zip(head_grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


def test_no_tensor_holds_the_logits_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", 64 * 1000)
    sizes: list[int] = []

    class TensorSizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                sizes.append(result.numel())
            return result

    layer = torch.nn.Linear(4, 1000, bias=False)
    hidden_NH = torch.randn(1024, 4, requires_grad=True)
    with TensorSizes():
        logprobs.LogprobHead(layer)(hidden_NH, torch.randint(1000, (1024,))).sum().backward()
    assert max(sizes) <= 64 * 1000


def test_the_backward_of_the_output_layer_skips_satisfied_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk_tokens: list[int] = []
    compute_logits = logprobs._logits

    def counting(hidden_CH: Tensor, *arguments: Any) -> Tensor:
        chunk_tokens.append(len(hidden_CH))
        return compute_logits(hidden_CH, *arguments)

    monkeypatch.setattr(logprobs, "_logits", counting)
    head = logprobs.LogprobHead(torch.nn.Linear(4, 9))
    logps_N = head(torch.randn(6, 4, requires_grad=True), torch.randint(9, (6,)))
    (logps_N * torch.tensor([1.0, 0, 0, 2.0, 0, 0])).sum().backward()
    assert chunk_tokens == [6, 2]


def test_positions_that_depend_on_the_batch_are_refused() -> None:
    config = AutoConfig.for_model("llama", max_position_embeddings=4096)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    check_rope(config, 4096, "student")
    with pytest.raises(UserError, match=r"student\.max_length to at most 4096"):
        check_rope(config, 8192, "student")
    for family in ("gemma3", "bloom"):  # positions in the text config, and no rotary embedding
        check_rope(AutoConfig.for_model(family), 8192, "student")


def test_a_padded_vocabulary_is_normalised_over_as_in_the_model() -> None:
    """Tokens that no tokenizer uses are in the model's softmax, and therefore in the head's."""
    model = make("llama")
    model.resize_token_embeddings(128)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    expected_S = separate_logps(model, GROUPS)
    policy = Policy(model, attention_of(model.config, "tree", None))
    torch.testing.assert_close(policy(collate(GROUPS, filler=0)), expected_S, rtol=1e-5, atol=0)


def test_scale_and_softcap_of_logits_come_from_the_family() -> None:
    shapes = {name: logit_scaling(config_of(name)) for name in ("gemma2", "granite", "cohere", "llama")}
    assert shapes == {"gemma2": (1.0, 3.0), "granite": (0.25, None), "cohere": (0.25, None), "llama": (1.0, None)}
