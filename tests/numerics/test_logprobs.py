"""Log-likelihoods and gradients of packed rows, compared with separate sequences in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoConfig, AutoModelForCausalLM

from plad_dist.config import Loss
from plad_dist.errors import UserError
from plad_dist.training.batches.micro_batch import Group, Layout, single_pair
from plad_dist.training.batches.packing import collate
from plad_dist.training.losses import group_losses
from plad_dist.training.model import logprobs
from plad_dist.training.model.attention import Attention, attention_of, check_rope
from plad_dist.training.model.policy import Policy, logit_scaling
from plad_dist.training.model.probe import check_family
from plad_dist.training.model.tree_attention import FLEX_ATTENTION

GROUPS = [
    single_pair([5, 6, 7, 8, 9], [10, 11, 12, 2], [20, 21, 2]),
    single_pair([4], [30, 2], [31, 32, 33, 34, 2]),
    Group([9, 8, 7], [[40], [41, 42], [43, 44, 45], [46, 2]], pairs=[(0, 2, 1), (1, 3, 1)], anchored=(0, 1)),
    single_pair(list(range(3, 40)), list(range(40, 60)), list(range(50, 62))),
]
SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 97, "intermediate_size": 48,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "head_dim": 16,
}  # fmt: skip
OPT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 97, "ffn_dim": 48,
    "max_position_embeddings": 128, "word_embed_proj_dim": 16,
}  # fmt: skip
NEO = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 97, "intermediate_size": 48,
    "max_position_embeddings": 128,
}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SHAPE),
    "llama, untied, biased": ("llama", SHAPE | {"tie_word_embeddings": False, "attention_bias": True}),
    "mistral": ("mistral", SHAPE | {"sliding_window": None}),
    "mistral with a sliding window": ("mistral", SHAPE | {"sliding_window": 6}),
    "qwen2": ("qwen2", SHAPE),
    "qwen2 with a sliding window": ("qwen2", SHAPE | SLIDING | {"use_sliding_window": True}),
    "qwen3": ("qwen3", SHAPE),
    "gemma": ("gemma", SHAPE),
    "gemma2": ("gemma2", SHAPE | SLIDING | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", SHAPE | SLIDING),
    "granite": ("granite", SHAPE | {"logits_scaling": 4.0}),
    "cohere": ("cohere", SHAPE | {"logit_scale": 0.25}),
    "gpt_neox": ("gpt_neox", SHAPE),
    "gpt_neo": ("gpt_neo", NEO | {"attention_types": [[["global"], 2]]}),
    "gpt_neo, local": ("gpt_neo", NEO | {"attention_types": [[["global", "local"], 1]], "window_size": 100}),
    "gpt_neo, windows shorter than rows": (
        "gpt_neo", NEO | {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "opt": ("opt", OPT),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 97}),
}  # fmt: skip
GROUP_LIMIT = 100  # tokens; the longest group has fewer
SHARING_FAMILIES = set(FAMILIES) - {"gpt_neo, windows shorter than rows", "bloom"}


def config_of(name: str) -> Any:
    model_type, shape = FAMILIES[name]
    return AutoConfig.for_model(model_type, **shape)


def make(name: str, implementation: str | None = "sdpa") -> Any:
    """Return a tiny random model whose logits are large enough for soft caps to matter."""
    torch.manual_seed(0)
    config = config_of(name)
    config.initializer_range = 0.3
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation)
    return model.eval()


def separate_logps(model: Any, groups: list[Group]) -> Tensor:
    """Return the log-likelihood of every response, from forward passes of separate sequences."""
    sums = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response]])
            logps = model(input_ids=ids).logits[0].log_softmax(-1)
            start = len(group.prompt)
            targets = torch.tensor(response)
            sums.append(logps[start - 1 : start - 1 + len(response)].gather(1, targets[:, None]).sum())
    return torch.stack(sums)


@pytest.mark.parametrize("piecewise", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logps_and_gradients_equal_those_of_separate_sequences(family: str, piecewise: bool) -> None:
    attention = attention_of(config_of(family), GROUP_LIMIT)
    if piecewise and attention.layout.min_piece_tokens is None:
        pytest.skip("its attention is never computed piece by piece")
    if piecewise:
        attention = replace(attention, layout=replace(attention.layout, min_piece_tokens=1))
    assert attention.layout.shares_prompts == (family in SHARING_FAMILIES)
    assert (attention.no_sharing_reason is None) == attention.layout.shares_prompts
    model, exact_model = make(family, attention.implementation), make(family, "eager").double()
    loss = Loss(name="rank", margin=1.0, mle_weight=0.5)

    expected_S = separate_logps(exact_model, GROUPS)
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


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_an_unknown_family_is_probed_before_it_is_trained(family: str) -> None:
    config = AutoConfig.for_model(
        family, **({"hidden_size": 32, "n_head": 2} if family == "bloom" else {"hidden_size": 32})
    )
    attention = attention_of(config, None)
    assert not attention.takes_mask
    check_family(config, attention)


def test_a_family_whose_output_layer_is_not_plain_is_refused() -> None:
    """The logits of this family have a factor that the trainer does not know."""
    config = AutoConfig.for_model("hyperclovax", **SHAPE, logits_scaling=2.0)
    with pytest.raises(UserError, match="hyperclovax models cannot be trained: their output layer is not a plain one"):
        check_family(config, attention_of(config, None))


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
    policy = Policy(model, attention_of(model.config, None))
    torch.testing.assert_close(policy(collate(GROUPS, filler=0)), expected_S, rtol=1e-5, atol=0)


def test_scale_and_softcap_of_logits_come_from_the_family() -> None:
    shapes = {name: logit_scaling(config_of(name)) for name in ("gemma2", "granite", "cohere", "llama")}
    assert shapes == {"gemma2": (1.0, 3.0), "granite": (0.25, None), "cohere": (0.25, None), "llama": (1.0, None)}
