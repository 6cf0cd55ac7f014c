"""Write the table of model families in docs/guide.md: `python docs/generate_families.py [--check]`.

Its rows are the families of `tests/small_families.py`, which the numerical tests compare with
separate sequences in float64. `--check` writes nothing, and fails if the table differs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from generated_part import write_part

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
TARGET = ROOT / "docs" / "guide.md"
START, END = "<!-- families -->", "<!-- families end -->"
ATTENTION = {"plad_tree": "piece by piece", "eager": "mask added to scores", "sdpa": "mask", None: "its own"}


def render() -> str:
    """Return the lines of the table."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    from plad_dist.compat.vllm import generating_architectures
    from plad_dist.sampling.vllm_models.plugin import MODELS
    from plad_dist.training.model.attention import attention_of
    from plad_dist.training.model.families import TESTED
    from tests.small_families import FAMILIES, config_of

    lines = ["| family | shares prompts | packs rows | attention on CPUs | engine |", "| --- | --- | --- | --- | --- |"]
    for name, (model_type, _) in FAMILIES.items():
        if model_type not in TESTED:
            continue
        config = config_of(name)
        attention = attention_of(config, TESTED[model_type], 100, "auto")
        names = (
            MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
            if config.is_encoder_decoder
            else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        )
        architecture = names[model_type]
        engine = "vLLM" if architecture in generating_architectures() else "transformers"
        if architecture in MODELS:
            engine = "vLLM, by this project's model"
        layout = attention.layout
        cells = [name, *("yes" if has else "no" for has in (layout.shares_prompts, layout.packs_rows))]
        lines.append("| " + " | ".join([*cells, ATTENTION[attention.implementation], engine]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    write_part(TARGET, START, END, render())
