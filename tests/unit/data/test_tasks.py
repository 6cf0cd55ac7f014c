"""Data sets of the paper's tasks in the schemas of the hub, and the examples that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from plad_dist.config import DatasetSource
from plad_dist.config_file import parse_config
from plad_dist.data.sources import read_prompts
from plad_dist.errors import UserError
from plad_dist.preflight import check_inputs
from plad_dist.rundir import RunDir
from tests.tiny import make_random_model

EXAMPLES = sorted(Path("examples").glob("*.yaml"))
STUDIES = {"ablation.yaml", "study.yaml", "study-long.yaml"}

TLDR = [
    {
        "prompt": "SUBREDDIT: r/cats\n\nTITLE: My cat\n\nPOST: It sleeps all day.\n\nTL;DR:",
        "completion": " My cat sleeps.",
    },
    {
        "prompt": "SUBREDDIT: r/dogs\n\nTITLE: My dog\n\nPOST: It barks at noon.\n\nTL;DR:",
        "completion": " My dog barks.",
    },
]
COMPARISONS = [
    {
        "info": {
            "id": "t3_1", "post": "It sleeps all day.", "title": "My cat", "subreddit": "cats",
            "site": None, "article": None,
        },
        "summaries": [
            {"text": " A cat.", "policy": "sup1", "note": None},
            {"text": " My cat sleeps.", "policy": "ref", "note": None},
        ],
        "choice": 1,
        "worker": "w",
        "batch": "b",
        "split": "train",
        "extra": {"confidence": None},
    }
]  # fmt: skip
_DIALOGUE = "\n\nHuman: What is a cat?\n\nAssistant: An animal.\n\nHuman: Does it say:\n\nmeow?\n\nAssistant:"
DIALOGUES = [{"chosen": f"{_DIALOGUE} Yes, it does.", "rejected": f"{_DIALOGUE} No."}]
# Rows by the name of the data set.
SCHEMAS: dict[str, list[dict[str, Any]]] = {
    "trl-lib/tldr": TLDR,
    "openai/summarize_from_feedback": COMPARISONS,
    "Anthropic/hh-rlhf": DIALOGUES,
    "HuggingFaceH4/ultrachat_200k": [{"prompt": "What is a cat?", "prompt_id": "1", "messages": []}],
}


def folder_of(rows: list[dict[str, Any]], folder: Path, split: str = "train", copies: int = 1) -> Path:
    """Write rows as a folder of data files that `datasets` reads.

    Copies of a row differ from one another and between splits.
    """
    folder.mkdir(parents=True)
    text = "".join(
        json.dumps(row).replace("cat", f"cat{number}{split}") + "\n" for number in range(copies) for row in rows
    )
    (folder / f"{split}.jsonl").write_text(text if copies > 1 else "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def example(name: str) -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load((Path("examples") / name).read_text())
    return raw


@pytest.mark.parametrize(
    ("name", "messages", "reference"),
    [
        ("tldr-llama2-13b-to-7b", [("user", TLDR[0]["prompt"])], " My cat sleeps."),
        (
            "tldr-gpt-neo-2.7b-to-125m",
            [("user", "SUBREDDIT: r/cats\nTITLE: My cat\nPOST: It sleeps all day.\nTL;DR:")],
            " My cat sleeps.",
        ),
        (
            "hh-llama2-13b-to-7b",
            [("user", "What is a cat?"), ("assistant", "An animal."), ("user", "Does it say:\n\nmeow?")],
            "Yes, it does.",
        ),
    ],
)
def test_the_data_of_the_tasks_is_read_in_the_schemas_of_the_hub(
    tmp_path: Path, name: str, messages: list[tuple[str, str]], reference: str
) -> None:
    raw = example(f"{name}.yaml")["prompts"]["source"]
    raw |= {"name": str(folder_of(SCHEMAS[raw["name"]], tmp_path / "data")), "subset": None, "split": "train"}
    prompt = next(read_prompts(DatasetSource(**raw)))
    assert [(message["role"], message["content"]) for message in prompt.messages] == messages
    assert prompt.reference == reference


@pytest.mark.parametrize(
    "text",
    [
        "What is a cat?",
        "\n\nAssistant: Hello.",
        "\n\nHuman: \n\nAssistant: Yes.",
        "\n\nHuman: A?\n\nAssistant: B.\n\nAssistant: C.",
    ],
)
def test_the_error_names_a_text_that_is_not_a_dialogue(tmp_path: Path, text: str) -> None:
    folder = folder_of([{"chosen": text}], tmp_path / "data")
    with pytest.raises(UserError, match=r"row 0 .*'chosen': expected a text of turns"):
        list(read_prompts(DatasetSource(type="dataset", name=str(folder), dialogue_column="chosen")))


def test_a_dialogue_that_ends_with_the_human_has_no_reference(tmp_path: Path) -> None:
    folder = folder_of([{"chosen": "\n\nHuman: A?"}], tmp_path / "data")
    (prompt,) = read_prompts(DatasetSource(type="dataset", name=str(folder), dialogue_column="chosen"))
    assert (prompt.messages, prompt.reference) == ([{"role": "user", "content": "A?"}], None)


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.name not in STUDIES], ids=lambda path: path.name)
def test_every_example_is_valid_if_its_models_and_data_are_available(tmp_path: Path, path: Path) -> None:
    """Small models and files of the same schemas replace those of the hub."""
    raw = example(path.name)
    raw["run"]["dir"] = str(tmp_path / "run")
    judges = raw["evaluation"].get("judges", {}).values()
    models = [raw["teacher"], raw["student"], raw["sampling"].get("rejected", {})]
    for number, model in enumerate([*models, *(judge["model"] for judge in judges if judge["type"] == "llm")]):
        if "path" in model:
            folder = make_random_model(tmp_path / f"model-{number}", max_position_embeddings=4096)
            model["path"] = str(folder)
            if "template" not in model:  # the model on the hub has a chat template
                config = json.loads((folder / "tokenizer_config.json").read_text())
                template = "{% for m in messages %}{{ m.content }} {% endfor %}"
                (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    for part in ("source", "heldout"):
        source = raw["prompts"].get(part)
        if source and source["type"] == "dataset":
            rows = SCHEMAS[source["name"]]
            source["split"] = source["split"].partition("_")[0]  # the only split of a folder of files
            source |= {"name": str(folder_of(rows, tmp_path / part, source["split"], 10)), "subset": None}
        if source and source["type"] == "files":
            texts = {"text": "x", "synopsis": "y", "package": "z"}
            turns = ([{"role": "user", "content": f"Say {part} {n}"}] for n in range(200))
            rows = [texts | {"messages": messages, "text": messages[0]["content"]} for messages in turns]
            (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            source["paths"] = [str(tmp_path / f"{part}.jsonl")]
    raw["prompts"] |= {"duplicates": "keep", "heldout_fraction": 0.4}
    config = parse_config(raw, path.name)
    check_inputs(config, RunDir.of(config), all_rows=True)
    assert not (tmp_path / "run").exists(), "a check starts no run"
