"""DeepSpeed engine of a phase: the model, partitioned while it loads, and its optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from plad_dist.compat.muon import embeddings_left_to_adam, import_muon
from plad_dist.config import Optimizer
from plad_dist.data.model_checks import check_loaded
from plad_dist.data.models import load_model_config, model_class
from plad_dist.errors import UserError
from plad_dist.training.job import PhaseJob
from plad_dist.training.model.adapters import add_adapters
from plad_dist.training.model.attention import Attention, attention_of
from plad_dist.training.model.balance import ExpertBalance
from plad_dist.training.model.deepspeed_config import is_offloaded
from plad_dist.training.model.experts import is_mixture, route_in_float32
from plad_dist.training.model.policy import Policy, disable_dropout
from plad_dist.training.model.tree_attention import FLEX_ATTENTION


def build_engine(job: PhaseJob, device: torch.device, *, from_checkpoint: bool = False) -> Any:
    """Return a DeepSpeed engine around a :class:`Policy`.

    Under ZeRO-3, the parameters are partitioned while they load, so no rank ever holds the whole
    model.

    Args:
        from_checkpoint: the parameters will be loaded from a checkpoint of ZeRO-3, so those of the
            starting model need not be read.

    Raises:
        UserError: the model family, the attention implementation or the adapters are not supported,
            or the files of the model lack weights.
    """
    import deepspeed

    import_muon(compiled=job.phase.optimizer.name == "muon" and device.type == "cuda")
    model_config = disable_dropout(load_model_config(job.start, job.settings))
    attention = attention_of(model_config, job.row_support, job.max_group_tokens, job.attention)
    if attention.implementation == FLEX_ATTENTION and device.type != "cuda":
        raise UserError("training.attention: flex needs a CUDA device; set auto or sdpa")
    optimizer = job.phase.optimizer
    config = engine_config(job.deepspeed, optimizer, dist.get_world_size(), half=job.dtype == "bfloat16")
    model = _load_model(job, model_config, attention, config, from_checkpoint)
    balance = ExpertBalance(model, job.router_aux_loss) if job.router_aux_loss and is_mixture(model) else None
    policy = Policy(model, attention, balance)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    client_optimizer = eight_bit_adamw(optimizer) if optimizer.name == "adamw_8bit" else None
    with embeddings_left_to_adam():
        engine, *_ = deepspeed.initialize(
            model=policy, config=config, model_parameters=trained, optimizer=client_optimizer
        )
    for parameters in engine.optimizer.param_groups:
        parameters["initial_lr"] = parameters["lr"]
    return engine


def _load_model(
    job: PhaseJob, model_config: Any, attention: Attention, deepspeed: dict[str, Any], from_checkpoint: bool
) -> Any:
    from transformers.integrations import HfDeepSpeedConfig

    from plad_dist.compat.deepspeed import parameters_not_broadcast
    from plad_dist.compat.pretrained import weights_loaded_by
    from plad_dist.training.model.loading import load_weights

    partition_at_load = HfDeepSpeedConfig(deepspeed)  # transformers looks for it while it loads a model
    with parameters_not_broadcast(), weights_loaded_by(partial(load_weights, from_checkpoint=from_checkpoint)):
        model, loading = model_class(model_config).from_pretrained(
            job.start,
            config=model_config,
            revision=job.settings.revision,
            trust_remote_code=job.settings.trust_remote_code,
            use_safetensors=True,  # other formats are pickles, which run programs
            dtype=torch.bfloat16 if job.dtype == "bfloat16" else torch.float32,
            attn_implementation=attention.implementation,
            output_loading_info=True,
        )
    del partition_at_load
    check_loaded(job.start, loading["missing_keys"])
    model.config.use_cache = False
    if job.lora is not None:
        add_adapters(model, job.lora, job.seed)
    if job.gradient_checkpointing or job.lora is not None:
        model.enable_input_require_grads()  # otherwise ZeRO-3 would release the first layer before its backward
    if job.gradient_checkpointing:
        # Reentrant checkpointing is right whether or not a layer's hooks run again when the layer
        # is recomputed, which differs between versions of transformers.
        model.gradient_checkpointing_enable({"use_reentrant": True})
    route_in_float32(model)
    gather_whole_layers(model)
    return model


def gather_whole_layers(model: Any) -> None:
    """Make ZeRO-3 fetch and release each decoder layer as a whole.

    This needs fewer and larger gathers, and no Python hooks around the parts of a layer.
    """
    from deepspeed.utils import set_z3_leaf_modules

    names = [type(module).__name__ for module in model.modules()]
    layer_names = sorted(set(getattr(model, "_no_split_modules", None) or ()) & set(names))
    if layer_names:
        set_z3_leaf_modules(model, layer_names)


def engine_config(deepspeed: dict[str, Any], optimizer: Optimizer, workers: int, *, half: bool) -> dict[str, Any]:
    """Return a DeepSpeed config completed with the settings of the run's config.

    Args:
        workers: number of ranks, which the second partition (hpZ) must divide.
        half: train in bfloat16.
    """
    zero = dict(deepspeed["zero_optimization"])
    clip_norm = optimizer.clip_norm if math.isfinite(optimizer.clip_norm) else 0.0  # 0: DeepSpeed does not clip
    if optimizer.name == "muon":
        zero["reduce_scatter"] = False  # Muon needs whole gradients
        clip_norm = 0.0  # DeepSpeed would clip the orthogonalised updates, whose norm is the square root of their rank
    if "zero_hpz_partition_size" in zero:
        zero["zero_hpz_partition_size"] = math.gcd(int(zero["zero_hpz_partition_size"]), workers)
    return deepspeed | {
        **_optimizer_keys(optimizer, offloaded=is_offloaded(deepspeed)),
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "bf16": {"enabled": half},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
    }


def eight_bit_adamw(optimizer: Optimizer) -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
    """Return a constructor of AdamW with 8-bit states, which DeepSpeed calls with the parameters.

    The states are quantised block by block. Source: Dettmers et al. 2022, arXiv 2110.02861.
    """
    from bitsandbytes.optim import AdamW8bit

    return partial(
        AdamW8bit, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
    )


def _optimizer_keys(optimizer: Optimizer, *, offloaded: bool) -> dict[str, Any]:
    """Return the DeepSpeed keys of an optimizer.

    An offloaded AdamW is DeepSpeed's for CPUs. Otherwise AdamW is PyTorch's, which needs no
    compilation. The 8-bit AdamW is passed to DeepSpeed as an object (:func:`eight_bit_adamw`).
    """
    if optimizer.name == "adamw_8bit":
        return {"zero_allow_untested_optimizer": True}
    adam = {"betas": list(optimizer.betas), "eps": optimizer.eps, "weight_decay": optimizer.weight_decay}
    adam |= {} if offloaded else {"torch_adam": True}
    if optimizer.name == "muon":
        rates = {"muon_lr": optimizer.lr, "adam_lr": optimizer.adam_lr or optimizer.lr}
        return {"optimizer": {"type": "Muon", "params": adam | rates}}
    return {"optimizer": {"type": "AdamW", "params": adam | {"lr": optimizer.lr}}}
