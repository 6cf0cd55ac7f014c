"""Arrow schemas of the datasets in a run directory.

Columns of prompts, samples and pairs are added, never removed or changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

PROMPTS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field(
            "messages",
            pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])),
            nullable=False,
        ),
        pa.field("reference", pa.string()),
        pa.field("meta", pa.string()),
        pa.field("teacher", pa.string()),  # the teacher that responds; null if the run has only one
        pa.field("conversation", pa.string()),  # JSON of the messages; null if role and text are all they have
        pa.field("tools", pa.string()),  # JSON of the tools that the model may call; null without
    ]
)

SAMPLES = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("logprob", pa.float64()),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("round", pa.int32(), nullable=False),
        pa.field("reasoning", pa.string()),  # the thought before the answer, which is `text`; null without one
    ]
)

PAIRS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("chosen_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("rejected_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("chosen_text", pa.string(), nullable=False),
        pa.field("rejected_text", pa.string(), nullable=False),
        pa.field("chosen_score", pa.float64()),
        pa.field("rejected_score", pa.float64()),
        pa.field("rejected_logprob", pa.float64()),  # of rejected_token_ids, as the engine reported it
        pa.field("round", pa.int32(), nullable=False),
    ]
)

# Log-likelihoods of the pairs under the student before calibration, row by row.
INITIAL_LOGPS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("chosen_initial_logp", pa.float64(), nullable=False),
        pa.field("rejected_initial_logp", pa.float64(), nullable=False),
    ]
)


def is_usable_response(sample: Mapping[str, Any]) -> bool:
    """Return True if a sample can be trained on: it is finished and its text is not blank."""
    return sample["finish_reason"] == "stop" and bool(sample["text"].strip())
