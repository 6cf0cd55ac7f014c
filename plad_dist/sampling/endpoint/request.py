"""The HTTP body of a request for responses, and the bounds on its tokens for the budget."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from plad_dist.config import Decoding, Endpoint
from plad_dist.data.conversation import Messages
from plad_dist.sampling.endpoint.usage import Usage

Prompt = Messages | str

_SENT_IF_SET = (
    "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "stop", "stop_token_ids",
)  # fmt: skip
_MOST_TOKENS = 10_000_000  # of a prompt or a response; no model has a longer context
_TEMPLATE_TOKENS = 256  # allowance for what a server's chat template adds to a prompt, such as a system prompt


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A request for one or several responses to a prompt.

    Attributes:
        body: body, before it becomes JSON.
        prompt_bytes: size of the prompt in UTF-8.
        max_tokens: limit of each response, in tokens.
        n: number of responses.
    """

    body: dict[str, Any]
    prompt_bytes: int
    max_tokens: int
    n: int = 1

    @property
    def most_tokens(self) -> int:
        """Limit of all responses together, in tokens."""
        return self.n * self.max_tokens

    @property
    def worst_usage(self) -> Usage:
        """Largest usage that the server can bill for one try: a token has at least one byte."""
        return Usage(self.prompt_bytes + _TEMPLATE_TOKENS, self.most_tokens)

    def possible(self, usage: Usage | None) -> Usage | None:
        """Return a reported usage, or None if it cannot be that of this request."""
        if usage is None or usage.prompt_tokens > _MOST_TOKENS or usage.completion_tokens > self.n * _MOST_TOKENS:
            return None
        return usage


def make_request(endpoint: Endpoint, prompt: Prompt, decoding: Decoding, seed: int, n: int = 1) -> CompletionRequest:
    """Build a request.

    Args:
        prompt: messages for `api: chat`, a rendered text for `api: completions`.
        seed: decides all responses; how several of them differ is up to the server.
        n: number of responses.
    """
    is_chat = endpoint.api == "chat"
    assert isinstance(prompt, list) == is_chat, "messages for api: chat, text for api: completions"
    body: dict[str, Any] = {
        "model": endpoint.model,
        "messages" if is_chat else "prompt": prompt,
        "max_tokens": decoding.max_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "n": n,
        "seed": seed,
    }
    # Not part of every server's API, so sent only if they are set.
    body |= {name: value for name in _SENT_IF_SET if (value := getattr(decoding, name)) not in (None, [])}
    if decoding.min_tokens:
        body["min_tokens"] = decoding.min_tokens
    body = {key: value for key, value in (body | endpoint.extra_body).items() if value is not None}
    limits = [body[key] for key in ("max_tokens", "max_completion_tokens") if isinstance(body.get(key), int)]
    return CompletionRequest(
        body=body,
        prompt_bytes=len(json.dumps(prompt, ensure_ascii=False).encode("utf-8", "surrogatepass")),
        max_tokens=max(limits, default=decoding.max_tokens),
        n=n,
    )
