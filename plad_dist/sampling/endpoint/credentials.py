"""Secrets of an endpoint: the API key, and headers whose values come from the environment.

This is the only file that knows them. They are read where the requests are sent, and again when the
server rejects them, because keys of short life are replaced during a run.
"""

from __future__ import annotations

import os
import ssl
import subprocess
from pathlib import Path
from typing import NoReturn

from plad_dist.config import Endpoint
from plad_dist.sampling.endpoint.redaction import redacted

_COMMAND_TIMEOUT_S = 60.0


class Credentials:
    """Key and secret headers of one endpoint. Never shown, logged, put into an error, or pickled.

    Attributes:
        version: number of different credentials read so far.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint, self.version = endpoint, 0
        self.__headers: dict[str, str] = {}
        self.__known: dict[str, None] = {}  # all secrets ever read, in this order
        self._problem: str | None = None
        self.read()

    def __repr__(self) -> str:
        return f"Credentials({key_source(self._endpoint)})"

    def __getstate__(self) -> NoReturn:
        raise TypeError("credentials hold a key and are not pickled; create them where they are used")

    def read(self) -> None:
        """Read the credentials from their sources. May take as long as the key command."""
        headers: dict[str, str] = {}
        try:
            if (source := key_source(self._endpoint)) is not None:
                key = self._read_key(source)
                headers["Authorization"] = f"Bearer {key}"
                self.__known[key] = None
            for header, name in self._endpoint.headers_env.items():
                headers[header] = _variable(name, f"endpoint.headers_env.{header}")
                self.__known[headers[header]] = None
        except _UnreadableError as error:
            self._problem = str(error)
            return
        self._problem = None
        if headers != self.__headers:
            self.__headers = headers
            self.version += 1

    def problem(self) -> str | None:
        """Return what the user must correct, or None if all secrets could be read."""
        return self._problem

    def headers(self) -> dict[str, str]:
        """Return the secret headers of a request."""
        return dict(self.__headers)

    def redacted(self, text: str) -> str:
        """Return a server's text without the secrets."""
        return redacted(text, *self.__known)

    def _read_key(self, source: str) -> str:
        endpoint = self._endpoint
        if endpoint.api_key_env is not None:
            return _variable(endpoint.api_key_env, "endpoint.api_key_env")
        text = _from_file(endpoint.api_key_file) if endpoint.api_key_file else _from_command(endpoint.api_key_command)
        return _checked(text, f"the key from {source}")


class _UnreadableError(ValueError):
    """A secret cannot be read. The message does not contain it."""


def key_source(endpoint: Endpoint) -> str | None:
    """Return the place of the API key in words, or None if requests carry no key."""
    if endpoint.api_key_env is not None:
        return f"the variable {endpoint.api_key_env}"
    if endpoint.api_key_file is not None:
        return f"the file {redacted(endpoint.api_key_file)}"
    return "the output of endpoint.api_key_command" if endpoint.api_key_command is not None else None


def trusted_certificates(endpoint: Endpoint) -> ssl.SSLContext | str | None:
    """Return the certificates to trust, None for the system's, or what is wrong with the bundle."""
    if endpoint.ca_bundle is None:
        return None
    context = ssl.create_default_context()
    try:
        path = Path(endpoint.ca_bundle)
        if path.is_dir():
            context.load_verify_locations(capath=path)
        else:
            context.load_verify_locations(cafile=path)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return f"{endpoint.ca_bundle} (endpoint.ca_bundle) holds no certificates that this node can read: {reason}"
    return context


def _variable(name: str, key: str) -> str:
    value = os.environ.get(name, "").strip()
    if not value:
        raise _UnreadableError(f"the variable {name} ({key}) is empty or not set on this node")
    return _checked(value, f"the value of {name}", spaces=key != "endpoint.api_key_env")


def _from_file(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise _UnreadableError(
            f"the file {redacted(path)} (endpoint.api_key_file) cannot be read on this node: {reason}"
        ) from None
    if not text:
        raise _UnreadableError(f"the file {path} (endpoint.api_key_file) is empty on this node")
    return text


def _from_command(command: str | None) -> str:
    """Return the output of a command. Its errors may hold secrets, so they are not shown."""
    assert command is not None
    place = "the command of endpoint.api_key_command"
    try:
        # The command is a line of the user's own config, as in a shell.
        result = subprocess.run(  # noqa: S602
            command, shell=True, check=False, capture_output=True, stdin=subprocess.DEVNULL, timeout=_COMMAND_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise _UnreadableError(f"{place} took longer than {_COMMAND_TIMEOUT_S:g} s on this node") from None
    if result.returncode:
        raise _UnreadableError(f"{place} exited with {result.returncode} on this node; run it there to see why")
    text = result.stdout.decode(errors="replace").strip()
    if not text:
        raise _UnreadableError(f"{place} printed nothing on this node")
    return text


def _checked(value: str, place: str, *, spaces: bool = False) -> str:
    """Return a secret that can be sent in a header."""
    if not value.isascii() or not value.isprintable() or (" " in value and not spaces):
        kind = "is no value of a header: it contains" if spaces else "is not a key: it contains spaces,"
        raise _UnreadableError(f"{place} {kind} control or non-ASCII characters")
    return value
