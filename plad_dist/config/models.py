"""Teachers and students: where their weights are, or who answers for them."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from plad_dist.config.section import OPERATIONAL, Section


class ScratchModel(Section):
    """A model with random weights and a tokenizer trained on the prompts and references."""

    architecture: dict[str, Any] = Field(
        description="Arguments of the transformers config, `model_type` among them; vocabulary and special tokens are "
        "filled in from the tokenizer."
    )
    vocab_size: int = Field(2048, ge=300, le=1_000_000, description="Size of the byte-pair vocabulary.")

    @field_validator("architecture")
    @classmethod
    def _has_model_type(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("model_type"), str):
            raise ValueError("needs `model_type`, the name of a transformers architecture, such as llama")
        return value


class Endpoint(Section):
    """An OpenAI-compatible server that answers prompts. Only its text is needed."""

    url: str = Field(description="Base URL, such as http://host:8000/v1.", json_schema_extra=OPERATIONAL)
    model: str = Field(min_length=1, description="The model's name there.")
    api: Literal["chat", "completions"] = Field(
        "chat", description="chat: the server renders the messages. completions: the prompt is rendered by `template`."
    )
    api_key_env: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable that holds the key. The key itself is never written anywhere.",
        json_schema_extra=OPERATIONAL,
    )
    concurrency: int = Field(64, ge=1, le=10_000, description="Most requests under way.", json_schema_extra=OPERATIONAL)
    requests_per_minute: float | None = Field(None, gt=0, json_schema_extra=OPERATIONAL)
    tokens_per_minute: float | None = Field(
        None, gt=0, description="Prompt and response tokens.", json_schema_extra=OPERATIONAL
    )
    timeout_s: float = Field(300.0, gt=0, description="Seconds for one request.", json_schema_extra=OPERATIONAL)
    max_retries: int = Field(
        6,
        ge=0,
        description="Tries of one request after its first, while others succeed; then it is an error row.",
        json_schema_extra=OPERATIONAL,
    )
    give_up_after_s: float = Field(
        900.0,
        gt=0,
        description="Seconds without one successful answer after which the stage stops; what is answered is kept.",
        json_schema_extra=OPERATIONAL,
    )
    input_price: float | None = Field(
        None, ge=0, description="Price of a million prompt tokens.", json_schema_extra=OPERATIONAL
    )
    output_price: float | None = Field(
        None, ge=0, description="Price of a million response tokens.", json_schema_extra=OPERATIONAL
    )
    max_spend: float | None = Field(
        None, gt=0, description="The stage stops before it spends more than this.", json_schema_extra=OPERATIONAL
    )
    extra_body: dict[str, Any] = Field(default={}, description="Further fields of every request.")

    @field_validator("url")
    @classmethod
    def _is_plain_url(cls, value: str) -> str:
        try:
            parsed = urlsplit(value)
            _ = parsed.port
        except ValueError as error:
            raise ValueError(f"expected a URL such as http://host:8000/v1: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.hostname:
            raise ValueError(f"expected a URL such as http://host:8000/v1, got {value!r:.60}")
        if parsed.username or parsed.password or parsed.query or parsed.fragment:
            raise ValueError("must hold no user, password, query or fragment; name the key's variable in api_key_env")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _cap_has_prices(self) -> Endpoint:
        if self.max_spend is not None and (self.input_price is None or self.output_price is None):
            raise ValueError("max_spend needs input_price and output_price")
        return self


class Model(Section):
    """A causal language model: a pretrained one by path, one made from scratch, or one behind a server."""

    path: str | None = Field(None, description="Folder or hub name of a pretrained model with its tokenizer.")
    revision: str | None = Field(None, description="Revision of the hub repository.")
    scratch: ScratchModel | None = Field(None, description="Make the model instead of loading it.")
    endpoint: Endpoint | None = Field(None, description="Ask a server instead of loading the model. Teachers only.")
    template: str | None = Field(
        None, description="Jinja template over `messages` that renders a prompt. Empty: the tokenizer's chat template."
    )
    max_length: int | None = Field(None, ge=8, description="Context length to use. Empty: the model's own.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if sum(origin is not None for origin in (self.path, self.scratch, self.endpoint)) != 1:
            raise ValueError(
                "needs exactly one of `path` (a pretrained model), `scratch` (a new one) and `endpoint` (a server)"
            )
        if self.endpoint and (self.endpoint.api == "completions") != (self.template is not None):
            raise ValueError("`template` renders the prompts of an endpoint with `api: completions`, and only of such")
        return self
