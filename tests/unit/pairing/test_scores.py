"""Scores: ROUGE-L like the package's, reward models in batches, functions with named errors."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from plad_dist.config import Model, Pairing, RewardModel
from plad_dist.data.models import check_weights
from plad_dist.data.schemas import PROMPTS
from plad_dist.data.storage import Storage
from plad_dist.data.templates import Renderer
from plad_dist.errors import RunFailed, UserError
from plad_dist.pairing.answer import Answer
from plad_dist.pairing.forms import PairForms
from plad_dist.pairing.pairs import PairBuilder
from plad_dist.pairing.reward import RewardScorer
from plad_dist.pairing.scores import check_scorer, load_scorer, rouge_scores
from plad_dist.pairing.worker import PairWorker
from plad_dist.text_metrics import rouge_l
from plad_dist.training.model.scratch import train_tokenizer

CHAT = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"


def answer(response: str, reference: str | None = "one two", question: str = "count", role: str = "teacher") -> Answer:
    messages = [{"role": "user", "content": question}]
    return Answer(messages=messages, tools=None, reference=reference, response=response, role=role)


# -- ROUGE-L

_PROSE = st.lists(st.sampled_from(["a", "b", "c", "The", "end.", "x1", "-", "\n", "it's"]), max_size=80).map(" ".join)


@settings(max_examples=300)
@given(reference=_PROSE | st.text(st.characters(codec="ascii")), text=_PROSE | st.text())
def test_rouge_l_equals_that_of_the_rouge_score_package(reference: str, text: str) -> None:
    assert rouge_l(reference, text) == RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure


def test_a_response_without_a_reference_or_with_a_blank_one_has_no_score() -> None:
    assert rouge_scores([answer("one"), answer("one", None), answer("one", " ")]) == [pytest.approx(2 / 3), None, None]


# -- reward model


def make_reward_model(
    folder: Path, *, chat: str | None = CHAT, pad: bool = True, labels: int = 1, own_padding: int | None = None
) -> Path:
    """Create a tiny classifier with random weights and its own tokenizer."""
    tokenizer = train_tokenizer(iter(["user assistant one two three four five count " * 5]), 300)
    tokenizer.chat_template = chat
    if not pad:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **shape, vocab_size=300, num_labels=labels, max_position_embeddings=128, pad_token_id=own_padding
    )
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    return folder


def plain_score(folder: Path, text: str) -> float:
    """Return the score of one conversation without padding, which is that of its last token."""
    tokenizer = train_tokenizer(iter(["user assistant one two three four five count " * 5]), 300)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    model.config.pad_token_id = None
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    with torch.inference_mode():
        return float(model(ids).logits[0, 0])


RESPONSES = ["one", "one two three four five", "", "two two", "five " * 12, "one", "three one"]


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_batch_gives_each_conversation_the_score_that_it_has_alone(
    tmp_path: Path, pad: bool, batch_size: int
) -> None:
    folder = make_reward_model(tmp_path, pad=pad)
    batched = RewardScorer(RewardModel(path=str(folder), batch_size=batch_size))([answer(text) for text in RESPONSES])
    # Without a padding token of the tokenizer, the end-of-sequence at the end of every conversation
    # must not be taken for padding.
    alone = [plain_score(folder, f"<s>user count</s><s>assistant {text}</s>") for text in RESPONSES]
    assert batched == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 4) for score in alone}) == len(set(RESPONSES))


def test_a_padding_token_that_the_model_defines_is_used(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path, own_padding=5)
    batched = RewardScorer(RewardModel(path=str(folder)))([answer(text) for text in RESPONSES])
    alone = [plain_score(folder, f"<s>user count</s><s>assistant {text}</s>") for text in RESPONSES]
    assert batched == pytest.approx(alone, abs=1e-5)


def test_a_configured_template_renders_messages_and_response(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path, chat=None)
    template = "{{ messages[0].content }}: {{ messages[-1].content }}"
    scores = RewardScorer(RewardModel(path=str(folder), template=template))([answer("one"), answer("two two")])
    assert scores == pytest.approx([plain_score(folder, f"<s>count: {text}") for text in ("one", "two two")], abs=1e-5)


def test_conversations_over_the_maximum_length_have_no_score(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path)
    answers = [answer("one"), answer("two " * 60)]
    assert [score is None for score in RewardScorer(RewardModel(path=str(folder), max_length=50))(answers)] == [
        False,
        True,
    ]
    # Conversations over the context of the model have no score either.
    assert RewardScorer(RewardModel(path=str(folder)))([answer("two " * 200)]) == [None]


def test_pairs_carry_the_scores_of_the_reward_model(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path)
    pairing = Pairing(
        score="reward_model", reward_model=RewardModel(path=str(folder), max_length=30), combine="best_worst"
    )
    messages = [{"role": "user", "content": "count"}]
    prompts = pa.Table.from_pylist([{"prompt_id": "p", "messages": messages, "reference": None}], schema=PROMPTS)
    teacher, student = (
        pa.table(
            {
                "prompt_id": ["p"] * len(texts),
                "sample_index": range(len(texts)),
                "text": texts,
                "token_ids": [[7 + i, 2] for i in range(len(texts))],
                "finish_reason": ["stop"] * len(texts),
                "reasoning": [None] * len(texts),
                "logprob": [-1.0] * len(texts),
            }
        )
        for texts in (["one", "two two", "five " * 40], ["three", "four one"])
    )
    student_renderer = Renderer(str(folder), Model(path=str(folder)))
    pairs, counts = PairBuilder(pairing, student_renderer, 128, load_scorer(pairing)).build(prompts, teacher, student)
    (row,) = pairs.to_pylist()
    scores = {
        text: plain_score(folder, f"<s>user count</s><s>assistant {text}</s>")
        for text in ("one", "two two", "three", "four one")
    }
    assert row["chosen_score"] == pytest.approx(max(scores["one"], scores["two two"]), abs=1e-5)
    assert row["rejected_score"] == pytest.approx(min(scores["three"], scores["four one"]), abs=1e-5)
    assert scores[row["chosen_text"]] == pytest.approx(row["chosen_score"], abs=1e-5)
    assert counts["unscored"] == 1  # the conversation over max_length


def test_equal_conversations_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, computed = RewardScorer(RewardModel(path=str(make_reward_model(tmp_path)))), []
    monkeypatch.setattr(scorer, "_rewards", lambda batch: computed.extend(batch) or [float(len(ids)) for ids in batch])
    scores = scorer([answer("one"), answer("one", role="student"), answer("two two")])
    assert scores[0] == scores[1] != scores[2]
    assert len(computed) == 2


def test_an_unusable_reward_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    def refused(folder: Path | str, reason: str, *, only_loaded: bool = False) -> None:
        settings = RewardModel(path=str(folder))
        with pytest.raises(UserError, match=reason):
            RewardScorer(settings)
        if not only_loaded:
            with pytest.raises(UserError, match=reason):
                check_scorer(Pairing(score="reward_model", reward_model=settings))

    refused(make_reward_model(tmp_path / "two", labels=2), "expected a classifier with one output, got 2")
    refused(make_reward_model(tmp_path / "chat", chat=None), "no chat template")
    refused(tmp_path / "nothing", "no such model folder")
    causal = make_reward_model(tmp_path / "causal")
    LlamaForCausalLM(LlamaConfig.from_pretrained(causal)).save_pretrained(causal)
    refused(causal, "not a trained classifier: it has no weights for score.weight", only_loaded=True)
    pickled = make_reward_model(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused(pickled, r"no \*\.safetensors")
    with pytest.raises(UserError):
        check_weights(str(pickled))


def test_a_reward_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    scorer = RewardScorer(RewardModel(path=str(make_reward_model(tmp_path))))
    torch.nn.init.constant_(scorer._model.score.weight, float("nan"))
    with pytest.raises(RunFailed, match="not a finite number"):
        scorer([answer("one")])


# -- function


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a factory that writes a module with a function `f` and loads its scorer."""
    monkeypatch.syspath_prepend(str(tmp_path))
    count = iter(range(1000))

    def make(body: str, attribute: str = "f") -> Any:
        name = f"scores_{tmp_path.name.replace('-', '_')}_{next(count)}"
        (tmp_path / f"{name}.py").write_text(body)
        try:
            return load_scorer(Pairing(score="function", score_function=f"{name}:{attribute}"))
        finally:
            sys.modules.pop(name, None)

    return make


def test_a_function_receives_the_responses_and_returns_numbers_or_nulls(function: Any) -> None:
    scorer = function(
        "import numpy as np\n"
        "def f(answers):\n"
        "    keys = {'messages', 'tools', 'reference', 'response', 'role'}\n"
        "    assert all(set(answer) == keys for answer in answers)\n"
        "    return [None, 2, np.float32(0.5)][: len(answers)]\n"
    )
    assert scorer([answer("one"), answer("two"), answer("three")]) == [None, 2.0, 0.5]
    assert function("import numpy as np\ndef f(answers): return np.ones(len(answers))")([answer("one")]) == [1.0]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ("[1.0]", "one for each response, got 1"),
        ("[]", "one for each response, got 0"),
        ("None", "got NoneType"),
        ("3.0", "got float"),
        ("'ab'", "got str"),
        ("(x for x in answers)", "got generator"),
        ("[1.0, 'b']", "got 'b' for 'two'"),
        ("[1.0, True]", "got True for 'two'"),
        ("[float('nan'), 1.0]", "got nan for 'one'"),
        ("[1.0, float('inf')]", "got inf for 'two'"),
    ],
)
def test_a_wrong_result_of_a_function_is_named(function: Any, result: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"scores_.*:f: expected a list of 2 finite numbers or nulls.*{reason}"):
        function(f"def f(answers): return {result}")([answer("one"), answer("two")])


def test_an_exception_in_a_function_names_the_function_and_the_exception(function: Any) -> None:
    with pytest.raises(RunFailed, match=r"scores_.*:f: raised ZeroDivisionError: division by zero"):
        function("def f(answers): return 1 / 0")([answer("one")])


def test_a_function_that_cannot_be_imported_is_named(function: Any, tmp_path: Path) -> None:
    for body, attribute, reason in (
        ("", "f", "has no attribute 'f'"),
        ("f = 3", "f", "expected a function, got int"),
        ("raise KeyError('x')", "f", "cannot import scores_.*: KeyError: 'x'"),
        ("def f(:", "f", "SyntaxError"),
        ("import nothing_of_that_name", "f", "No module named 'nothing_of_that_name'"),
    ):
        with pytest.raises(UserError, match=reason):
            function(body, attribute)
    with pytest.raises(UserError, match=r"cannot import not_there.*No module named 'not_there'"):
        check_scorer(Pairing(score="function", score_function="not_there:f"))


def test_a_worker_imports_functions_from_the_drivers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    student = make_reward_model(tmp_path / "student")
    (tmp_path / "drivers_own.py").write_text("def f(answers): return [0.0] * len(answers)")
    for name, problem in (("drivers_own:f", None), ("drivers_own:g", "has no attribute 'g'")):
        pairing = Pairing(score="function", score_function=name)
        worker = PairWorker(
            Storage(str(tmp_path)), str(student), Model(path=str(student)), pairing, PairForms(), str(tmp_path)
        )
        message = asyncio.run(worker.start())
        assert message is None if problem is None else problem in str(message)
