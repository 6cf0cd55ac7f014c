"""Whether anything listens at an address, asked before libraries that would wait for it for minutes."""

from __future__ import annotations

import socket

_CONNECT_S = 10.0


def unreachable(host: str, port: int) -> str | None:
    """Why no connection can be had, None where one can."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        return str(error.strerror or error)
    return None
