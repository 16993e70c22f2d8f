"""Whether an address can be listened at, and a port that is free."""

from __future__ import annotations

import errno
import socket

from mm.core.errors import UserError


def check_address(host: str, port: int) -> None:
    """Raises UserError where nothing can listen at that address, and says what to do."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(f"host is {host!r}, which is no address of this machine; give --host 127.0.0.1") from error
    for family, kind, protocol, _, address in found[:1]:
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(address)
            except OSError as error:
                raise UserError(_reason(error, host, port)) from error


def _reason(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return taken(host, port)
    if error.errno == errno.EACCES:
        return f"port {port} needs administrator rights; give one above 1023 with --port, for example 7860"
    return f"host is {host!r}, which is no address of this machine; give --host 127.0.0.1"


def taken(host: str, port: int) -> str:
    """The message for a port that another program listens at."""
    free = free_port_near(host, port)
    advice = f"port {free} is free: --port {free}" if free else "give another one with --port"
    return f"port {port} is taken; {advice}"


def free_port_near(host: str, port: int, tries: int = 50) -> int | None:
    """The next port above `port` that is free; None where none of `tries` is."""
    for other in range(port + 1, min(port + 1 + tries, 65536)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
            try:
                trial.bind((host, other))
            except OSError:
                continue
            return other
    return None
