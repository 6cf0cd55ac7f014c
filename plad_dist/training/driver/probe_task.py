"""Ray task of a checkpoint probe: build the checkpoint's model and generate responses."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from plad_dist.config import Decoding
from plad_dist.data.conversation import Conversation
from plad_dist.sampling.backend import RefusedPromptError
from plad_dist.sampling.engine_choice import start_engine
from plad_dist.text_metrics import Output
from plad_dist.training.checkpoints.scratch_dir import ScratchDir
from plad_dist.training.checkpoints.store import Checkpoint
from plad_dist.training.job import PhaseJob

_FOLDER_PREFIX = "plad-watch-"
_NO_RESPONSE = Output("", 0, finished=False)


def generate_from_checkpoint(
    job: PhaseJob,
    checkpoint: Checkpoint,
    engine: dict[str, Any],
    prompts: Sequence[Conversation],
    decoding: Decoding,
    seeds: Sequence[int],
) -> list[Output]:
    """Return a response of a checkpoint's model to each prompt.

    Args:
        engine: arguments of the student's engine.
        seeds: seed of each response.
    """
    from plad_dist.training.checkpoints.snapshot import (
        write_snapshot,  # imports transformers' models, which the driver does not need
    )

    with ScratchDir(job.staging, _FOLDER_PREFIX) as folder:
        write_snapshot(job, checkpoint, folder / "model")
        return asyncio.run(_generate(str(folder / "model"), job, engine, prompts, decoding, seeds))


async def _generate(
    model: str,
    job: PhaseJob,
    arguments: dict[str, Any],
    prompts: Sequence[Conversation],
    decoding: Decoding,
    seeds: Sequence[int],
) -> list[Output]:
    engine = start_engine(model, job.settings, arguments, job.seed)

    async def respond(index: int, prompt: Any) -> Output:
        if isinstance(prompt, Exception):  # the template cannot render it
            return _NO_RESPONSE
        try:
            completion = await engine.complete(prompt, decoding, seeds[index], str(index))
        except RefusedPromptError:
            return _NO_RESPONSE
        return Output(completion.text, completion.num_tokens, completion.finish_reason == "stop")

    try:
        rendered = engine.render(prompts)
        return list(await asyncio.gather(*(respond(index, prompt) for index, prompt in enumerate(rendered))))
    finally:
        await engine.close()
