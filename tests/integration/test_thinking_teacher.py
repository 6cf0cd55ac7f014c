"""A teacher that thinks, on a real engine: what is stored of its thoughts, and what is paired."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from plad_dist.config import Decoding, Model, Pairing
from plad_dist.data.conversation import Conversation
from plad_dist.data.schemas import PROMPTS, SAMPLES
from plad_dist.data.teacher_texts import TeacherForms
from plad_dist.data.templates import Renderer
from plad_dist.pairing.facts import PairFacts
from plad_dist.pairing.forms import PairForms
from plad_dist.pairing.pairs import PairBuilder
from plad_dist.sampling.backend import Completion, RefusedPromptError
from plad_dist.sampling.engine import Engine
from plad_dist.sampling.engine_texts import EngineTexts
from tests.tiny import TEMPLATE, make_chain_model, make_random_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

TAGS = ("<think>", "</think>")
PROMPT = [{"role": "user", "content": "how many legs"}]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Completion | RefusedPromptError]:
    """Return responses of a teacher whose prompts open a thought: whole, cut in it, and refused."""
    folder = make_chain_model(
        tmp_path_factory.mktemp("thinking") / "thinker", [*"abc", "</think>", *"def"], "<think>", added=TAGS
    )
    settings = Model(path=str(folder), template=TEMPLATE + "<think>")

    async def draw() -> dict[str, Completion | RefusedPromptError]:
        engine = Engine(str(folder), settings, {"max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 27}, 1)
        try:
            [prompt] = engine.render([Conversation(PROMPT)])
            assert isinstance(prompt, list)
            outcomes: dict[str, Completion | RefusedPromptError] = {}
            for name, max_tokens in (("whole", 32), ("cut", 2)):
                decoding = Decoding(max_tokens=max_tokens, temperature=0.0)
                outcomes[name] = await engine.complete(prompt, decoding, 1, name)
            engine._texts = EngineTexts(str(folder), settings.model_copy(update={"reasoning": "refuse"}))
            try:
                outcomes["refused"] = await engine.complete(prompt, Decoding(max_tokens=32), 1, "refused")
            except RefusedPromptError as refusal:
                outcomes["refused"] = refusal
            return outcomes
        finally:
            await engine.close()

    return asyncio.run(draw())


def test_the_thought_of_a_teacher_is_stored_apart_from_its_answer(drawn: dict[str, Any]) -> None:
    whole = drawn["whole"]
    assert (whole.text, whole.reasoning, whole.finish_reason) == ("def", "abc", "stop")
    assert whole.num_tokens == len(whole.token_ids) == 8, "the tokens are those of thought and answer"


def test_a_thought_that_never_ended_is_a_truncated_response(drawn: dict[str, Any]) -> None:
    cut = drawn["cut"]
    assert (cut.text, cut.reasoning, cut.finish_reason) == ("", "ab", "length")


def test_a_thought_can_be_refused(drawn: dict[str, Any]) -> None:
    assert "set `reasoning: strip` or `keep`" in str(drawn["refused"])


@pytest.mark.parametrize(("keep", "text"), [((), "def"), (("teacher",), "<think>\nabc\n</think>\n\ndef")])
def test_chosen_texts_hold_the_thought_only_if_it_is_kept(
    drawn: dict[str, Any], keep: tuple[str, ...], text: str, tmp_path: Path
) -> None:
    student = make_random_model(tmp_path / "student")
    renderer = Renderer(str(student), Model(path=str(student), template=TEMPLATE))
    common = {
        "prompt_id": "p", "sample_index": 0, "logprob": -1.0, "num_tokens": 3, "error": None, "model": "m", "round": 0,
    }  # fmt: skip
    whole = drawn["whole"]
    teacher = common | {
        "role": "teacher", "text": whole.text, "reasoning": whole.reasoning, "token_ids": list(whole.token_ids),
        "finish_reason": whole.finish_reason,
    }  # fmt: skip
    rejected = common | {"role": "student", "text": "x", "token_ids": [9, 2], "finish_reason": "stop"}
    prompts = pa.Table.from_pylist([{"prompt_id": "p", "messages": PROMPT}], schema=PROMPTS)
    samples = [pa.Table.from_pylist([row], schema=SAMPLES) for row in (teacher, rejected)]
    builder = PairBuilder(Pairing(score="none"), renderer, 128, None, PairForms(TeacherForms(keep_thought=keep)))
    pairs, counts = builder.build(prompts, *samples)
    assert pairs["chosen_text"].to_pylist() == [text]
    assert PairFacts.from_counts(counts).thoughts["chosen"] == bool(keep)
