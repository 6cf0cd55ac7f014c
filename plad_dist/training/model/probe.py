"""Probe of an untested model family: its logits must be those that the trainer computes.

Shape suffixes: T tokens of a response, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from plad_dist.errors import UserError, first_line
from plad_dist.training.batches.micro_batch import Group, single_pair
from plad_dist.training.batches.packing import collate
from plad_dist.training.model.attention import Attention
from plad_dist.training.model.policy import Policy

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
_TOLERANCE = 1e-3  # relative


def check_family(config: Any, attention: Attention) -> None:
    """Compare the log-likelihoods of a :class:`Policy` with the plain model's.

    Both run a random model of the family with one layer.

    Raises:
        UserError: the log-likelihoods differ, so training would optimise another objective than the
            configured one; or no small model of the family can be run.
    """
    from transformers import AutoModelForCausalLM

    small_config = _small_config(config)
    group = single_pair([5, 6, 7], [8, 9, 2], [10, 2])
    try:
        with torch.random.fork_rng(), torch.no_grad():
            model = AutoModelForCausalLM.from_config(small_config, dtype=torch.float32).eval()
            expected = _plain_logps(model, group)
            actual = Policy(model, attention)(collate([group], filler=0, layout=attention.layout)).tolist()
    except Exception as error:
        raise UserError(
            f"{config.model_type} models cannot be trained: a small model of the family cannot be run: "
            f"{first_line(error)}"
        ) from error
    if any(abs(a - b) > _TOLERANCE * abs(b) for a, b in zip(actual, expected, strict=True)):
        raise UserError(
            f"{config.model_type} models cannot be trained: their output layer is not a plain one, so the trainer's "
            "log-likelihoods would differ from the model's"
        )


def _small_config(config: Any) -> Any:
    """Return a copy of a transformers config with one layer and 64 tokens."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.vocab_size, text.pad_token_id, text.bos_token_id, text.eos_token_id = 64, 0, 1, 2
    for name in _LAYER_COUNTS:
        if hasattr(text, name):
            setattr(text, name, 1)
    if vars(text).get("layer_types"):
        text.layer_types = text.layer_types[:1]
    return small


def _plain_logps(model: Any, group: Group) -> list[float]:
    """Return the log-likelihood of each response, from a forward pass of its separate sequence."""
    logps = []
    for response in group.responses:
        ids = torch.tensor([[*group.prompt, *response]])
        logps_TV = model(input_ids=ids).logits[0, len(group.prompt) - 1 : -1].log_softmax(-1)
        logps.append(float(logps_TV.gather(1, torch.tensor(response)[:, None]).sum()))
    return logps
