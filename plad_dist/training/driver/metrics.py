"""Prometheus metrics of training."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from plad_dist.prometheus import MetricSet
from plad_dist.training.messages import Began, Diverged, Enters, HeldoutRanked, Message, Said, Started, StepDone

TRAINING = {
    "train_starts": (
        Counter,
        "Times that a worker group started or resumed a phase; more than one means a recovery or a resize.",
    ),
    "train_diverged": (
        Counter,
        "Times that the loss or the gradient was not a finite number, or the loss exploded; training stops then.",
    ),
    "train_tokens": (Counter, "Tokens trained on."),
    "train_step": (Gauge, "Steps taken."),
    "train_steps": (Gauge, "Steps of the whole phase."),
    "train_workers": (Gauge, "Workers."),
    "train_loss": (Gauge, "Mean loss of a group in the step."),
    "train_grad_norm": (Gauge, "Gradient norm before clipping."),
    "train_pair_accuracy": (Gauge, "Share of the step's pairs that are ranked correctly."),
    "train_chosen_logp_per_token": (Gauge, "Mean log-likelihood of a chosen token."),
    "train_rejected_logp_per_token": (Gauge, "Mean log-likelihood of a rejected token."),
    "train_sampler_gap_per_token": (
        Gauge,
        "Mean absolute difference between the engine's and the trainer's log-likelihoods, per token.",
    ),
    "train_router_aux_loss": (Gauge, "Auxiliary loss of the routers, without its factor."),
    "train_largest_expert_load": (Gauge, "Largest share of the step's tokens that one expert of a layer gets."),
    "train_tokens_per_s": (Gauge, "Tokens per second of all workers."),
    "train_model_flops_utilisation": (Gauge, "Model FLOPs as a share of the devices' peak."),
    "train_start_seconds": (Gauge, "Seconds of the latest start, from Ray's worker to the first step."),
    "train_memory_gb": (Gauge, "Peak memory of the first worker's device so far."),
    "train_checkpoint_seconds": (Gauge, "Seconds that the step waited for a checkpoint."),
    "train_input_wait_share": (Gauge, "Share of the step that waited for data."),
    "heldout_pair_accuracy": (Gauge, "Share of the held-out pairs that are ranked correctly."),
}


class TrainingMetrics:
    """Prometheus metrics of the phases, from the messages of their first workers."""

    def __init__(self) -> None:
        self._metrics: dict[str, MetricSet] = {}
        self._gauges: dict[str, dict[str, float]] = {}

    def record(self, message: Message) -> None:
        """Update the metrics of a phase by a message."""
        if isinstance(message, Said | Enters):
            return
        phase = message.phase
        if phase not in self._metrics:
            self._metrics[phase], self._gauges[phase] = MetricSet(TRAINING, {"phase": phase}), {}
        metrics, gauges = self._metrics[phase], self._gauges[phase]
        match message:
            case Began():
                metrics.add("train_starts")
                gauges["train_steps"] = message.steps
            case Started():
                gauges["train_start_seconds"] = sum(message.parts.values())
            case Diverged():
                metrics.add("train_diverged")
            case HeldoutRanked():
                gauges["heldout_pair_accuracy"] = message.pair_accuracy
            case StepDone():
                metrics.add("train_tokens", message.figures["tokens_per_s"] * message.figures["seconds"])
                values = {"step": message.step, "workers": message.workers, **message.figures}
                for name, (kind, _) in TRAINING.items():
                    value = values.get(name.removeprefix("train_"))
                    if kind is Gauge and value is not None:
                        gauges[name] = value

    def refresh(self) -> None:
        """Set every gauge again, because Ray drops a gauge that was not set for some seconds."""
        for phase, gauges in self._gauges.items():
            for name, value in gauges.items():
                self._metrics[phase].set(name, value)
