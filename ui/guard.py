"""The layer before Gradio: limits on what a request may send, headers, and who still reads an answer.

Design choices
- Bodies are counted while they arrive; a length that a client states is checked first and not relied on.
- A browser may load pictures and data from this server only (Content-Security-Policy), so that no text on the page can
  make it fetch anything else.
- Answers of queued calls are streams. Open ones are counted here, so that an order whose stream was closed is stopped.
- The folder of uploads is bounded: the oldest files go before a new one is written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.responses import PlainTextResponse

from mm.ui.limits import MAX_BODY_BYTES, MAX_CACHE_BYTES, MAX_UPLOAD_BYTES, UNREAD_SECONDS
from mm.ui.uploads import upload_folder

_API = "/gradio_api/"
_OVERHEAD = 64 << 10  # bytes of a form around its files
_POLICY = "img-src 'self' data: blob:; media-src 'self' data: blob:; connect-src 'self' data: blob:; "
_POLICY += "font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'"
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class Readers:
    """Which answers are being read, by session and by event.

    Args:
        clock: seconds; another one in tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._open: dict[str, int] = {}
        self._lock, self._clock = threading.Lock(), clock

    def enter(self, key: str) -> None:
        """A stream was opened."""
        with self._lock:
            self._open[key] = self._open.get(key, 0) + 1

    def leave(self, key: str) -> None:
        """A stream was closed."""
        with self._lock:
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]

    def watch(self, *keys: str | None) -> Callable[[], bool]:
        """A function that says whether anybody reads under one of these keys.

        It says yes for UNREAD_SECONDS until the first reader comes, and no at once when the last one has gone.
        """
        names = [key for key in keys if key]
        begun, seen = self._clock(), False

        def reads() -> bool:
            nonlocal seen
            there = any(name in self._open for name in names)
            seen = seen or there
            return there or (not seen and self._clock() - begun < UNREAD_SECONDS)

        return reads


class _TooLargeError(Exception):
    """A body is larger than what its address takes."""


class Guard:
    """ASGI middleware."""

    def __init__(self, app: Any, readers: Readers) -> None:
        self.app, self.readers = app, readers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = _API + scope["path"].partition(_API)[2] if _API in scope["path"] else ""
        key = self._stream(path, scope)
        if key is not None:
            self.readers.enter(key)
        try:
            await self._limited(scope, receive, _with_headers(send), path)
        finally:
            if key is not None:
                self.readers.leave(key)

    @staticmethod
    def _stream(path: str, scope: Any) -> str | None:
        """The session or event whose answer a request reads."""
        if scope["method"] != "GET":
            return None
        if path == f"{_API}queue/data":
            asked = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash")
            return asked[0] if asked else None
        parts = path.removeprefix(_API).split("/")
        return parts[-1] if parts[0] == "call" and len(parts) >= 3 else None

    async def _limited(self, scope: Any, receive: Any, send: Any, path: str) -> None:
        """Passes a request on, unless its body is too large."""
        upload = path.rstrip("/") == f"{_API}upload"
        most = MAX_UPLOAD_BYTES + _OVERHEAD if upload else MAX_BODY_BYTES
        refusal = PlainTextResponse(_refusal(upload), status_code=413)
        if path.startswith(f"{_API}component_server"):  # would keep pictures in memory; the page uploads them
            await PlainTextResponse("this page has no such call", status_code=404)(scope, receive, send)
            return
        if _stated(scope) > most:
            await refusal(scope, receive, send)
            return
        if upload:
            trim(upload_folder(), MAX_CACHE_BYTES)
        taken, begun = 0, False

        async def counted() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:
                raise _TooLargeError
            return message

        async def sent(message: Any) -> None:
            nonlocal begun
            if taken <= most or begun:  # else what the app makes of a body that was cut short
                begun = True
                await send(message)

        try:
            await self.app(scope, counted, sent)
        except Exception:
            if taken <= most or begun:
                raise
        if taken > most and not begun:
            await refusal(scope, receive, send)


def _refusal(upload: bool) -> str:
    if upload:
        return f"a file has more than {MAX_UPLOAD_BYTES >> 20} MiB; make it smaller"
    return f"the request has more than {MAX_BODY_BYTES >> 10} KiB; send shorter texts, and pictures as uploads"


def _stated(scope: Any) -> int:
    """The length that a request states; 0 where it states none."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and len(value) < 19:
            return int(value)
    return 0


def _with_headers(send: Any) -> Any:
    async def sent(message: Any) -> None:
        if message["type"] == "http.response.start":
            given = {name.lower() for name, _ in message.get("headers", ())}
            more = [header for header in _HEADERS if header[0] not in given]
            message = message | {"headers": [*message.get("headers", ()), *more]}
        await send(message)

    return sent


def trim(folder: Path, most: int) -> None:
    """Deletes the oldest files of a folder until half of `most` bytes is left, where it holds more than that."""
    files = []
    for path in folder.rglob("*"):
        try:
            found = path.stat()
        except OSError:  # gone in the meantime
            continue
        if path.is_file():
            files.append((found.st_mtime, found.st_size, path))
    total = sum(size for _, size, _ in files)
    if total <= most:
        return
    for _, size, path in sorted(files, key=lambda file: file[0]):
        path.unlink(missing_ok=True)
        total -= size
        if total <= most // 2:
            break
