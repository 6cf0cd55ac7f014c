"""Prompts and responses of an engine, as texts and as tokens."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from plad_dist.compat.vllm import load_reasoning_parser
from plad_dist.config import Model
from plad_dist.data.conversation import Conversation
from plad_dist.data.reasoning import Separated
from plad_dist.data.templates import Renderer
from plad_dist.errors import UserError
from plad_dist.sampling.backend import Completion, RefusedPromptError, Response
from plad_dist.sampling.thoughts import Separate, tags_of_prompt, with_thought


class EngineTexts:
    """Conversion between the conversations of a run and the tokens of an engine's model.

    Args:
        path: folder or hub name of the model.
        settings: the model's section of the config.

    Attributes:
        renderer: tokenizer and template of the model.

    Raises:
        UserError: the model has no usable tokenizer or template.
    """

    def __init__(self, path: str, settings: Model) -> None:
        self.renderer, self._settings = Renderer(path, settings), settings
        self._parse = _parser(settings, self.renderer)

    def render(self, prompts: Sequence[Conversation]) -> list[list[int] | UserError]:
        """Return the token ids of each prompt, or the error why the template cannot render it."""
        try:
            return [*self.renderer.prompt_ids(prompts)]
        except UserError:
            return [self._render_one(prompt) for prompt in prompts]

    def _render_one(self, prompt: Conversation) -> list[int] | UserError:
        try:
            return self.renderer.prompt_ids([prompt])[0]
        except UserError as error:
            return error

    def drawn(
        self, prompt_ids: Sequence[int], text: str, token_ids: Sequence[int], logprob: float | None, finish_reason: str
    ) -> Completion:
        """Return a drawn response, with its thought apart.

        Args:
            text: text of the response, without what ended it.

        Raises:
            RefusedPromptError: the response has a thought, which the config refuses.
        """
        completion = Completion(
            text=self.renderer.control_tokens.without_end(text),
            token_ids=token_ids,
            num_tokens=len(token_ids),
            logprob=logprob,
            finish_reason=finish_reason,
            prompt_tokens=len(prompt_ids),
        )
        separate = self._parse or tags_of_prompt(self.renderer.opened_tag(prompt_ids))
        return with_thought(completion, self._settings, separate)

    async def scored(
        self,
        prompt_ids: Sequence[int],
        response: Response,
        most_tokens: int,
        compute: Callable[[list[int]], Awaitable[float]],
    ) -> Completion:
        """Return a response with the log-likelihood of its tokens, in nats.

        The end-of-sequence token counts if the response finished. The log-likelihood is None if
        prompt and response do not fit into the context, the response is an error row, or its text
        has control tokens.

        Args:
            most_tokens: largest number of tokens of a prompt and its response.
            compute: returns the log-likelihood of tokens that follow the prompt.
        """
        ids = list(response.token_ids)
        has_foreign_tokens = False
        if not ids:
            text = self.renderer.control_tokens.without_end(response.text)
            ids = self.renderer.response_ids([text])[0]
            has_foreign_tokens = self.renderer.control_tokens.has_any(ids[:-1])
            ids = ids if response.finish_reason == "stop" else ids[:-1]
        logprob: float | None = None if response.finish_reason == "error" or has_foreign_tokens else 0.0
        if ids and len(prompt_ids) + len(ids) > most_tokens:
            logprob = None
        elif ids and logprob is not None:
            logprob = await compute(ids)
        return Completion(response.text, ids, len(ids), logprob, response.finish_reason, prompt_tokens=len(prompt_ids))


def room_for_response(prompt_ids: Sequence[int], context: int) -> int:
    """Return the number of tokens that a response to a prompt may have.

    Raises:
        RefusedPromptError: there is no room for any.
    """
    room = context - len(prompt_ids)
    if room < 1:
        raise RefusedPromptError(
            f"prompt has {len(prompt_ids)} tokens, which leave no room for a response in a context of {context}"
        )
    return room


def _parser(settings: Model, renderer: Renderer) -> Separate | None:
    """Return the separation by vLLM's own parser, None if the config names none."""
    # The one for harmony finds no texts; ours does.
    if settings.reasoning_parser in (None, "openai_gptoss"):
        return None
    extract = load_reasoning_parser(settings.reasoning_parser, renderer.tokenizer, settings.template_kwargs)

    def separate(text: str) -> Separated:
        thought, answer = extract(text)
        return Separated((thought or "").strip() or None, (answer or "").lstrip(), answer is not None or not thought)

    return separate
