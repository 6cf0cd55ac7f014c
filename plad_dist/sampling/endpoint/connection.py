"""The HTTP connection to an OpenAI-compatible server.

Every text of the server is redacted here, before it can reach an error or a log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from plad_dist.config import Endpoint
from plad_dist.sampling.endpoint.credentials import Credentials, trusted_certificates
from plad_dist.sampling.endpoint.reply import CERTIFICATE, TOO_LARGE, Failure, Outcome, Reply, read_error, read_replies
from plad_dist.sampling.endpoint.request import CompletionRequest
from plad_dist.sampling.endpoint.retry import retry_after_s
from plad_dist.sampling.endpoint.stream import ResponseBody
from plad_dist.untrusted import parse_json

logger = logging.getLogger("plad")

# Bounds on a response. Each token may come with an event, its text and a few log-probabilities, and
# some servers stream reasoning beyond max_tokens.
_BASE_BYTES, _BYTES_PER_TOKEN = 32 << 20, 4096
_BASE_EVENTS, _EVENTS_PER_TOKEN = 250_000, 4
_MAX_DOCUMENT_BYTES, _MAX_ERROR_BYTES = 16 << 20, 1 << 20
_TIMEOUTS, _S_PER_TOKEN = 4, 1.0
_CONNECT_TIMEOUT_S, _CHECK_TIMEOUT_S, _END_S = 30.0, 30.0, 1.0
_SLOWEST_BYTES_PER_S, _MAX_MODELS = 65_536, 10_000
_JSON = {"Content-Type": "application/json"}
_STREAM = {"stream": True, "stream_options": {"include_usage": True}}


class _TooLargeError(Exception):
    """A server sends more than a response can have."""


class Connection:
    """Sends single requests and returns their failures as values.

    The credentials are read when the object is created, and again when the server rejects them.

    Attributes:
        events: events received so far, of all streams.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint, self._credentials = endpoint, Credentials(endpoint)
        self._certificates = trusted_certificates(endpoint)
        self._renewal, self._rejected_version = asyncio.Lock(), -1
        self._streams, self.events = endpoint.stream, 0
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"Connection({self._endpoint.url})"

    def __getstate__(self) -> NoReturn:
        raise TypeError("a connection holds a key and is not pickled; create it where it is used")

    def problem(self) -> str | None:
        """Return what the user must correct before a request can be sent, None if all is well.

        The key and the headers must be readable and fit for HTTP, and the certificates readable.
        The server is not asked.
        """
        return self._certificates if isinstance(self._certificates, str) else self._credentials.problem()

    async def post(self, request: CompletionRequest) -> Outcome:
        """Request responses, and return them or why there are none.

        A request whose key the server rejects is sent again if a new key can be read, and one that
        the server rejects because it is to be streamed is sent again without that.

        The usage of a failure is None, that is unknown, if the server may have received the
        request: after a timeout and after a lost connection.
        """
        version, is_streaming = self._credentials.version, self._streams
        outcome = await self._post_once(request)
        if isinstance(outcome, Failure) and outcome.status == 401 and await self._has_new_credentials(version):
            outcome = await self._post_once(request)
        if is_streaming and isinstance(outcome, Failure) and outcome.rejects_stream:
            self.stop_streaming(f"refuses streams ({outcome.text})")
            outcome = await self._post_once(request)
        return outcome

    def stop_streaming(self, reason: str) -> None:
        """Ask for whole responses from now on, and log the reason once."""
        if self._streams:
            logger.warning(
                "%s: the server %s, so responses are not streamed from here on; a response that takes longer than "
                "endpoint.timeout_s times out. Set endpoint.stream to false to start like this",
                self._endpoint.url,
                reason,
            )
        self._streams = False

    async def _has_new_credentials(self, version: int) -> bool:
        """Read the credentials after the server has rejected a version of them, once for each."""
        async with self._renewal:
            if version == self._credentials.version != self._rejected_version:
                await asyncio.to_thread(self._credentials.read)
                self._rejected_version = version
        return self._credentials.version != version

    async def _post_once(self, request: CompletionRequest) -> Outcome:
        path = "chat/completions" if self._endpoint.api == "chat" else "completions"
        data = json.dumps(request.body | (_STREAM if self._streams else {})).encode()
        headers, body = self._credentials.headers() | _JSON, ResponseBody()
        limit_s = _TIMEOUTS * self._endpoint.timeout_s + _S_PER_TOKEN * request.most_tokens
        try:
            async with (
                asyncio.timeout(limit_s) as clock,
                self._open_session().post(
                    f"{self._endpoint.url}/{path}", data=data, headers=headers, allow_redirects=False
                ) as response,
            ):
                if 300 <= response.status < 400:
                    return self._redirect_failure(response)
                await self._receive(response, body, request.most_tokens)
        except (aiohttp.ClientError, OSError, _TooLargeError) as error:
            return self._transport_failure(error, limit_s if clock.expired() else None)
        return self._read(response, body, request)

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        form: Callable[[], aiohttp.FormData] | None = None,
        parameters: Mapping[str, str] | None = None,
        silence_s: float = 0.0,
        max_bytes: int = _MAX_DOCUMENT_BYTES,
    ) -> bytes | Failure:
        """Call another method of the server's API and return the body of its answer.

        Args:
            body: document to send as JSON.
            form: makes the form to send instead.
            silence_s: silence that is no failure, if it is longer than `timeout_s`.
            max_bytes: size of the largest answer to read.
        """
        version = self._credentials.version
        send = partial(self._call_once, method, path, body, form, parameters, silence_s, max_bytes)
        answer = await send()
        if isinstance(answer, Failure) and answer.status == 401 and await self._has_new_credentials(version):
            answer = await send()
        return answer

    async def _call_once(
        self,
        method: str,
        path: str,
        body: Any,
        form: Callable[[], aiohttp.FormData] | None,
        parameters: Mapping[str, str] | None,
        silence_s: float,
        max_bytes: int,
    ) -> bytes | Failure:
        headers = self._credentials.headers() | ({} if body is None else _JSON)
        data = form() if form is not None else None if body is None else json.dumps(body).encode()
        silence_s = max(silence_s, self._endpoint.timeout_s)
        limit_s = _TIMEOUTS * silence_s + max_bytes / _SLOWEST_BYTES_PER_S
        try:
            async with (
                asyncio.timeout(limit_s) as clock,
                self._open_session().request(
                    method,
                    f"{self._endpoint.url}/{path}",
                    params=parameters,
                    data=data,
                    headers=headers,
                    allow_redirects=False,
                    timeout=self._timeout(silence_s),
                ) as response,
            ):
                if 300 <= response.status < 400:
                    return self._redirect_failure(response)
                raw = await _read_body(response, max_bytes)
        except _TooLargeError as error:
            return Failure("blocked", f"its answer is too large: {error}", TOO_LARGE, usage=None)
        except (aiohttp.ClientError, OSError) as error:
            return self._transport_failure(error, limit_s if clock.expired() else None)
        if 200 <= response.status < 300:
            return raw
        failure = read_error(response.status, raw, self.redacted)
        return replace(failure, retry_after_s=retry_after_s(response.headers, time.time()))

    def _transport_failure(self, error: Exception, limit_s: float | None) -> Failure:
        """Return the failure of a request without a whole answer.

        Args:
            limit_s: time for the whole answer if it has passed.
        """
        match error:
            case _TooLargeError():
                return Failure("transient", f"the response is too large: {error}", usage=None)
            case TimeoutError() if limit_s is not None:
                text = f"no complete response within {limit_s:g} s; raise endpoint.timeout_s if the server is that slow"
                return Failure("transient", text, usage=None)
            case aiohttp.ClientConnectorCertificateError():
                return self._certificate_failure(error)
            case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
                return Failure("transient", self.redacted(f"no connection: {error}"))
            case TimeoutError():
                silence = f"silence of {self._endpoint.timeout_s:g} s (endpoint.timeout_s)"
                return Failure("transient", silence, usage=None)
            case _:
                reason = str(error) or type(error).__name__
                return Failure("transient", self.redacted(f"connection lost: {reason}"), usage=None)

    async def _receive(self, response: aiohttp.ClientResponse, body: ResponseBody, tokens: int) -> None:
        """Read a body up to its last event, behind which some servers leave the connection open."""
        most_events = _BASE_EVENTS + _EVENTS_PER_TOKEN * tokens
        async for data in _pieces(response, _BASE_BYTES + _BYTES_PER_TOKEN * tokens):
            events = body.events
            body.feed(data)
            self.events += body.events - events
            if body.events > most_events:
                raise _TooLargeError(f"more than {most_events:,} events")
            if body.is_done:
                # For the end, which lets the connection be used again.
                with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError, _TooLargeError):
                    await asyncio.wait_for(_read_body(response, _MAX_ERROR_BYTES), _END_S)
                return
        body.end()

    def _read(self, response: aiohttp.ClientResponse, body: ResponseBody, request: CompletionRequest) -> Outcome:
        """Parse a received body."""
        if not body.is_complete:
            return Failure("transient", "the stream ended in the middle of a response", usage=None)
        outcome = read_replies(response.status, body.raw(), request.max_tokens, self.redacted)
        if isinstance(outcome, Failure):
            pause_s = retry_after_s(response.headers, time.time())
            return replace(outcome, retry_after_s=pause_s, usage=None if body.has_output else outcome.usage)
        if not body.is_stream:
            return outcome
        return [replace(reply, is_streamed=True) if isinstance(reply, Reply) else reply for reply in outcome]

    async def check(self) -> Failure | None:
        """Return None if the server responds and accepts the key. Costs nothing.

        A server that does not list its models passes.
        """
        limit_s = min(_CHECK_TIMEOUT_S, self._endpoint.timeout_s)
        try:
            async with self._open_session().get(
                f"{self._endpoint.url}/models",
                headers=self._credentials.headers(),
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=limit_s),
            ) as response:
                if 300 <= response.status < 400:
                    return self._redirect_failure(response)
                if response.status not in (401, 403) and response.status < 500:
                    return None
                raw = await _read_body(response, _MAX_ERROR_BYTES)
                outcome = read_replies(response.status, raw, 0, self.redacted)
                return outcome if isinstance(outcome, Failure) else None
        except aiohttp.ClientConnectorCertificateError as error:
            return self._certificate_failure(error)
        except TimeoutError:
            return Failure("transient", f"no response within {limit_s:g} s")
        except (aiohttp.ClientError, OSError, _TooLargeError) as error:
            return Failure("transient", self.redacted(str(error) or type(error).__name__))

    async def list_models(self) -> tuple[int, list[str]]:
        """Return the HTTP status of the list of models, and the names in it if it can be read."""
        url = f"{self._endpoint.url}/models"
        headers, status = self._credentials.headers(), 0
        timeout = aiohttp.ClientTimeout(total=_CHECK_TIMEOUT_S)
        with contextlib.suppress(ValueError, TypeError, LookupError, aiohttp.ClientError, OSError, _TooLargeError):
            async with self._open_session().get(
                url, headers=headers, allow_redirects=False, timeout=timeout
            ) as response:
                status = response.status
                models = parse_json(await _read_body(response, _MAX_DOCUMENT_BYTES))["data"]
                names = [model["id"] for model in models[:_MAX_MODELS]]
                return status, [self.redacted(name) for name in names if isinstance(name, str)]
        return status, []

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            url = urlsplit(self._endpoint.url)
            certificates = self._certificates if isinstance(self._certificates, ssl.SSLContext) else True
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._endpoint.concurrency, ssl=certificates),
                timeout=self._timeout(self._endpoint.timeout_s),
                cookie_jar=aiohttp.DummyCookieJar(),  # a request depends on no earlier answer
                # Not `trust_env`, which would send a password from ~/.netrc instead of the key.
                proxy=None if proxy_bypass(url.hostname or "") else getproxies().get(url.scheme),
            )
        return self._session

    def _timeout(self, silence_s: float) -> aiohttp.ClientTimeout:
        connect_s = min(_CONNECT_TIMEOUT_S, self._endpoint.timeout_s / 2)
        return aiohttp.ClientTimeout(total=None, sock_read=silence_s, sock_connect=connect_s)

    def _redirect_failure(self, response: aiohttp.ClientResponse) -> Failure:
        """Return the failure for a redirect, which would carry the key to another address."""
        target = response.headers.get("Location", "").partition("?")[0]
        return Failure("blocked", self.redacted(f"HTTP {response.status} to {target}"), response.status)

    def _certificate_failure(self, error: Exception) -> Failure:
        return Failure("blocked", self.redacted(f"its certificate is not trusted: {error}"), CERTIFICATE)

    def redacted(self, text: str) -> str:
        """Return a server's text without secrets, on one line."""
        return self._credentials.redacted(text)


async def _pieces(response: aiohttp.ClientResponse, max_bytes: int) -> AsyncIterator[bytes]:
    """Yield the pieces of a body as they arrive, decompressed; of an error, only the first ones.

    Raises:
        _TooLargeError: a response has more than `max_bytes`.
    """
    size = 0
    async for data in response.content.iter_any():
        size += len(data)
        if response.status >= 400 and size > _MAX_ERROR_BYTES:
            return
        if size > max_bytes:
            raise _TooLargeError(f"more than {max_bytes >> 20} MiB")
        yield data


async def _read_body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Return a whole body, as :func:`_pieces` yields it."""
    return b"".join([data async for data in _pieces(response, max_bytes)])
