"""A machine that `plad doctor` checks, and what the run requires of it."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from plad_dist.config import Config, Endpoint, LlmJudge, Model
from plad_dist.data.storage import Storage
from plad_dist.rundir import RunDir

HERE = "this machine"
PROBE = "driver"  # file that the driver writes into its probe folder, for the nodes to find


@dataclass(frozen=True)
class StorageSite:
    """A storage location that the run writes to.

    Attributes:
        key: the config key that names the location.
        probe: name of a folder in it for everything that the doctor writes.
    """

    key: str
    url: str
    probe: str

    @property
    def storage(self) -> Storage:
        return Storage(self.url)

    @property
    def probe_storage(self) -> Storage:
        """The probe folder."""
        return Storage(f"{self.url}/{self.probe}")


@dataclass(frozen=True)
class Node:
    """A machine, and what the run requires of it.

    Attributes:
        role: `alone` if there is no cluster, otherwise the `driver` or a `member` of the cluster.
        sites: where the run stores results.
        endpoints: servers that the run uses, each with its config key.
        staging: `training.staging_dir`.
        hub_models: models that are fetched from the hub.
        gpus: GPUs that Ray offers on the node.
        object_store: bytes of shared memory that Ray takes on the node, None if Ray does not run
            there.
        ray_folder: where Ray keeps its files.
    """

    name: str
    role: Literal["alone", "driver", "member"] = "alone"
    sites: tuple[StorageSite, ...] = ()
    endpoints: tuple[tuple[str, Endpoint], ...] = ()
    staging: str | None = None
    hub_models: tuple[str, ...] = ()
    gpus: float = 0
    object_store: float | None = None
    ray_folder: str = "/tmp/ray"  # noqa: S108 - Ray's own default


def local_node(config: Config | None) -> Node:
    """Return this machine with everything that a config requires of any node."""
    ray_folder = str(Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray")  # noqa: S108 - Ray's own default
    if config is None:
        return Node(HERE, ray_folder=ray_folder)
    run, probe = RunDir.of(config), f".doctor-{uuid.uuid4().hex}"
    sites = [StorageSite("run.dir", run.storage.url, probe)]
    if config.training.checkpoint_url:
        sites.append(StorageSite("training.checkpoint_url", run.checkpoints(config).url, probe))
    models = models_of(config)
    return Node(
        HERE,
        sites=tuple(sites),
        endpoints=tuple((f"{key}.endpoint", model.endpoint) for key, model in models if model.endpoint is not None),
        staging=config.training.staging_dir,
        hub_models=tuple(
            source.path
            for _, model in models
            if (source := model.pretrained()) is not None and not _is_local(source.path)
        ),
        ray_folder=ray_folder,
    )


def models_of(config: Config) -> list[tuple[str, Model]]:
    """Return every model that a config names, with its config key."""
    judges = {
        f"evaluation.judges.{name}.model": judge.model
        for name, judge in config.evaluation.judges.items()
        if isinstance(judge, LlmJudge)
    }
    return [*config.named_models().items(), *judges.items()]


def _is_local(path: str) -> bool:
    return path.startswith(("/", ".", "~")) or Path(path).exists()
