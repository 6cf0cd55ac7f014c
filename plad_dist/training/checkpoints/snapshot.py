"""Model folder of a checkpoint, written from its files while training continues elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from plad_dist.data.models import load_model_config, model_class
from plad_dist.data.storage import Storage
from plad_dist.data.templates import load_tokenizer
from plad_dist.training.checkpoints.reshard import whole_weights
from plad_dist.training.checkpoints.store import Checkpoint
from plad_dist.training.job import PhaseJob
from plad_dist.training.model.adapters import adapted_parameters, add_adapters, merged, unadapted_name

_PREFIX = "model."  # of the student's parameters in the engine's module


def write_snapshot(job: PhaseJob, checkpoint: Checkpoint, folder: Path) -> None:
    """Write the weights of a ZeRO-3 checkpoint as a Hugging Face folder.

    Adapters are merged into the weights of the starting model. The files of a checkpoint on an
    object store are downloaded into the folder, and removed before the weights are written.

    Raises:
        OSError, RunFailed: a file is missing, since the checkpoint may have been pruned, or cannot
            be read.
    """
    import transformers

    dtype = getattr(torch, checkpoint.state.dtype)
    files = _local_files(job.checkpoints, checkpoint, folder / "files")
    trained = whole_weights(files, checkpoint.state.workers)
    transformers.utils.logging.disable_progress_bar()
    settings = job.settings
    model = model_class(load_model_config(job.start, settings)).from_pretrained(
        job.start,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        use_safetensors=True,
        dtype=dtype,
    )
    if job.lora is not None:
        add_adapters(model, job.lora, job.seed)
    parameters, adapted = dict(model.named_parameters()), adapted_parameters(model)
    with torch.no_grad():
        for name, weight in trained.items():
            parameters[name.removeprefix(_PREFIX)].copy_(weight)
        weights = {
            unadapted_name(name): merged(weight, adapted[name]) if name in adapted else weight
            for name, weight in model.state_dict().items()
            if "lora_" not in name
        }
    shutil.rmtree(folder / "files", ignore_errors=True)
    model.save_pretrained(folder, state_dict=weights)
    load_tokenizer(job.start, settings).save_pretrained(folder)


def _local_files(storage: Storage, checkpoint: Checkpoint, download_to: Path) -> Path:
    """Return a local folder with the files of a checkpoint."""
    if storage.local_root is not None:
        return storage.local_root / checkpoint.folder
    download_to.mkdir(parents=True)
    for name in checkpoint.files:
        storage.download(f"{checkpoint.folder}/{name}", download_to / name)
    return download_to
