"""Peak memory of the log-prob head compared with a plain output layer and, on a GPU, with Liger.

One forward and backward pass over T=8,192 predicted tokens, with a vocabulary of V=128,256 and
hidden size H=1,024. Hidden states and weight receive gradients. Each implementation runs in its own
process. Memory in use before the pass (inputs, runtime) is subtracted from the peak.

- `plain`: ``log_softmax(linear(hidden))`` gathered at the targets;
- `ours`: :class:`~plad_dist.training.model.logprobs.LogprobHead`;
- `liger`: Liger's fused linear cross entropy, summed over the tokens. It runs on a CUDA device only
  and needs `liger_kernel`.

`peak_ratio_vs_plain` is our peak over the plain one, in float32 on a CPU and in bfloat16 on a GPU.
`max_rel_grad_error` is the largest difference between our gradients and plain float64 gradients,
relative to the largest gradient, on a smaller problem (T=512, V=32,000).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from typing import Any

T, V, H = 8_192, 128_256, 1_024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="no effect: the last line is always the JSON object")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.way)))
        return
    import torch

    ways = ["plain", "ours", *(["liger"] if torch.cuda.is_available() else [])]
    results = {way: measure_in_process(way) for way in ways}
    figures: dict[str, Any] = {
        "peak_ratio_vs_plain": round(results["ours"]["peak_gb"] / results["plain"]["peak_gb"], 4),
        "max_rel_grad_error": grad_error(),
    }
    for way, values in results.items():
        figures |= {f"{way}_peak_gb": round(values["peak_gb"], 3), f"{way}_seconds": round(values["seconds"], 2)}
    print(json.dumps(figures | {"T": T, "V": V, "H": H}))


def measure_in_process(way: str) -> dict[str, float]:
    """Run :func:`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.logprob_memory", "--way", way]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{way} failed: {process.stderr[-2000:]}")
    result: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return result


def measure(way: str) -> dict[str, float]:
    """Return the peak memory above the inputs and the seconds of one forward and backward pass."""
    import torch

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    torch.manual_seed(0)
    hidden_TH = torch.randn(T, H, device=device, dtype=dtype, requires_grad=True)
    layer = torch.nn.Linear(H, V, bias=False, device=device, dtype=dtype)
    targets_T = torch.randint(V, (T,), device=device)
    log_probabilities = {"plain": plain, "ours": ours, "liger": liger}[way](layer)
    if cuda:  # compile and load the kernels before the measurement
        log_probabilities(hidden_TH, targets_T).sum().backward()
        hidden_TH.grad = layer.weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    watch = Resident()
    before = torch.cuda.memory_allocated() if cuda else watch.now()
    started = time.perf_counter()
    with watch:
        log_probabilities(hidden_TH, targets_T).sum().backward()
        if cuda:
            torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if cuda else watch.peak
    return {"peak_gb": (peak - before) / 1e9, "seconds": seconds}


def plain(layer: Any) -> Any:
    return lambda hidden, targets: layer(hidden).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def ours(layer: Any) -> Any:
    from plad_dist.training.model.logprobs import LogprobHead

    return LogprobHead(layer)


def liger(layer: Any) -> Any:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, targets: -loss(layer.weight, hidden, targets)


class Resident:
    """Peak resident memory of this process while the block runs, sampled every few milliseconds."""

    def __enter__(self) -> Resident:
        self.peak, self._ended = self.now(), threading.Event()
        self._watch = threading.Thread(target=self._sample, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._watch.join()
        self.peak = max(self.peak, self.now())

    def _sample(self) -> None:
        while not self._ended.wait(0.005):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * resource.getpagesize()


def grad_error() -> float:
    """Return the largest error of our float32 gradients relative to plain float64 gradients."""
    import torch

    os.environ.setdefault("OMP_NUM_THREADS", "2")
    torch.manual_seed(1)
    layer = torch.nn.Linear(256, 32_000, bias=False)
    hidden = torch.randn(512, 256, requires_grad=True)
    targets, weights = torch.randint(32_000, (512,)), torch.randn(512)
    grads = torch.autograd.grad((ours(layer)(hidden, targets) * weights).sum(), [hidden, layer.weight])
    wide = torch.nn.Linear(256, 32_000, bias=False, dtype=torch.float64)
    wide.load_state_dict({"weight": layer.weight.double()})
    exact = hidden.detach().double().requires_grad_()
    logps = wide(exact).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    expected = torch.autograd.grad((logps * weights.double()).sum(), [exact, wide.weight])
    return max(
        float((grad.double() - exact_grad).abs().max() / exact_grad.abs().max())
        for grad, exact_grad in zip(grads, expected, strict=True)
    )


if __name__ == "__main__":
    main()
