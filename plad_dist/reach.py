"""Whether something listens at an address, asked before libraries that would wait for it for minutes."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

_CONNECT_S = 10.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(
    (0, 0, 0, 4, 0, 0, 0, 0, 0)
)  # RFC 9113, 3.4: with empty settings
_SETTINGS = 4


def unreachable(host: str, port: int) -> str | None:
    """Why no connection can be had, None where one can."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        return str(error.strerror or error)
    return None


def is_grpc(host: str, port: int) -> bool:
    """Whether a server that listens begins a connection of HTTP/2 in clear, as gRPC's do, Ray's among them; or says nothing yet."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S) as connection:
            connection.settimeout(_CONNECT_S)
            connection.sendall(_PREFACE)
            head = b""
            while len(head) < 4 and (more := connection.recv(4 - len(head))):
                head += more
    except TimeoutError:
        return True
    except OSError:
        return False
    return len(head) == 4 and head[3] == _SETTINGS


def silent(address: str) -> str | None:
    """Why no Ray listens at an address; None where one may, or it names no place. Ray itself would wait for many minutes."""
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        return str(error)
    if not host or not port:  # `auto`
        return None
    if (problem := unreachable(host, port)) is not None:
        return problem
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true") and not is_grpc(host, port):
        return "what listens there is no Ray"
    return None
