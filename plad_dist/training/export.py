"""A trained model as a Hugging Face folder that transformers and vLLM load."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import transformers

from plad_dist.data.models import commit_model
from plad_dist.data.templates import load_tokenizer

if TYPE_CHECKING:
    from plad_dist.training.checkpoints import TrainState
    from plad_dist.training.loop import PhaseJob


def export_model(engine: Any, job: PhaseJob, state: TrainState) -> None:
    """Write ``models/<phase>/`` from all ranks, atomically, with the tokenizer and generation config of the start."""
    weights = gather_weights(engine)
    if dist.get_rank() == 0:
        final = job.folder("models")
        temporary = final.with_name(f".writing-{final.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        model = engine.module.model
        model.config.use_cache = True
        transformers.utils.logging.disable_progress_bar()
        model.save_pretrained(temporary, state_dict=weights, safe_serialization=True)
        load_tokenizer(job.start, job.settings).save_pretrained(temporary)
        commit_model(temporary, final, job.fingerprint, asdict(state))
    dist.barrier()


def gather_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The whole state dict on the first rank, one parameter at a time; empty on the others. Tied weights appear once."""
    import deepspeed

    weights: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().cpu().clone()
    if dist.get_rank() == 0:
        weights |= {name: value.detach().cpu() for name, value in engine.module.model.named_buffers() if value.is_leaf}
        persistent = engine.module.model.state_dict().keys()
        weights = {name: value for name, value in weights.items() if name in persistent}
    return weights
