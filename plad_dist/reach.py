"""Connection checks of addresses, made before libraries that would wait for minutes."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

_CONNECT_S = 10.0
# Client connection preface of HTTP/2 (RFC 9113, 3.4) with an empty SETTINGS frame.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_SETTINGS = 4  # type of a SETTINGS frame, in the fourth byte of its header


def connection_problem(host: str, port: int) -> str | None:
    """Return why a TCP connection fails, or None if it succeeds."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        return str(error.strerror or error)
    return None


def is_grpc(host: str, port: int) -> bool:
    """Return True if a server speaks unencrypted HTTP/2, as Ray's gRPC servers do, or is silent.

    A server that is slow to respond is therefore not ruled out.
    """
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S) as connection:
            connection.settimeout(_CONNECT_S)
            connection.sendall(_PREFACE)
            head = b""
            while len(head) < 4 and (received := connection.recv(4 - len(head))):
                head += received
    except TimeoutError:
        return True
    except OSError:
        return False
    return len(head) == 4 and head[3] == _SETTINGS


def ray_problem(address: str) -> str | None:
    """Return why no Ray cluster can be reached at an address, or None if one may be.

    Ray itself would wait for many minutes. An address without host and port, such as `auto`, is not
    checked.
    """
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        return str(error)
    if not host or not port:
        return None
    if (problem := connection_problem(host, port)) is not None:
        return problem
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true") and not is_grpc(host, port):
        return "the server at this address is not Ray"
    return None
