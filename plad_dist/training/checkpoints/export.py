"""Export of a trained model as a Hugging Face folder that transformers and vLLM load."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from plad_dist.data.models import commit_model, load_model_config, model_fingerprint, unfinished_model
from plad_dist.data.templates import Renderer, load_tokenizer
from plad_dist.errors import RunFailed
from plad_dist.training.checkpoints.attempts import Attempt
from plad_dist.training.checkpoints.store import TrainState
from plad_dist.training.job import PhaseJob
from plad_dist.training.model.adapters import (
    adapted_layers,
    adapted_parameters,
    low_rank_matrices,
    merged,
    unadapted_name,
)

_EXPORT_TIMEOUT_S, _POLL_S = 7200.0, 0.2


def export_model(engine: Any, job: PhaseJob, state: TrainState, attempt: Attempt) -> None:
    """Write ``models/<phase>/`` atomically, from all ranks.

    The tokenizer and the generation config are those of the starting model.

    Nothing is written if a later attempt has started.

    Raises:
        RunFailed: the model cannot be written, or the first rank did not write it in time.
    """
    weights = gather_weights(engine)
    adapter = _gather_adapter(engine) if job.lora is not None and job.lora.save_adapter else {}
    if dist.get_rank() == 0:
        final = job.folder("models")
        if attempt.superseded() is None:
            # By attempts that died while they wrote; `teacher-*` would match `teacher-init` too.
            for abandoned in final.parent.glob(f".writing-{final.name}-attempt-*"):
                shutil.rmtree(abandoned, ignore_errors=True)
        model = engine.module.model
        model.config.use_cache = True
        transformers.utils.logging.disable_progress_bar()
        with unfinished_model(final, attempt.name) as temporary:
            model.save_pretrained(temporary, state_dict=weights, safe_serialization=True)
            _tokenizer(job).save_pretrained(temporary)
            if adapter:
                _save_adapter(temporary / "adapter", adapter, adapted_layers(model), job)
            if attempt.superseded() is None:
                commit_model(temporary, final, job.fingerprint, asdict(state) | {"inputs": job.inputs})
    else:
        _wait_for_model(job, attempt)
    dist.barrier()


def _wait_for_model(job: PhaseJob, attempt: Attempt) -> None:
    """Poll until the first rank has committed the model.

    A collective would time out during a large export.
    """
    until = time.monotonic() + _EXPORT_TIMEOUT_S
    while model_fingerprint(job.folder("models")) != job.fingerprint and attempt.superseded() is None:
        if time.monotonic() > until:
            raise RunFailed(
                f"{job.folder('models')}: not written within {_EXPORT_TIMEOUT_S:.0f} s; the first worker does not "
                "respond"
            )
        time.sleep(_POLL_S)


def _tokenizer(job: PhaseJob) -> Any:
    """Return the tokenizer of the start.

    A template of the config becomes its chat template, for servers, with `template_kwargs` as
    defaults.
    """
    tokenizer = load_tokenizer(job.start, job.settings)
    if job.settings.template is not None:
        tokenizer.chat_template = Renderer(job.start, job.settings).standalone_template()
    if isinstance(tokenizer.chat_template, str):
        defaults = (
            f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}"
            for name, value in job.settings.template_kwargs.items()
        )
        tokenizer.chat_template = "".join(defaults) + tokenizer.chat_template
    return tokenizer


def gather_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Gather the whole state dict on the first rank, layer by layer; return an empty one elsewhere.

    Tied weights appear once. Adapters are merged into the weights that they adapt:
    ``W + scale * B A``.
    """
    import deepspeed

    is_first = dist.get_rank() == 0
    model = engine.module.model
    engine.empty_partition_cache()  # an evaluation leaves prefetched parameters in flight
    weights: dict[str, torch.Tensor] = {}
    adapted = adapted_parameters(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        module = adapted.get(name)
        low_rank = [] if module is None else low_rank_matrices(module)
        with deepspeed.zero.GatheredParameters([parameter, *low_rank]):
            if is_first:
                weight = parameter.detach().cpu().clone()
                weights[unadapted_name(name)] = weight if module is None else merged(weight, module)
    if is_first:
        weights |= {name: value.detach().cpu() for name, value in model.named_buffers() if value.is_leaf}
        persistent = set(map(unadapted_name, model.state_dict()))
        weights = {name: value for name, value in weights.items() if name in persistent}
    return weights


def _gather_adapter(engine: Any) -> dict[str, torch.Tensor]:
    """Return the adapter weights on the first rank, by the names of peft's files."""
    import deepspeed

    weights: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.model.named_parameters():
        if "lora_" in name:
            with deepspeed.zero.GatheredParameters([parameter]):
                if dist.get_rank() == 0:
                    weights[f"base_model.model.{name.replace('.default', '')}"] = parameter.detach().cpu().clone()
    return weights


def _save_adapter(folder: Path, adapter: dict[str, torch.Tensor], layers: list[str], job: PhaseJob) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    assert job.lora is not None
    folder.mkdir(parents=True)
    save_file(adapter, folder / "adapter_model.safetensors")
    task = "SEQ_2_SEQ_LM" if load_model_config(job.start, job.settings).is_encoder_decoder else "CAUSAL_LM"
    config = LoraConfig(
        r=job.lora.r, lora_alpha=job.lora.alpha, lora_dropout=0.0, target_modules=layers,
        target_parameters=job.lora.target_parameters, task_type=task, base_model_name_or_path=job.start,
    )  # fmt: skip
    config.save_pretrained(folder)
