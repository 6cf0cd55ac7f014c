"""Whether a family that nobody has tested makes its logits as the trainer takes them to be made."""

from __future__ import annotations

import copy
from typing import Any

import torch

from plad_dist.errors import UserError, first_line
from plad_dist.training.batches.packing import collate, plain_pair
from plad_dist.training.model.attention import Attention
from plad_dist.training.model.policy import Policy

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


def check_family(config: Any, attention: Attention) -> None:
    """Compare log-likelihoods with the plain model's, on a random model of the family with one layer and few words.

    Raises:
        UserError: they differ, so that training would have another objective than it says; or no such model can be made.
    """
    from transformers import AutoModelForCausalLM

    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.vocab_size, text.pad_token_id, text.bos_token_id, text.eos_token_id = 64, 0, 1, 2
    for name in _LAYERS:
        if hasattr(text, name):
            setattr(text, name, 1)
    if vars(text).get("layer_types"):
        text.layer_types = text.layer_types[:1]
    group = plain_pair([5, 6, 7], [8, 9, 2], [10, 2])
    try:
        with torch.random.fork_rng(), torch.no_grad():
            model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
            expected = []
            for response in group.responses:
                ids = torch.tensor([[*group.prompt, *response]])
                logps_TV = model(input_ids=ids).logits[0, len(group.prompt) - 1 : -1].log_softmax(-1)
                expected.append(float(logps_TV.gather(1, torch.tensor(response)[:, None]).sum()))
            found = Policy(model, attention)(collate([group], filler=0, layout=attention.layout)).tolist()
    except Exception as error:
        raise UserError(
            f"{config.model_type} models cannot be trained: a small one of the family could not be tried: {first_line(error)}"
        ) from error
    if any(abs(one - other) > 1e-3 * abs(other) for one, other in zip(found, expected, strict=True)):
        raise UserError(
            f"{config.model_type} models cannot be trained: their output layer is not a plain one, so that the trainer's "
            "log-likelihoods would not be the model's"
        )
