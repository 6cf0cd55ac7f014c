"""The student as the trainer sees it: micro-batches in, sequence log-likelihoods out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from plad_dist.training.batches.packing import MicroBatch
from plad_dist.training.model.attention import Attention, masks_of
from plad_dist.training.model.logprobs import LogprobHead


class Policy(nn.Module):
    """A transformers causal language model whose output layer gives log-probabilities of targets.

    Args:
        attention: how the model attends; the micro-batches must be in its layout.
    """

    def __init__(self, model: Any, attention: Attention) -> None:
        super().__init__()
        self.model, self.attention = model, attention
        head = LogprobHead(model.get_output_embeddings(), *logit_shape(model.config))
        self.model.set_output_embeddings(head)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Sequence log-likelihoods ``logps_S`` of every response, in float32."""
        head = self.model.get_output_embeddings()
        inputs: dict[str, Any] = {"input_ids": batch.input_ids_RT, "use_cache": False}
        if self.attention.ready:
            inputs |= {
                "position_ids": batch.position_ids_RT,
                "attention_mask": masks_of(batch, self.attention, head.dtype),
            }
        hidden_RTH = self.model.base_model(**inputs).last_hidden_state
        hidden_NH = hidden_RTH.flatten(0, 1)[batch.predictors_N]
        logps_N = head(hidden_NH, batch.targets_N)
        # A place for each: scattered sums are added up in another order every time on a GPU.
        padded_SL = logps_N.new_zeros(len(batch.lengths_S), batch.longest)
        return padded_SL.index_put((batch.responses_N, batch.places_N), logps_N).sum(1)


def logit_shape(config: Any) -> tuple[float, float | None]:
    """The factor on a model's logits, and the bound that a tanh holds them under (None for none)."""
    config = config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if scaling := getattr(config, "logits_scaling", None):
        scale /= float(scaling)
    return scale, getattr(config, "final_logit_softcapping", None)


def without_dropout(config: Any) -> Any:
    """The config with every dropout at 0: a step must be the same at any number of workers and after a resume."""
    for name in vars(config):
        if "dropout" in name or name.endswith("pdrop") or name == "layerdrop":
            setattr(config, name, 0.0)
    return config
