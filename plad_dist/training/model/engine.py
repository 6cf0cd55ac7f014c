"""The DeepSpeed engine of a phase: the model, partitioned while it loads, and its optimizer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from plad_dist.config import Lora, Optimizer
from plad_dist.data.models import load_model_config
from plad_dist.errors import UserError
from plad_dist.training.job import PhaseJob
from plad_dist.training.model.attention import attention_of
from plad_dist.training.model.deepspeed_config import is_offloaded
from plad_dist.training.model.policy import Policy, without_dropout
from plad_dist.training.model.probe import check_family
from plad_dist.training.model.tree_attention import FLEX_ATTENTION


def build_engine(job: PhaseJob, device: torch.device) -> Any:
    """The engine over a :class:`Policy`. Under ZeRO-3 no rank ever holds the whole model."""
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    model_config = without_dropout(load_model_config(job.start, job.settings))
    attention = attention_of(model_config, job.longest, job.attention)
    if not attention.ready:
        check_family(model_config, attention)
    if attention.implementation == FLEX_ATTENTION and device.type != "cuda":
        raise UserError("training.attention: flex needs a CUDA device; set auto or sdpa")
    half = job.dtype == "bfloat16"
    optimizer = job.phase.optimizer
    config = engine_config(job.deepspeed, optimizer, dist.get_world_size(), half=half)
    partition_at_load = HfDeepSpeedConfig(config)
    model = AutoModelForCausalLM.from_pretrained(
        job.start,
        config=model_config,
        revision=job.settings.revision,
        trust_remote_code=job.settings.trust_remote_code,
        dtype=torch.bfloat16 if half else torch.float32,
        attn_implementation=attention.implementation,
    )
    del partition_at_load
    model.config.use_cache = False
    if job.lora is not None:
        add_adapters(model, job.lora, job.seed)
    if job.gradient_checkpointing or job.lora is not None:
        model.enable_input_require_grads()  # or the first layer would be let go before its own backward
    if job.gradient_checkpointing:
        # Reentrant: right whether or not a layer's hooks run again when it is computed again, which differs by transformers' version.
        model.gradient_checkpointing_enable({"use_reentrant": True})
    whole_layers(model)
    policy = Policy(model, attention)
    learning = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    given = eight_bit_adamw(optimizer) if optimizer.name == "adamw_8bit" else None
    engine, *_ = deepspeed.initialize(model=policy, config=config, model_parameters=learning, optimizer=given)
    for parameters in engine.optimizer.param_groups:
        parameters["initial_lr"] = parameters["lr"]
    return engine


def whole_layers(model: Any) -> None:
    """Let ZeRO-3 fetch and let go a decoder layer as one: fewer and larger gathers, and no hooks in Python around each of its parts."""
    from deepspeed.utils import set_z3_leaf_modules

    names = [type(module).__name__ for module in model.modules()]
    kinds = sorted(set(getattr(model, "_no_split_modules", None) or ()) & set(names))
    if kinds:
        set_z3_leaf_modules(model, kinds)


def release(engine: Any) -> None:
    """Let go of all that an engine holds: DeepSpeed keeps the model where it outlives the engine's own end.

    Memory is free when the caller drops its own references.
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.utils import groups

    engine.destroy()
    FWD_MODULE_STACK.clear()
    # A cache of a method, which has the coordinators of all engines in its keys.
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # the next engine makes its own, and refuses to find one


def engine_config(deepspeed: dict[str, Any], optimizer: Optimizer, workers: int, *, half: bool) -> dict[str, Any]:
    """A DeepSpeed config completed with what the run's config decides."""
    zero = dict(deepspeed["zero_optimization"])
    clip_norm = optimizer.clip_norm
    if optimizer.name == "muon":
        zero["reduce_scatter"] = False  # Muon needs whole gradients
        clip_norm = 0.0  # DeepSpeed would clip the orthogonalised updates, whose norm is the root of their ranks
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
    """AdamW whose states are quantised block by block (Dettmers et al. 2022, arXiv 2110.02861); it is made of the parameters."""
    from bitsandbytes.optim import AdamW8bit

    return partial(
        AdamW8bit, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
    )


def _optimizer_keys(optimizer: Optimizer, *, offloaded: bool) -> dict[str, Any]:
    """What DeepSpeed is told of an optimizer. An offloaded AdamW is DeepSpeed's own for CPUs, else it is PyTorch's, which need not be
    compiled; that of 8 bits is given to it.
    """
    if optimizer.name == "adamw_8bit":
        return {"zero_allow_untested_optimizer": True}
    adam = {"betas": list(optimizer.betas), "eps": optimizer.eps, "weight_decay": optimizer.weight_decay}
    own = {} if offloaded else {"torch_adam": True}
    if optimizer.name == "muon":
        rates = {"muon_lr": optimizer.lr, "adam_lr": optimizer.adam_lr or optimizer.lr}
        return {"optimizer": {"type": "Muon", "params": adam | rates | own}}
    return {"optimizer": {"type": "AdamW", "params": adam | {"lr": optimizer.lr} | own}}


def add_adapters(model: Any, lora: Lora, seed: int) -> None:
    """Put low-rank adapters into a model, in place, and freeze all else. They start the same on every rank.

    Raises:
        UserError: a target is no linear layer of the model, or its output layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    head = model.get_output_embeddings()
    modules = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
    linear = {name for name, module in modules if isinstance(module, torch.nn.Linear) and module is not head}
    targets = sorted(linear) if lora.target_modules == "all-linear" else lora.target_modules
    if not targets or not set(targets) <= linear:
        raise UserError(
            f"training.lora.target_modules: {', '.join(sorted(set(targets) - linear)) or 'none'}: expected names of linear layers "
            f"of the model other than its output layer; it has {', '.join(sorted(linear)) or 'none'}"
        )
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=targets)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
