"""The connection to an OpenAI-compatible server. It alone knows the key; every text of the server is cleaned here."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import NoReturn
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from plad_dist.config import Endpoint
from plad_dist.sampling.endpoint.rates import retry_after_s
from plad_dist.sampling.endpoint.reply import Failure, Reply, read_reply, redacted

_CONNECT_S, _CHECK_S = 30.0, 30.0


class Connection:
    """Sends single requests; what may go wrong with one comes back as a :class:`Failure`.

    The key is read from the environment here, and is neither shown, logged, put into an error, nor pickled.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.__key = os.environ.get(endpoint.api_key_env, "").strip() if endpoint.api_key_env else ""
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"Connection({self._endpoint.url})"

    def __getstate__(self) -> NoReturn:
        raise TypeError("a connection holds a key and is not pickled; make one where it is used")

    def key_problem(self) -> str | None:
        """What is wrong with the key as it stands in the environment."""
        name = self._endpoint.api_key_env
        if name and not self.__key:
            return f"the variable {name} (endpoint.api_key_env) is empty or not set on this node"
        if not self.__key.isascii() or not self.__key.isprintable() or " " in self.__key:
            return f"the value of {name} is no key: it holds spaces or characters beyond ASCII"
        return None

    async def post(self, body: bytes, max_tokens: int) -> Reply | Failure:
        """Ask for one response of at most so many tokens."""
        path = "chat/completions" if self._endpoint.api == "chat" else "completions"
        url = f"{self._endpoint.url}/{path}"
        try:
            async with self._connected().post(url, data=body, allow_redirects=False) as response:
                if 300 <= response.status < 400:
                    return self._redirect(response)
                raw, headers, status = await response.read(), response.headers, response.status
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            return Failure("retry", self._clean(f"no connection: {error}"))
        except TimeoutError:
            return Failure("retry", f"no answer within {self._endpoint.timeout_s:g} s", usage=None)
        except (aiohttp.ClientError, OSError) as error:
            return Failure("retry", self._clean(f"connection lost: {str(error) or type(error).__name__}"), usage=None)
        outcome = read_reply(status, raw, max_tokens, self._clean)
        if isinstance(outcome, Failure):
            return replace(outcome, retry_after_s=retry_after_s(headers, time.time()))
        return outcome

    async def look(self) -> Failure | None:
        """Whether the server answers and takes the key. Costs nothing; not every server lists its models."""
        limit_s = min(_CHECK_S, self._endpoint.timeout_s)
        try:
            async with self._connected().get(
                f"{self._endpoint.url}/models", allow_redirects=False, timeout=aiohttp.ClientTimeout(total=limit_s)
            ) as response:
                if 300 <= response.status < 400:
                    return self._redirect(response)
                if response.status not in (401, 403) and response.status < 500:
                    return None
                outcome = read_reply(response.status, await response.read(), 0, self._clean)
                return outcome if isinstance(outcome, Failure) else None
        except TimeoutError:
            return Failure("retry", f"no answer within {limit_s:g} s")
        except (aiohttp.ClientError, OSError) as error:
            return Failure("retry", self._clean(str(error) or type(error).__name__))

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            url, timeout_s = urlsplit(self._endpoint.url), self._endpoint.timeout_s
            headers = {"Content-Type": "application/json"}
            if self.__key:
                headers["Authorization"] = f"Bearer {self.__key}"
            self._session = aiohttp.ClientSession(
                headers=headers,
                connector=aiohttp.TCPConnector(limit=self._endpoint.concurrency),
                timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(_CONNECT_S, timeout_s / 2)),
                # Not `trust_env`, which would send a password of ~/.netrc in place of the key.
                proxy=None if proxy_bypass(url.hostname or "") else getproxies().get(url.scheme),
            )
        return self._session

    def _redirect(self, response: aiohttp.ClientResponse) -> Failure:
        """A redirect is not followed: it would carry the key to wherever it points."""
        target = response.headers.get("Location", "").partition("?")[0]
        return Failure("mend", self._clean(f"HTTP {response.status} to {target}"), response.status)

    def _clean(self, text: str) -> str:
        return redacted(text, self.__key)
