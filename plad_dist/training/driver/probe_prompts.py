"""Held-out prompts of the checkpoint probes, with the starting student's responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from plad_dist.config import Config, Decoding
from plad_dist.data.conversation import COLUMNS, Conversation
from plad_dist.data.prompts import heldout_prompts
from plad_dist.rundir import RunDir
from plad_dist.systems import PLAD, WARMUP
from plad_dist.text_metrics import Output, main_decoding


@dataclass(frozen=True)
class ProbePrompts:
    """Prompts of the probes of one round.

    Attributes:
        references: gold responses; None for a prompt without one.
        start_outputs: responses of the starting student under `decoding`.
        decoding: the main decoding of the evaluation.
    """

    ids: list[str]
    prompts: list[Conversation]
    references: list[str | None]
    start_outputs: list[Output]
    decoding: Decoding


def read_probe_prompts(config: Config, run: RunDir, round_number: int, count: int) -> ProbePrompts:
    """Read the first held-out prompts, with the responses of the student that a round starts from.

    Args:
        count: number of prompts, fewer if the run has fewer.
    """
    decodings = config.decodings()
    name = main_decoding([(PLAD, name) for name in decodings], {n: d.temperature for n, d in decodings.items()})
    if round_number:
        samples = run.at_round(round_number - 1).system_samples(PLAD, name)
    else:
        samples = run.system_samples(WARMUP, name)
    rows = samples.read(["prompt_id", "text", "num_tokens", "finish_reason"]).slice(0, count).to_pylist()
    prompts = _read_prompts(run, {row["prompt_id"] for row in rows})
    return ProbePrompts(
        ids=[row["prompt_id"] for row in rows],
        prompts=[Conversation.from_row(prompts[row["prompt_id"]]) for row in rows],
        references=[prompts[row["prompt_id"]]["reference"] for row in rows],
        start_outputs=[Output(row["text"], row["num_tokens"], row["finish_reason"] == "stop") for row in rows],
        decoding=decodings[name],
    )


def _read_prompts(run: RunDir, ids: set[str]) -> dict[str, dict[str, Any]]:
    """Return the rows of some held-out prompts by id; read no further blocks than needed."""
    prompts: dict[str, dict[str, Any]] = {}
    dataset = heldout_prompts(run.storage)
    for block in range(len(dataset.require("prepare").parts)):
        if len(prompts) == len(ids):
            break
        rows = dataset.read_block(block).select(["prompt_id", "reference", *COLUMNS]).to_pylist()
        prompts |= {row["prompt_id"]: row for row in rows if row["prompt_id"] in ids}
    return prompts
