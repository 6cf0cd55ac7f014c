"""The trained model as the trainer calls it: from micro-batches to sequence log-likelihoods.

Shape suffixes: R rows, T tokens of a row, H hidden, N predicted tokens, S responses, L tokens of
the longest response.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from plad_dist.training.batches.micro_batch import EncoderRows, MicroBatch
from plad_dist.training.model.attention import Attention, attention_masks, encoder_decoder_masks
from plad_dist.training.model.balance import ExpertBalance
from plad_dist.training.model.logprobs import LogprobHead

_SCALED_IF_TIED = ("switch_transformers", "umt5")  # their configs do not name the scale


class Policy(nn.Module):
    """A language model of transformers with a :class:`LogprobHead` as its output layer.

    Args:
        attention: requirements of the model's attention; micro-batches must have its layout.
        balance: auxiliary loss of the model's routers, or None.
    """

    def __init__(self, model: Any, attention: Attention, balance: ExpertBalance | None = None) -> None:
        super().__init__()
        self.model, self.attention, self.balance = model, attention, balance
        bias = getattr(model, "final_logits_bias", None)
        head = LogprobHead(model.get_output_embeddings(), *logit_scaling(model.config), bias=bias)
        self.model.set_output_embeddings(head)
        self._options: dict[str, None] = {}
        if not model.config.is_encoder_decoder:
            # Otherwise Gemma 4 would slice the masks of its last layers.
            takes_logits_to_keep = "logits_to_keep" in inspect.signature(self._base.forward).parameters
            self._options = {"logits_to_keep": None} if takes_logits_to_keep else {}

    @property
    def _base(self) -> Any:
        """The model without its output layer."""
        base = self.model.base_model
        # Llama 4's class does not name the attribute that holds its base.
        return self.model.model if base is self.model else base

    def forward(self, batch: MicroBatch) -> Tensor:
        """Return the sequence log-likelihoods ``logps_S`` of all responses, in float32."""
        head = self.model.get_output_embeddings()
        hidden_RTH = self._hidden(batch, head.dtype) if batch.encoder is None else self._decoded(batch, batch.encoder)
        hidden_NH = hidden_RTH.flatten(0, 1)[batch.predictors_N]
        logps_N = head(hidden_NH, batch.targets_N)
        # Padded and then summed, because a scattered sum on a GPU adds in a different order every
        # time.
        logps_SL = logps_N.new_zeros(len(batch.lengths_S), batch.longest_response)
        return logps_SL.index_put((batch.responses_N, batch.offsets_N), logps_N).sum(1)

    def _hidden(self, batch: MicroBatch, dtype: torch.dtype) -> Tensor:
        """Return the last hidden states of a model without an encoder."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids_RT, "use_cache": False, **self._options}
        if self.attention.takes_mask:
            inputs |= {
                "position_ids": batch.position_ids_RT,
                "attention_mask": attention_masks(batch, self.attention, dtype),
            }
        hidden_RTH: Tensor = self._base(**inputs).last_hidden_state
        return hidden_RTH

    def _decoded(self, batch: MicroBatch, encoder: EncoderRows) -> Tensor:
        """Return the last hidden states of a decoder, after its encoder has read the prompts."""
        masks = encoder_decoder_masks(batch, encoder, self.attention)
        prompts = self.model.get_encoder()(input_ids=encoder.input_ids_RE, attention_mask=masks.encoder)
        hidden_RTH: Tensor = self.model.get_decoder()(
            input_ids=batch.input_ids_RT,
            attention_mask=masks.decoder,
            encoder_hidden_states=prompts.last_hidden_state[encoder.rows_D],
            encoder_attention_mask=masks.cross,
            use_cache=False,
        ).last_hidden_state
        return hidden_RTH


def logit_scaling(config: Any) -> tuple[float, float | None]:
    """Return the factor on a model's logits, and the soft cap of its logits (None for none)."""
    config = config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if divisor := getattr(config, "logits_scaling", None):
        scale /= float(divisor)
    is_tied = config.model_type in _SCALED_IF_TIED and config.tie_word_embeddings
    if is_tied or getattr(config, "scale_decoder_outputs", False):  # T5 with tied embeddings
        scale *= float(config.d_model) ** -0.5
    return scale, getattr(config, "final_logit_softcapping", None)


def disable_dropout(config: Any) -> Any:
    """Set every dropout of a transformers config to 0, in place, and return the config.

    With dropout, a step would differ with the number of workers and after a resume.
    """
    for name in vars(config):
        if "dropout" in name or "layerdrop" in name or name.endswith("pdrop"):
            setattr(config, name, 0.0)
    return config
