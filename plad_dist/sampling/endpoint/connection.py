"""The HTTP connection to an OpenAI-compatible server.

This is the only file that knows the API key. Every text of the server is redacted here, before it
can reach an error or a log.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import replace
from typing import NoReturn
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from plad_dist.config import Endpoint
from plad_dist.sampling.endpoint.redaction import redacted
from plad_dist.sampling.endpoint.reply import Failure, Reply, read_reply
from plad_dist.sampling.endpoint.retry import retry_after_s

_CONNECT_TIMEOUT_S, _CHECK_TIMEOUT_S = 30.0, 30.0


class Connection:
    """Sends single requests and returns their failures as values.

    The key is read from the environment when the object is created. It is never shown, logged, put
    into an error, or pickled.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.__key = os.environ.get(endpoint.api_key_env, "").strip() if endpoint.api_key_env else ""
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"Connection({self._endpoint.url})"

    def __getstate__(self) -> NoReturn:
        raise TypeError("a connection holds a key and is not pickled; create it where it is used")

    def key_problem(self) -> str | None:
        """Return the problem with the API key, or None if it is usable or the config names none.

        A key is unusable if its variable is empty or unset, or if it has spaces, control or
        non-ASCII characters. The server is not asked.
        """
        name = self._endpoint.api_key_env
        if name and not self.__key:
            return f"the variable {name} (endpoint.api_key_env) is empty or not set on this node"
        if not self.__key.isascii() or not self.__key.isprintable() or " " in self.__key:
            return f"the value of {name} is not a key: it contains spaces, control or non-ASCII characters"
        return None

    async def post(self, body: bytes, max_tokens: int) -> Reply | Failure:
        """Request one response of at most `max_tokens` tokens.

        The usage of a failure is None, that is unknown, if the server may have received the
        request: after a timeout and after a lost connection.
        """
        path = "chat/completions" if self._endpoint.api == "chat" else "completions"
        url = f"{self._endpoint.url}/{path}"
        try:
            async with self._open_session().post(url, data=body, allow_redirects=False) as response:
                if 300 <= response.status < 400:
                    return self._redirect_failure(response)
                raw, headers, status = await response.read(), response.headers, response.status
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            return Failure("transient", self._redacted(f"no connection: {error}"))
        except TimeoutError:
            return Failure("transient", f"no response within {self._endpoint.timeout_s:g} s", usage=None)
        except (aiohttp.ClientError, OSError) as error:
            reason = str(error) or type(error).__name__
            return Failure("transient", self._redacted(f"connection lost: {reason}"), usage=None)
        outcome = read_reply(status, raw, max_tokens, self._redacted)
        if isinstance(outcome, Failure):
            return replace(outcome, retry_after_s=retry_after_s(headers, time.time()))
        return outcome

    async def check(self) -> Failure | None:
        """Return None if the server responds and accepts the key. Costs nothing.

        A server that does not list its models passes.
        """
        limit_s = min(_CHECK_TIMEOUT_S, self._endpoint.timeout_s)
        try:
            async with self._open_session().get(
                f"{self._endpoint.url}/models", allow_redirects=False, timeout=aiohttp.ClientTimeout(total=limit_s)
            ) as response:
                if 300 <= response.status < 400:
                    return self._redirect_failure(response)
                if response.status not in (401, 403) and response.status < 500:
                    return None
                outcome = read_reply(response.status, await response.read(), 0, self._redacted)
                return outcome if isinstance(outcome, Failure) else None
        except TimeoutError:
            return Failure("transient", f"no response within {limit_s:g} s")
        except (aiohttp.ClientError, OSError) as error:
            return Failure("transient", self._redacted(str(error) or type(error).__name__))

    async def list_models(self) -> tuple[int, list[str]]:
        """Return the HTTP status of the list of models, and the names in it if it can be read."""
        url = f"{self._endpoint.url}/models"
        async with self._open_session().get(url, allow_redirects=False) as response:
            raw, status = await response.read(), response.status
        with contextlib.suppress(ValueError, TypeError, LookupError):
            return status, [self._redacted(str(model["id"])) for model in json.loads(raw)["data"]]
        return status, []

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            url, timeout_s = urlsplit(self._endpoint.url), self._endpoint.timeout_s
            headers = {"Content-Type": "application/json"}
            if self.__key:
                headers["Authorization"] = f"Bearer {self.__key}"
            self._session = aiohttp.ClientSession(
                headers=headers,
                connector=aiohttp.TCPConnector(limit=self._endpoint.concurrency),
                timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(_CONNECT_TIMEOUT_S, timeout_s / 2)),
                # Not `trust_env`, which would send a password from ~/.netrc instead of the key.
                proxy=None if proxy_bypass(url.hostname or "") else getproxies().get(url.scheme),
            )
        return self._session

    def _redirect_failure(self, response: aiohttp.ClientResponse) -> Failure:
        """Return the failure for a redirect, which would carry the key to another address."""
        target = response.headers.get("Location", "").partition("?")[0]
        return Failure("blocked", self._redacted(f"HTTP {response.status} to {target}"), response.status)

    def _redacted(self, text: str) -> str:
        return redacted(text, self.__key)
