"""Scores by a reward model: a classifier with one output that reads the whole conversation."""

from __future__ import annotations

import math
from typing import Any

from plad_dist.config import Model, RewardModel
from plad_dist.data.conversation import Conversation
from plad_dist.data.model_checks import check_vocabulary
from plad_dist.data.models import (
    check_max_length,
    check_weights,
    context_length,
    load_model_config,
    resolve_model,
    vocabulary_size,
)
from plad_dist.data.templates import Renderer
from plad_dist.errors import RunFailed, UserError, first_line
from plad_dist.pairing.answer import Answer

_KEY = "pairing.reward_model"
_MAX_LENGTH = 2048


def open_reward_model(settings: RewardModel, key: str = _KEY) -> tuple[Renderer, int]:
    """Return the renderer of a reward model, and its maximum conversation in tokens. Loads no
    weights.

    Args:
        key: config section of the model, for messages.

    Raises:
        UserError: the model does not exist, or has no safetensors weights, no template, or not
            exactly one output.
    """
    model = as_model(settings)
    path = resolve_model(model)
    check_max_length(path, settings, key)
    labels = load_model_config(path, model).num_labels
    if labels != 1:
        raise UserError(f"{key}: {path}: expected a classifier with one output, got {labels} outputs")
    check_weights(path)
    renderer = Renderer(path, model, generates=False)
    check_vocabulary(path, renderer, vocabulary_size(load_model_config(path, model)))
    return renderer, context_length(path, model)


def as_model(settings: RewardModel) -> Model:
    """Return the config section of a reward model in the form of any other model."""
    fields = settings.model_dump(include={"path", "revision", "template", "trust_remote_code"})
    model = Model(**fields, max_length=settings.max_length or _MAX_LENGTH)
    model._date = settings._date
    return model


class RewardScorer:
    """Scores by a reward model, in bfloat16 on a GPU if one is available, or else in float32 on the
    CPU.

    Args:
        key: config section of the model, for messages.

    Raises:
        UserError: the model cannot be used.
    """

    def __init__(self, settings: RewardModel, key: str = _KEY) -> None:
        import torch

        self._key = key
        self._renderer, self._max_length = open_reward_model(settings, key)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = _load(self._renderer.model, settings, self._device, key)
        self._own_padding: int | None = self._model.config.get_text_config().pad_token_id
        self._batch_size = settings.batch_size

    def __call__(self, answers: list[Answer]) -> list[float | None]:
        """Return a score for each response, None for conversations that exceed the maximum length.

        Equal conversations are computed once.
        """
        conversations = [
            Conversation(answer["messages"], answer["tools"]).with_response(answer["response"]) for answer in answers
        ]
        indices: dict[tuple[int, ...], list[int]] = {}
        for index, tokens in enumerate(self._renderer.prompt_ids(conversations)):
            if 0 < len(tokens) <= self._max_length:
                indices.setdefault(tuple(tokens), []).append(index)
        scores: list[float | None] = [None] * len(answers)
        distinct = sorted(indices, key=len)  # similar lengths share a batch, which saves padding
        for start in range(0, len(distinct), self._batch_size):
            batch = distinct[start : start + self._batch_size]
            for ids, score in zip(batch, self._rewards(batch), strict=True):
                for index in indices[ids]:
                    scores[index] = score
        return scores

    def _rewards(self, batch: list[tuple[int, ...]]) -> list[float]:
        import torch

        tokens_BT = torch.full((len(batch), max(map(len, batch))), self._padding(batch))
        mask_BT = torch.zeros_like(tokens_BT)
        for row, ids in enumerate(batch):
            tokens_BT[row, : len(ids)] = torch.tensor(ids)
            mask_BT[row, : len(ids)] = 1
        with torch.inference_mode():
            logits_B1 = self._model(
                input_ids=tokens_BT.to(self._device), attention_mask=mask_BT.to(self._device)
            ).logits
        scores: list[float] = logits_B1.float().squeeze(-1).tolist()
        if not all(map(math.isfinite, scores)):
            raise RunFailed(f"{self._key}: {self._renderer.model}: returned a score that is not a finite number")
        return scores

    def _padding(self, batch: list[tuple[int, ...]]) -> int:
        """Return the padding token of a batch.

        Decoders score the last token that is not padding. If the model defines no padding token, it
        must therefore be a token with which no conversation of the batch ends.
        """
        if self._own_padding is not None:
            return self._own_padding
        tokenizer, last_tokens = self._renderer.tokenizer, {ids[-1] for ids in batch}
        choices = (tokenizer.pad_token_id, tokenizer.eos_token_id, *range(len(last_tokens) + 1))
        padding = next(int(token) for token in choices if token is not None and token not in last_tokens)
        self._model.config.get_text_config().pad_token_id = padding
        return padding


def _load(path: str, settings: RewardModel, device: Any, key: str) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            path,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}: {path}: cannot be loaded: {first_line(error)}") from None
    if loading["missing_keys"]:
        raise UserError(
            f"{key}: {path}: is not a trained classifier: it has no weights for "
            f"{', '.join(sorted(loading['missing_keys']))[:200]}"
        )
    return model.to(device)
