"""Exchange of weights, compared with the installed sources: importing vLLM takes many seconds."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from pydoc import locate

from plad_dist.compat.vllm import engine_argument_names
from plad_dist.compat.vllm_weights import WORKER_EXTENSION, WeightExchange


def source(file: str) -> str:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / file).read_text(encoding="utf-8")


def methods(file: str, owner: str) -> dict[str, list[str]]:
    """Return the parameters of each method of a class."""
    [found] = [node for node in ast.parse(source(file)).body if isinstance(node, ast.ClassDef) and node.name == owner]
    functions = [node for node in found.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {function.name: [argument.arg for argument in function.args.args] for function in functions}


def test_vllm_finds_the_addition_to_its_workers_and_has_no_method_of_that_name() -> None:
    assert "worker_extension_cls" in engine_argument_names()
    assert locate(WORKER_EXTENSION) is WeightExchange
    added = {name for name in vars(WeightExchange) if not name.startswith("__")}
    for file, owner in (("v1/worker/gpu_worker.py", "Worker"), ("v1/worker/cpu_worker.py", "CPUWorker")):
        assert not added & methods(file, owner).keys()


def test_vllm_reloads_weights_from_a_folder_and_packs_embeddings_by_these_methods() -> None:
    assert "weights_path" in methods("v1/worker/gpu_model_runner.py", "GPUModelRunner")["reload_weights"]
    embeddings = methods("model_executor/layers/vocab_parallel_embedding.py", "UnquantizedEmbeddingMethod")
    assert embeddings["process_weights_after_loading"] == ["self", "layer"]


def test_vllm_still_leaves_the_layer_out_whose_packing_is_repeated() -> None:
    """Otherwise the repetition can go."""
    limitations = source("model_executor/model_loader/reload/__init__.py")
    assert "Tied parameters will only reflect processing from one of the parent layers" in limitations
