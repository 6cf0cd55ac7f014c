"""Engine of transformers' `generate`, for models that vLLM lacks.

Requests wait in the event loop. A thread takes those of one decoding and of similar length, as many
as make a batch, and generates. Whatever raises there ends the engine, as it does with vLLM: the
fleet then finds the row that it was for. Only a batch that lacks memory is tried again, in halves.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING, Any

from plad_dist.compat.linux import process_began
from plad_dist.config import Decoding, Model
from plad_dist.data.conversation import Conversation
from plad_dist.data.models import context_length
from plad_dist.errors import UserError
from plad_dist.sampling.backend import Completion, RefusedPromptError, Response
from plad_dist.sampling.engine_arguments import check_engine_args, max_sequences
from plad_dist.sampling.engine_texts import EngineTexts, room_for_response
from plad_dist.sampling.generation.batch_request import BatchRequest, BatchRow
from plad_dist.timeline import StartClock

if TYPE_CHECKING:
    from plad_dist.sampling.generation.model import GenerativeModel

_CONTEXT_TOKENS = 8  # of a prompt, on which the first characters of a response may depend


class TransformersEngine:
    """A model of transformers that responds to prompts in batches. Use it inside one event loop.

    Args:
        path: folder or hub name of the model.
        settings: the model's section of the config.
        engine: `max_num_seqs`, the size of a batch, and `dtype`.

    Raises:
        UserError: the arguments are wrong, transformers cannot load the model, or it has no usable
            tokenizer or template.
    """

    paid, retries = False, 0
    fatal: tuple[type[Exception], ...] = ()

    def __init__(self, path: str, settings: Model, engine: dict[str, Any]) -> None:
        self.start = StartClock(process_began())
        self.start.end("process")
        import torch

        self.start.end("imports")
        check_engine_args(engine, "engine")
        self._texts, self._settings = EngineTexts(path, settings), settings
        self._batch_size = max_sequences(engine, "gpu" if torch.cuda.is_available() else "cpu")
        self._dtype = engine.get("dtype")
        self._context = context_length(path, settings)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self._waiting: list[BatchRequest] = []
        self._halves: list[list[BatchRequest]] = []  # of batches for which there was too little memory
        self._rows: list[BatchRow] = []  # of the present batch
        self._worker: asyncio.Task[None] | None = None
        self._death: Exception | None = None
        self._is_closing = threading.Event()
        self.path: str | None = None
        self._load(path)
        self.start.end("engine")

    def _load(self, path: str) -> None:
        from plad_dist.sampling.generation.model import GenerativeModel

        tokenizer = self._texts.renderer.tokenizer
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._model: GenerativeModel | None = None  # frees the memory of the model before
        try:
            self._model = GenerativeModel(path, self._settings, self._dtype, int(pad_id))
        except Exception as error:
            self._death = error
            raise
        self.path = path

    async def check(self) -> str | None:
        """Return None: the start of the engine has checked everything."""
        return None

    def render(self, prompts: Sequence[Conversation]) -> Sequence[list[int] | UserError]:
        """Return the token ids of each prompt, or the error why the template cannot render it."""
        return self._texts.render(prompts)

    async def complete(self, prompt_ids: list[int], decoding: Decoding, seed: int, request_id: str) -> Completion:
        """Draw one response.

        Raises:
            RefusedPromptError: the engine will never respond to this prompt.
        """
        room = room_for_response(prompt_ids, self._context)
        if not prompt_ids:
            raise RefusedPromptError("prompt has no tokens")
        row: BatchRow = await self._submit(prompt_ids, room=room, decoding=decoding, seed=seed)
        assert row.finish_reason is not None, "only finished rows are results"
        return self._texts.drawn(prompt_ids, row.text, row.token_ids, row.logprob, row.finish_reason)

    async def score(self, prompt_ids: list[int], response: Response, request_id: str) -> Completion:
        """Return a response with its log-likelihood, as :meth:`EngineTexts.scored` does.

        Raises:
            RefusedPromptError: the prompt has no tokens.
        """

        if not prompt_ids:
            raise RefusedPromptError("prompt has no tokens")

        async def compute(ids: list[int]) -> float:
            return float(await self._submit(prompt_ids, response_ids=ids))

        return await self._texts.scored(prompt_ids, response, self._context, compute)

    async def load_weights(self, path: str) -> None:
        """Respond with the weights in another folder, of the same architecture, from now on."""
        if path != self.path:
            self.path, self.start = None, StartClock()
            # A load whose caller was cancelled ends first: there is one thread.
            await asyncio.get_running_loop().run_in_executor(self._thread, self._load, path)
            self.start.end("engine")

    @property
    def dead(self) -> bool:
        """True if the engine will not respond any more."""
        return self._death is not None or self._is_closing.is_set()

    @property
    def tokens(self) -> int:
        """Number of tokens generated for unfinished responses."""
        return sum(len(row.token_ids) for row in self._rows if not row.is_done)

    async def close(self) -> None:
        """End the present batch at its next token, and the thread."""
        self._is_closing.set()
        if self._worker is not None:
            await self._worker
        await asyncio.to_thread(self._thread.shutdown)
        self._model = None

    # -- batches

    async def _submit(self, prompt_ids: Sequence[int], **request: Any) -> Any:
        """Return the result of a request once its batch has it."""
        if self.dead:
            raise RuntimeError(f"the engine has ended: {self._death or 'it was closed'}")
        result = asyncio.get_running_loop().create_future()
        self._waiting.append(BatchRequest(prompt_ids, result, **request))
        if self._worker is None or self._worker.done():
            # It begins after the requests that other tasks make in this turn of the loop.
            self._worker = asyncio.create_task(self._work())
        return await result

    async def _work(self) -> None:
        """Process batches until no request waits, or the engine has ended."""
        loop = asyncio.get_running_loop()
        if self._model is None:
            await loop.run_in_executor(self._thread, int)  # after the load of other weights in the one thread
        if self.dead:
            self._fail(self._waiting)
            return
        while batch := self._next_batch():
            process = self._score if batch[0].decoding is None else self._draw
            try:
                await loop.run_in_executor(self._thread, process, batch)
            except Exception as error:  # noqa: BLE001 - models raise whatever their layers raise
                if _lacks_memory(error) and len(batch) > 1:
                    if len(batch) == self._batch_size:
                        self._batch_size //= 2
                    half = len(batch) // 2
                    self._halves += [batch[:half], batch[half:]]
                    continue
                self._death = error
            if self.dead:
                self._fail([*batch, *self._waiting, *chain.from_iterable(self._halves)])
                return

    def _next_batch(self) -> list[BatchRequest]:
        """Take the request that has waited longest, with others of the same kind.

        The requests of a kind are divided by length, since all rows of a batch take the space and
        time of the longest.
        """
        while self._halves:
            if half := [request for request in self._halves.pop() if not request.result.done()]:
                return half
        waiting = [request for request in self._waiting if not request.result.done()]
        if not waiting:
            self._waiting = []
            return []
        first = waiting[0]
        peers = [request for request in waiting if self._may_share(first, request)]
        peers.sort(key=lambda request: request.length)
        place = peers.index(first) // self._batch_size * self._batch_size
        batch = peers[place : place + self._batch_size]
        taken = set(batch)
        self._waiting = [request for request in waiting if request not in taken]
        return batch

    def _may_share(self, first: BatchRequest, other: BatchRequest) -> bool:
        assert self._model is not None
        if first.decoding != other.decoding:
            return False
        if first.decoding is None:
            return self._model.mixes_scores or first.lengths == other.lengths
        return self._model.mixes_lengths or first.length == other.length

    def _fail(self, requests: Sequence[BatchRequest]) -> None:
        self._waiting, self._halves = [], []
        for request in requests:
            if not request.result.done():
                request.result.set_exception(self._death or RuntimeError("the engine was closed"))

    # -- in the thread

    def _draw(self, batch: Sequence[BatchRequest]) -> None:
        from plad_dist.sampling.generation.model import ResponseEnds
        from plad_dist.sampling.generation.token_choice import TokenChoice

        decoding = batch[0].decoding
        assert decoding is not None
        assert self._model is not None
        requests = {_row_of(request, decoding): request for request in batch}
        self._rows = list(requests)

        def leave(row: BatchRow) -> None:
            _pass_on(requests[row], row)

        def is_unwanted(row: BatchRow) -> bool:
            return self._is_closing.is_set() or requests[row].result.cancelled()

        end_ids = self._texts.renderer.end_ids | set(decoding.stop_token_ids)
        choice = TokenChoice(self._rows, decoding, end_ids)
        ends = ResponseEnds(choice, end_ids, decoding.stop, self._text_of, leave, is_unwanted)
        self._model.generate(choice, ends)

    def _score(self, batch: Sequence[BatchRequest]) -> None:
        assert self._model is not None
        logprobs = self._model.logprobs([(request.prompt_ids, request.response_ids) for request in batch])
        for request, logprob in zip(batch, logprobs, strict=True):
            _pass_on(request, logprob)

    def _text_of(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        """Return the text of a response, after the prompt unless an encoder has read that."""
        assert self._model is not None
        before = [] if self._model.is_encoder_decoder else list(prompt_ids[-_CONTEXT_TOKENS:])
        context, text = self._texts.renderer.decode([before, [*before, *token_ids]])
        return text[len(context) :]


def _row_of(request: BatchRequest, decoding: Decoding) -> BatchRow:
    most, least = min(decoding.max_tokens, request.room), min(decoding.min_tokens, request.room)
    return BatchRow(request.prompt_ids, request.seed, least, most)


def _pass_on(request: BatchRequest, value: Any) -> None:
    """Give a request its result, from the thread."""

    def set_result() -> None:
        if not request.result.done():  # cancelled
            request.result.set_result(value)

    request.result.get_loop().call_soon_threadsafe(set_result)


def _lacks_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)
