"""A config is bounded, holds no secret, and names no folder outside of its place."""

# ruff: noqa: E501 - lists of cases

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from plad_dist.config import Endpoint, Evaluation, Model
from plad_dist.config.secrets import secret_location
from plad_dist.config_file import override, parse_section, read_yaml
from plad_dist.config_yaml import dump_yaml, load_plain_yaml
from plad_dist.errors import UserError


def bomb(levels: int, open: str = "[", close: str = "]") -> str:
    """Return a document in which each level holds the one before nine times."""
    member = "k{0}: *a{1}" if open == "{" else "*a{1}"
    lines = [f"a0: &a0 {open}{'x: 1' if open == '{' else 'x'}{close}"]
    for level in range(1, levels):
        members = ", ".join(member.format(number, level - 1) for number in range(9))
        lines.append(f"a{level}: &a{level} {open}{members}{close}")
    return "\n".join(lines) + "\n"


MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9))


@pytest.mark.parametrize(
    "text",
    [bomb(7), bomb(30), bomb(9, "{", "}"), MERGES, "a: " + "[" * 10_000, "a: " + "[" * 200 + "]" * 200,
     "a: " + "{b: " * 200 + "}" * 200, "a: &a [*a]", "a: &a {b: *a}", "a: " + "x" * 600_000, "a: " + "9" * 5000,
     "- " * 10_000, "a:\n" + "".join(" " * n + "a:\n" for n in range(1, 600))],
)  # fmt: skip
def test_a_yaml_file_is_bounded_in_size_depth_and_aliases(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bomb.yaml"
    file.write_text(text)
    started = time.process_time()
    with pytest.raises(UserError, match=r"bomb\.yaml: not valid YAML|bomb\.yaml: larger than"):
        read_yaml(file)
    with pytest.raises((yaml.YAMLError, ValueError)):
        load_plain_yaml(text)
    with pytest.raises(UserError, match="not valid YAML"):
        override({}, {}, [f"student.path={text.removeprefix('a: ')}"])
    assert time.process_time() - started < 5


def test_ordinary_aliases_are_kept() -> None:
    text = "base: &base {a: 1, b: [x, y]}\nfirst: {<<: *base, c: 2}\nsecond: *base\n"
    assert load_plain_yaml(text)["first"] == {"a": 1, "b": ["x", "y"], "c": 2}
    assert load_plain_yaml(dump_yaml({"a": ["x"] * 5000}))["a"] == ["x"] * 5000


def test_an_endless_file_is_not_read() -> None:
    with pytest.raises(UserError, match="larger than 512 KiB"):
        read_yaml(Path("/dev/zero"))


SECRETS: list[dict[str, Any]] = [
    {"api_key": "x1"}, {"apiKey": "x1"}, {"API-KEY": "x1"}, {"x-api-key": "x1"}, {"token": "x1"}, {"access_token": "x1"},
    {"authorization": "x1"}, {"extra_headers": {"Authorization": "x1"}}, {"a": [{"b": {"password": "x1"}}]},
    {"client_secret": "x1"}, {"credentials": "x1"}, {"hf_token": "x1"}, {"private_key": "x1"}, {"api_keys": ["x1"]},
    {"user": "sk-verysecretkey"}, {"user": "hf_abcdefghijklmnop"}, {"note": "Bearer abcdefghij"}, {"a": ["Basic dXNlcjpwdw=="]},
    {"proxy": "http://me:pw@proxy:3128"}, {"n": "the-value-of-a-variable"}, {"sk-verysecretkey": 1},
    {"a": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc"}, {"a": "AKIAABCDEFGHIJKLMNOP"},
]  # fmt: skip


@pytest.mark.parametrize("body", SECRETS, ids=str)
def test_a_secret_in_a_free_mapping_is_refused_without_being_shown(
    body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVICE_API_KEY", "the-value-of-a-variable")
    raw = {"url": "http://h/v1", "model": "m", "extra_body": body}
    with pytest.raises(ValidationError, match="looks like a secret") as caught:
        Endpoint(**raw)
    with pytest.raises(UserError, match=r"looks like a secret.*api_key_env") as failure:
        parse_section(Endpoint, raw, "run.yaml")
    for shown in (str(caught.value), str(failure.value)):
        for secret in ("x1", "verysecret", "abcdefghij", "me:pw", "the-value", "dXNlc", "eyJ", "AKIA"):
            assert secret not in shown
    with pytest.raises(ValidationError):
        Model(path="p", template_kwargs=body)


def test_fields_that_only_sound_like_secrets_are_taken() -> None:
    body = {
        "max_tokens": None, "max_completion_tokens": 100, "stop_token_ids": [1], "skip_special_tokens": False,
        "return_token_ids": True, "thinking": {"budget_tokens": 5, "type": "enabled"}, "token_budget": 7, "eos_token": "</s>",
        "logit_bias": {"50256": -100}, "api_key": None, "service_tier": "flex", "key": "a", "bos_token": "<s>",
        "tokens_per_step": 4, "user": "team-a", "prompt_cache_key": "run-1", "reasoning": {"effort": "high"},
    }  # fmt: skip
    assert Endpoint(url="http://h/v1", model="m", extra_body=body).extra_body == body
    assert secret_location({"path": "/data/sk/hf_models/token", "text": "Answer the question: {{ messages }}"}) is None


@pytest.mark.parametrize(
    "value",
    ["/data/hf_checkpoint", "/mnt/hf_checkpoints/Qwen3-8B", "data/sk_alpaca_cleaned.jsonl", "org/mistral-sk-instruct-7b-v1",
     "xai_explanations_v1.jsonl", "runs/rk-2024-Exp-with-a-long-name-7B", "Compare sk-learn with pk_something_else."],
)  # fmt: skip
def test_ordinary_paths_and_names_are_no_secrets(value: str) -> None:
    assert secret_location({"path": value}) is None


def test_the_working_directory_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "/home/ana/projects/distillation")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/ana/key.json")
    assert (
        secret_location({"dir": "/home/ana/projects/distillation/runs/a", "api_key_file": "/home/ana/key.json"}) is None
    )


def test_special_tokens_of_a_model_are_no_secrets() -> None:
    assert secret_location({"auth_token": "<|user|>", "session_token": "[SESSION]"}, is_free=True) is None


def test_secrets_in_other_keys_are_refused() -> None:
    for settings in ({"ca_bundle": "https://me:pw@host/ca.pem"}, {"model": "sk-verysecretkey"}):
        with pytest.raises(ValidationError, match="looks like a secret"):
            Endpoint(**({"url": "http://h/v1", "model": "m"} | settings))
    with pytest.raises(ValidationError, match="no user, password"):
        Endpoint(url="http://me:pw@h/v1", model="m")


@pytest.mark.parametrize("host", ["far.example", "8.8.8.8", "api.openai.com", "[2001:4860:4860::8888]"])
def test_a_key_that_would_be_sent_unencrypted_over_a_public_network_is_noticed(host: str) -> None:
    assert Endpoint(url=f"http://{host}/v1", model="m", api_key_env="KEY").exposes_key
    assert not Endpoint(url=f"https://{host}/v1", model="m", api_key_env="KEY").exposes_key
    assert not Endpoint(url=f"http://{host}/v1", model="m").exposes_key


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "127.0.0.1",
        "10.1.2.3",
        "vllm",
        "vllm.team.svc",
        "vllm.svc.cluster.local",
        "[::1]",
        "192.168.1.5",
        "100.101.102.103",
    ],
)
def test_a_key_may_be_sent_in_a_private_network(host: str) -> None:
    assert not Endpoint(url=f"http://{host}:8000/v1", model="m", api_key_env="KEY").exposes_key


@pytest.mark.parametrize(
    "name",
    ["..", ".", "../../x", "a/b", "a\\b", ".hidden", "spool", "Journal", "damaged", "manifest.json", "part-00000.arrow",
     "x\n", "a b", "é", "..a", "", "a\x00", "-a", "x" * 101, "CON:", "a\u202eb"],
)  # fmt: skip
def test_a_name_that_is_no_folder_of_its_own_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="decoding name"):
        Evaluation(decodings={name: {"temperature": 0}})


def test_names_that_differ_in_case_alone_are_refused() -> None:
    with pytest.raises(ValidationError, match="differ in case alone"):
        Evaluation(decodings={"Greedy": {"temperature": 0}, "greedy": {"temperature": 0}})
    assert set(Evaluation(decodings={"t0.7_a-b": {"temperature": 0.7}}).decodings) == {"t0.7_a-b"}
