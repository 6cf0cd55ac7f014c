"""Models of a run: local weights, weights that the run creates, or a remote server."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, PrivateAttr, field_validator, model_validator

from plad_dist.config.section import OPERATIONAL, Section
from plad_dist.config.values import FreeMapping, MessagesTemplate, OptionalBound, PathText

_VARIABLE, _HEADER = r"^[A-Za-z_][A-Za-z0-9_]*$", r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_SET_BY_THE_RUN = (
    "model", "messages", "prompt", "n", "best_of", "seed", "stream", "stream_options", "tools", "functions",
)  # fmt: skip
_SET_FOR_TEMPLATES = (
    "messages", "conversation", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "padding", "truncation", "max_length",
)  # fmt: skip
_SET_HEADERS = ("content-type", "content-length", "host", "transfer-encoding")  # by the HTTP client


_SHARED_ADDRESSES = ipaddress.ip_network("100.64.0.0/10")  # of carriers and overlay networks
_PRIVATE_DOMAINS = (".local", ".localhost", ".internal", ".intranet", ".lan", ".home.arpa", ".svc", ".test")


class ScratchModel(Section):
    """Model with random weights and a tokenizer trained on the prompts and references."""

    architecture: FreeMapping = Field(
        description="Arguments of the transformers config, including `model_type`. Vocabulary size and special tokens "
        "are filled in from the tokenizer."
    )
    vocab_size: int = Field(2048, ge=300, le=1_000_000, description="Size of the byte-pair vocabulary.")

    @field_validator("architecture")
    @classmethod
    def _check_architecture(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("model_type"), str):
            raise ValueError("needs `model_type`, the name of a transformers architecture, such as llama")
        return value


class CutModel(Section):
    """Some layers of a pretrained model, with its embeddings, head and tokenizer."""

    path: PathText = Field(
        min_length=1, description="Folder or hub name of the model to cut, usually that of the teacher."
    )
    revision: str | None = Field(
        None, description="Revision of the hub repository. If unset, the repository's default branch."
    )
    layers: int | list[int] = Field(
        description="Layers to keep: how many, of which the first two and the last are kept and the others are spaced "
        "evenly; or a list of their numbers, from 0."
    )

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, value: int | list[int]) -> int | list[int]:
        if isinstance(value, int):
            if value < 3:
                raise ValueError(
                    f"expected at least 3, the first two layers and the last, or a list of layer numbers; got {value}"
                )
        elif not value or min(value) < 0 or value != sorted(set(value)):
            raise ValueError(f"expected increasing layer numbers from 0, such as [0, 1, 5, 11]; got {value!s:.60}")
        return value


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model that a section names, whose tokenizer and context the section's model has.

    Attributes:
        key: key of its path in the section.
        path: its folder or hub name, as the config gives it.
        settings: section that loads it.
        layers: layers of it that the section's model has, as in the config; None for all.
    """

    key: str
    path: str
    settings: Model
    layers: int | tuple[int, ...] | None = None


def _is_private(host: str) -> bool:
    """Return True if the name or address of a host is one of a private network."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.rstrip(".").endswith(_PRIVATE_DOMAINS)
    return address.is_private or address.is_loopback or address.is_link_local or address in _SHARED_ADDRESSES


class Endpoint(Section):
    """OpenAI-compatible server that answers prompts. Only the text of its responses is needed."""

    url: PathText = Field(description="Base URL, such as http://host:8000/v1.", json_schema_extra=OPERATIONAL)
    model: str = Field(min_length=1, description="Name of the model at the server.")
    api: Literal["chat", "completions"] = Field(
        "chat", description="chat: the server renders the messages. completions: `template` renders the prompt."
    )
    api_key_env: str | None = Field(
        None,
        description="Environment variable that holds the API key. The key itself is never written anywhere. If unset, "
        "and without `api_key_file` and `api_key_command`, requests carry no key.",
        json_schema_extra=OPERATIONAL,
    )
    api_key_file: PathText | None = Field(
        None,
        min_length=1,
        description="File that holds the API key, on the node that sends the requests. Read again when the server "
        "rejects the key.",
        json_schema_extra=OPERATIONAL,
    )
    api_key_command: str | None = Field(
        None,
        min_length=1,
        description="Shell command that prints the API key, on the node that sends the requests. Run again when the "
        "server rejects the key.",
        json_schema_extra=OPERATIONAL,
    )
    headers_env: dict[str, str] = Field(
        default={},
        description="Further HTTP headers of every request. Each value is the name of the environment variable that "
        "holds the header's value.",
        json_schema_extra=OPERATIONAL,
    )
    ca_bundle: PathText | None = Field(
        None,
        min_length=1,
        description="File or folder of certificates to trust besides those of the system.",
        json_schema_extra=OPERATIONAL,
    )
    concurrency: int = Field(
        64, ge=1, le=10_000, description="Maximum number of requests in flight.", json_schema_extra=OPERATIONAL
    )
    requests_per_minute: OptionalBound = Field(
        None,
        gt=0,
        description="Maximum number of requests per minute. If unset or `.inf`, no limit.",
        json_schema_extra=OPERATIONAL,
    )
    tokens_per_minute: OptionalBound = Field(
        None,
        gt=0,
        description="Maximum number of prompt and response tokens per minute. If unset or `.inf`, no limit.",
        json_schema_extra=OPERATIONAL,
    )
    timeout_s: float = Field(
        300.0,
        gt=0,
        description="Seconds of silence of the server after which a request has failed. A stream is silent only "
        "between its pieces, a response without `stream` until it is complete. A whole response may take four times "
        "as long, and a second more for each token of `max_tokens`.",
        json_schema_extra=OPERATIONAL,
    )
    mode: Literal["realtime", "batch"] = Field(
        "realtime",
        description="realtime: one request for each prompt. batch: the provider's batch interface (OpenAI's `/files` "
        "and `/batches`), which answers the prompts of a block within `batch_window`, usually at half the price. The "
        "prices are to be those of the mode.",
        json_schema_extra=OPERATIONAL,
    )
    batch_window: str = Field(
        "24h",
        min_length=1,
        description="Time in which the provider is to answer a batch, in its own words.",
        json_schema_extra=OPERATIONAL,
    )
    stream: bool = Field(
        True,
        description="Receive responses piece by piece, so that a long one does not time out. A server that refuses "
        "streams, or reports no usage in them although it is paid for, is asked for whole responses.",
        json_schema_extra=OPERATIONAL,
    )
    n_in_one_request: bool = Field(
        True,
        description="Ask for all `n` responses to a prompt in one request, whose prompt is billed once. A server that "
        "does not take `n`, or returns fewer, is asked for the others one by one.",
        json_schema_extra=OPERATIONAL,
    )
    max_retries: int = Field(
        6,
        ge=0,
        description="Maximum number of retries of a request. After that, a prompt that fails while others succeed "
        "becomes an error row. Throttled requests are not counted.",
        json_schema_extra=OPERATIONAL,
    )
    give_up_after_s: float = Field(
        900.0,
        gt=0,
        description="Seconds of failures without a successful response after which the stage stops. Responses "
        "received until then are kept.",
        json_schema_extra=OPERATIONAL,
    )
    input_price: float | None = Field(
        None, ge=0, description="Price of one million prompt tokens.", json_schema_extra=OPERATIONAL
    )
    cached_input_price: float | None = Field(
        None,
        ge=0,
        description="Price of one million prompt tokens that the server had in its cache. If unset, `input_price`.",
        json_schema_extra=OPERATIONAL,
    )
    output_price: float | None = Field(
        None,
        ge=0,
        description="Price of one million response tokens, hidden reasoning included.",
        json_schema_extra=OPERATIONAL,
    )
    max_spend: OptionalBound = Field(
        None,
        gt=0,
        description="Spending cap of the whole run, in the currency of the prices. The stage stops before a request "
        "that could exceed it. Where the server bills more than the prompt and max_tokens allow, the cap holds to one "
        "request for each command. Requires `input_price` and `output_price`. If unset or `.inf`, no cap.",
        json_schema_extra=OPERATIONAL,
    )
    extra_body: FreeMapping = Field(
        default={},
        description="Additional fields of every request. null removes a field that a server refuses, such as "
        "`max_tokens: null`. Sampling parameters of the run are set in its sampling section.",
    )

    @field_validator("url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        try:
            parsed = urlsplit(value)
            _ = parsed.port
        except ValueError as error:
            raise ValueError(f"expected a URL such as http://host:8000/v1: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.hostname:
            raise ValueError(f"expected a URL such as http://host:8000/v1, got {value!r:.60}")
        for route in ("/chat/completions", "/completions"):
            if parsed.path.rstrip("/").endswith(route):
                base = value.rstrip("/").removesuffix(route)
                raise ValueError(f"{value}: is the address of one interface; give the base URL, {base}")
        if parsed.username or parsed.password or parsed.query or parsed.fragment:
            raise ValueError(
                "must contain no user, password, query or fragment; pass a key in the variable that api_key_env names"
            )
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _check_key_variable(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(_VARIABLE, value):
            # The text may be the key, so it is not shown.
            raise ValueError("expected the name of the environment variable that holds the key, not the key itself")
        return value

    @field_validator("headers_env")
    @classmethod
    def _check_headers(cls, value: dict[str, str]) -> dict[str, str]:
        for header, name in value.items():
            if not re.fullmatch(_HEADER, header) or header.lower() in _SET_HEADERS:
                raise ValueError(f"{header!r:.60} is not a header that can be set")
            if not re.fullmatch(_VARIABLE, name):
                raise ValueError(
                    f"{header}: expected the name of an environment variable, which holds the value of the header"
                )
        return value

    @field_validator("extra_body")
    @classmethod
    def _check_extra_body(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in _SET_BY_THE_RUN:
            if name in value and not (name == "seed" and value[name] is None):
                raise ValueError(f"{name}: is set by the run; remove it")
        return value

    @model_validator(mode="after")
    def _check_credentials(self) -> Endpoint:
        sources = [name for name in ("api_key_env", "api_key_file", "api_key_command") if getattr(self, name)]
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)}: the key can have one source; remove all but one")
        if sources and any(header.lower() == "authorization" for header in self.headers_env):
            raise ValueError(f"headers_env.Authorization: the key of {sources[0]} is sent in it; remove one of them")
        return self

    @property
    def exposes_key(self) -> bool:
        """True if a key or secret header may be sent unencrypted over a public network."""
        has_key = any((self.api_key_env, self.api_key_file, self.api_key_command, self.headers_env))
        url = urlsplit(self.url)
        return has_key and url.scheme == "http" and not _is_private(url.hostname or "")

    @model_validator(mode="after")
    def _check_spending_cap(self) -> Endpoint:
        if self.max_spend is not None and (self.input_price is None or self.output_price is None):
            raise ValueError("max_spend needs input_price and output_price")
        limit = self.extra_body.get("max_completion_tokens")
        if self.max_spend is not None and self.extra_body.get("max_tokens", 0) is None and type(limit) is not int:
            raise ValueError(
                "extra_body.max_tokens: null: removes the limit that max_spend needs; set max_completion_tokens to a "
                "whole number in extra_body too"
            )
        return self


class Model(Section):
    """Causal language model: pretrained (`path`), created from scratch, or behind a server."""

    path: PathText | None = Field(None, description="Folder or hub name of a pretrained model with its tokenizer.")
    revision: str | None = Field(
        None, description="Revision of the hub repository. If unset, the repository's default branch."
    )
    scratch: ScratchModel | None = Field(
        None,
        description="Create the model with random weights instead of loading it. Available for the student and a "
        "single `teacher`.",
    )
    endpoint: Endpoint | None = Field(
        None, description="Send prompts to a server instead of loading the model. Not available for the student."
    )
    template: MessagesTemplate | None = Field(
        None,
        description="Jinja template over `messages` and `tools` that renders a prompt, as transformers renders a chat "
        "template. Default: the tokenizer's chat template.",
    )
    template_kwargs: FreeMapping = Field(
        default={},
        description="Further variables of the template, such as `enable_thinking: false`. A server gets them as "
        "chat_template_kwargs.",
    )
    reasoning: Literal["keep", "strip", "refuse"] = Field(
        "strip",
        description="Thoughts of a teacher that thinks before it answers. strip: the student learns the answer. keep: "
        "it learns thought and answer. refuse: such a response is an error row. Not available for the student and "
        "judges.",
    )
    reasoning_parser: str | None = Field(
        None,
        min_length=1,
        description="Name of vLLM's parser that separates thought and answer. If unset, the usual tags and channels "
        "are recognised.",
    )
    max_length: int | None = Field(
        None, ge=8, description="Maximum context length, in tokens. If unset, the context length of the model."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    _date: date | None = PrivateAttr(None)  # of the run, which the root of the config fills in

    @field_validator("template_kwargs")
    @classmethod
    def _check_template_kwargs(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in _SET_FOR_TEMPLATES:
            if name in value:
                remedy = "set `template` instead" if name == "chat_template" else "remove it"
                raise ValueError(f"{name}: is set by the run; {remedy}")
        return value

    @property
    def today(self) -> date:
        """Date that templates read from the clock: the run's, or today's before the run starts."""
        return self._date or date.today()

    def rendering(self) -> dict[str, Any]:
        """Return what decides how prompts are rendered, apart from the tokenizer, for
        fingerprints."""
        return {
            "template": self.template,
            "template_kwargs": self.template_kwargs,
            "date": self._date.isoformat() if self._date else None,
        }

    @model_validator(mode="after")
    def _check_reasoning(self) -> Model:
        if self.reasoning_parser and self.endpoint:
            raise ValueError("reasoning_parser: is the server's; start it with --reasoning-parser, and remove the key")
        if self.endpoint and self.template_kwargs and "chat_template_kwargs" in self.endpoint.extra_body:
            raise ValueError("template_kwargs: endpoint.extra_body has chat_template_kwargs too; keep one of them")
        return self

    def pretrained(self) -> Pretrained | None:
        """Return the pretrained model that gives this one its tokenizer, or None without one."""
        return None if self.path is None else Pretrained("path", self.path, self)

    @property
    def is_created(self) -> bool:
        """True if the run creates the model, before any training."""
        return self.scratch is not None

    def _check_one_origin(self) -> None:
        if sum(origin is not None for origin in (self.path, self.scratch, self.endpoint)) != 1:
            raise ValueError(
                "needs exactly one of `path` (a pretrained model), `scratch` (a new model) and `endpoint` (a server)"
            )

    @model_validator(mode="after")
    def _check_origin(self) -> Model:
        self._check_one_origin()
        for name in ("revision", "trust_remote_code"):
            if self.endpoint and getattr(self, name):
                raise ValueError(f"{name}: has no effect with `endpoint`, whose server loads the model; remove it")
        if self.endpoint and (self.endpoint.api == "completions") != (self.template is not None):
            raise ValueError(
                "`template` and an endpoint with `api: completions` need each other; set both, or use `api: chat` alone"
            )
        return self


class Student(Model):
    """The student: a model like any other, or one cut from a pretrained model."""

    cut: CutModel | None = Field(
        None,
        alias="from",
        description="Create the model from some layers of a pretrained one, which the warm-up heals.",
    )

    def pretrained(self) -> Pretrained | None:
        """Return the pretrained model that gives this one its tokenizer, or None without one."""
        if self.cut is None:
            return super().pretrained()
        settings = self.model_copy(update={"path": self.cut.path, "revision": self.cut.revision, "cut": None})
        layers = self.cut.layers if isinstance(self.cut.layers, int) else tuple(self.cut.layers)
        return Pretrained("from.path", self.cut.path, settings, layers)

    @property
    def is_created(self) -> bool:
        """True if the run creates the model, before any training."""
        return self.scratch is not None or self.cut is not None

    def _check_one_origin(self) -> None:
        if sum(origin is not None for origin in (self.path, self.scratch, self.cut, self.endpoint)) != 1:
            raise ValueError(
                "needs exactly one of `path` (a pretrained model), `scratch` (a new model) and `from` (some layers of "
                "a pretrained model)"
            )
        if self.cut is not None and self.revision is not None:
            raise ValueError("revision: is that of `path`; set from.revision")
