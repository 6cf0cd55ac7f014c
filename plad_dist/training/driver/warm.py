"""Warm training processes: nurseries that import what a worker needs before it is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from plad_dist.config import Config, Model
from plad_dist.nursery.actor import NurseryPlan, nurseries
from plad_dist.sampling.engine_placement import engines_use_gpus
from plad_dist.training.worker.seat import NURSERY

_MODULES = (
    "plad_dist.training.worker.process",
    "plad_dist.compat.deepspeed",
    "pandas",  # pyarrow imports it for lists
    "torch.utils.tensorboard",
)


@contextmanager
def warm_workers(config: Config) -> Iterator[None]:
    """Keep nurseries on nodes that training can use while the block runs.

    In a cluster of more than about twice as many nodes as there are workers, only some have one.
    """
    if not config.cluster.warm_starts:
        yield
        return
    gpus, cpus = engines_use_gpus(), config.training.cpus_per_worker
    _, most = config.training.workers

    def is_wanted(resources: Mapping[str, float]) -> bool:
        return resources.get("CPU", 0) >= cpus and (not gpus or resources.get("GPU", 0) >= 1)

    plan = NurseryPlan(
        NURSERY,
        (*_MODULES, *_model_modules(config.student)),
        worker_environment(cpus, gpus=gpus),
        is_wanted,
        most_nodes=2 * most + 2,
    )
    with nurseries(plan):
        yield


def worker_environment(cpus: float, *, gpus: bool) -> dict[str, str]:
    """Return the environment variables of training workers."""
    environment = {"OMP_NUM_THREADS": str(max(1, int(cpus))), "TOKENIZERS_PARALLELISM": "false"}
    return environment | {"DS_ACCELERATOR": "cuda" if gpus else "cpu"}


def _model_modules(model: Model) -> list[str]:
    """Return the module of transformers with a model whose type is known without a download."""
    if model.scratch is not None:
        name = str(model.scratch.architecture["model_type"])
    else:
        try:
            source = model.pretrained()
            assert source is not None
            name = str(json.loads((Path(source.path) / "config.json").read_text())["model_type"])
        except (OSError, ValueError, KeyError, TypeError):  # on the hub, or an error that its reader explains
            return []
    name = name.replace("-", "_")
    return [f"transformers.models.{name}.modeling_{name}"] if name.isidentifier() else []
