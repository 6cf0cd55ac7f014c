"""Planned memory of workers agrees with measurements, and never grows with more workers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plad_dist.config import Model, Optimizer, ScratchModel, Training
from plad_dist.planning.sizes import ModelSize, size_of
from plad_dist.planning.training_memory import training_memory


def llama(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> ModelSize:
    """Return the size of a Llama model with a vocabulary of 32,000 tokens."""
    architecture = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }  # fmt: skip
    scratch = ScratchModel(architecture=architecture, vocab_size=32_000)
    return size_of(Model(scratch=scratch, template="{{ messages }}"))


@pytest.mark.parametrize(
    ("shape", "gradient_checkpointing", "measured_gb"),
    [  # on one H200, micro-batches of 16,384 tokens: docs/benchmarks.md
        ((2048, 5632, 22, 32, 4), True, 28.1),
        ((2048, 5632, 22, 32, 4), False, 55.0),
        ((4096, 11008, 32, 32, 32), True, 130.7),
    ],
)
def test_gpu_memory_is_within_a_tenth_of_the_measured(
    shape: tuple[int, int, int, int, int], gradient_checkpointing: bool, measured_gb: float
) -> None:
    training = Training(micro_batch_tokens=16_384, gradient_checkpointing=gradient_checkpointing)
    memory = training_memory(llama(*shape), training, Optimizer(), 1, "gpu")
    allocated = memory.device - memory.parts["CUDA and NCCL"]  # which PyTorch's own count leaves out
    assert abs(allocated / 1e9 - measured_gb) <= 0.1 * measured_gb


@given(workers=st.integers(1, 512), tokens=st.sampled_from([1024, 4096, 16_384]), gradient_checkpointing=st.booleans())
@settings(max_examples=50)
def test_more_workers_and_shorter_micro_batches_never_take_more(
    workers: int, tokens: int, gradient_checkpointing: bool
) -> None:
    size = llama(1024, 2816, 8, 16, 4)

    def device_bytes(workers: int, tokens: int) -> float:
        training = Training(micro_batch_tokens=tokens, gradient_checkpointing=gradient_checkpointing)
        return training_memory(size, training, Optimizer(), workers, "gpu").device

    assert device_bytes(workers + 1, tokens) <= device_bytes(workers, tokens)
    assert device_bytes(workers, tokens // 2) <= device_bytes(workers, tokens)
