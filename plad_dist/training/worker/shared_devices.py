"""Ray Train backend that only shares the GPUs of a node; it imports no torch."""

from __future__ import annotations

from ray.train.backend import Backend, BackendConfig


class SharedDevices(Backend):
    """Every worker sees the GPUs of all workers of its node, which NCCL connects directly."""

    share_cuda_visible_devices = True


class SharedDevicesConfig(BackendConfig):
    """Leaves it to the training processes to meet."""

    @property
    def backend_cls(self) -> type[Backend]:
        return SharedDevices
