"""The student as the trainer sees it: micro-batches in, sequence log-likelihoods out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plad_dist.errors import UserError
from plad_dist.training.batching import MicroBatch, tree_mask
from plad_dist.training.logprobs import LogprobHead


class Policy(nn.Module):
    """A transformers causal language model whose output layer gives log-probabilities of targets."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.model.set_output_embeddings(LogprobHead(model.get_output_embeddings()))

    def forward(self, batch: MicroBatch) -> Tensor:
        """Sequence log-likelihoods ``logps_BK`` of every response, in float32."""
        hidden_RTH = self.model.base_model(
            input_ids=batch.input_ids_RT,
            position_ids=batch.position_ids_RT,
            attention_mask=tree_mask(batch.segments_RT, batch.branches_RT),
            use_cache=False,
        ).last_hidden_state
        hidden_NH = hidden_RTH.flatten(0, 1)[batch.predictors_N]
        logps_N = self.model.get_output_embeddings()(hidden_NH, batch.targets_N)
        sums = torch.zeros(batch.lengths_BK.numel(), dtype=logps_N.dtype, device=logps_N.device)
        return sums.index_add(0, batch.responses_N, logps_N).view(batch.lengths_BK.shape)


# Architectures whose packed log-likelihoods are tested against sequences standing alone.
TRAINABLE = ("gpt_neox", "llama", "mistral", "qwen2", "qwen3")


def check_trainable(config: Any, role: str) -> None:
    """Raise :class:`UserError` for a model whose log-likelihoods a packed row would not give exactly."""
    if config.model_type not in TRAINABLE:
        raise UserError(
            f"{role}: training {config.model_type} models is not supported yet; supported: {', '.join(TRAINABLE)}"
        )
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise UserError(f"{role}: models with a sliding attention window are not supported yet ({config.model_type})")


def without_dropout(config: Any) -> Any:
    """The config with every dropout at 0: a step must be the same at any number of workers and after a resume."""
    for name in vars(config):
        if "dropout" in name or name.endswith("pdrop"):
            setattr(config, name, 0.0)
    return config
