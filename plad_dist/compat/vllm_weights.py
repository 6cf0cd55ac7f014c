"""Exchange of the weights of a running vLLM engine.

Written for vLLM 0.29.0. Relies on:

- `reload_weights(weights_path=...)` of a worker's model runner, and `get_model`
  (`vllm/v1/worker/gpu_model_runner.py`, also for CPUs);
- the engine argument `worker_extension_cls`: a class whose methods every worker gets, and which
  `AsyncLLM.collective_rpc` calls by name;
- `UnquantizedEmbeddingMethod.process_weights_after_loading`, which can be repeated.

vLLM reloads a tied matrix through the embedding layer alone (limitation 2 in
`vllm/model_executor/model_loader/reload/__init__.py`). On CPUs, the output layer multiplies by a
copy of the matrix in the layout of oneDNN. It would keep the copy of the earlier weights. Nor does
vLLM by itself forget the attention states of earlier prompts.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from plad_dist.compat.assumptions import Assumptions


class WeightExchange:
    """Methods that vLLM adds to the workers of an engine."""

    def load_other_weights(self, path: str) -> None:
        """Load the weights in a folder, and repeat the packing that vLLM leaves out."""
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

        worker: Any = self
        worker.reload_weights(weights_path=path)
        for layer in worker.model_runner.get_model().modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, UnquantizedEmbeddingMethod):
                method.process_weights_after_loading(layer)


WORKER_EXTENSION = f"{WeightExchange.__module__}.{WeightExchange.__qualname__}"


async def exchange_weights(llm: Any, path: str) -> None:
    """Load the weights in another folder into an engine that has no requests.

    Args:
        llm: an `AsyncLLM` that was started with `WORKER_EXTENSION`.

    Raises:
        Exception: vLLM could not load them. The engine must not be used any more.
    """
    _check_assumptions()
    await llm.collective_rpc(WeightExchange.load_other_weights.__name__, args=(path,))
    if not await llm.reset_prefix_cache(reset_connector=True):
        raise RuntimeError("vLLM did not forget the attention states of earlier prompts")


def computes_in_float32(llm: Any) -> bool:
    """Return True if neither weights nor activations of an engine have less precision."""
    import torch

    return bool(llm.model_config.dtype == torch.float32 and llm.model_config.quantization is None)


@cache
def _check_assumptions() -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assume = Assumptions("vllm", "0.29.0")
    assume.parameters(AsyncLLM.collective_rpc, "self", "method", "timeout", "args", "kwargs")
    assume.parameters(AsyncLLM.reset_prefix_cache, "self", "reset_running_requests", "reset_connector")
    reload = assume.attribute(GPUModelRunner, "reload_weights")
    assume.starts_with_parameters(reload, "self", "weights_iterator", "weights_path")
    assume.parameters(UnquantizedEmbeddingMethod.process_weights_after_loading, "self", "layer")
