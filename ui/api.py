"""The page's calls for programs: draw, edit, describe, say. Each has the limits of the page, and its errors in a line.

Design choices
- Parameters that are left out are the model's own defaults.
- Pictures come as uploads (gradio_client's `handle_file`) and go as PNG files with their settings.
- Gradio takes the type of an answer from the annotation of what is returned, which for a generator is that of one
  answer: `_answering` sets it.
- A call's answer that nobody reads is not worked on: the call is stopped when its stream is closed.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import FileData

from mm.core.errors import UserError
from mm.engine.capabilities import Capabilities
from mm.engine.events import CancelToken
from mm.engine.requests import Request
from mm.ui import forms
from mm.ui.describe_tab import describe_request
from mm.ui.limits import KEPT_SIDE, MAX_ORDERS
from mm.ui.orders import Progress
from mm.ui.parts import UNEXPECTED, Parts
from mm.ui.talk import say as take_turn
from mm.ui.uploads import read_upload

_LANE: dict[str, Any] = {"concurrency_id": "orders", "concurrency_limit": MAX_ORDERS}
Pictures = tuple[list[FileData], dict]
Reply = tuple[str, list[FileData], dict]
_PICTURE_TASKS = {"edit", "image_to_image", "inpaint"}


def add_calls(parts: Parts) -> None:
    """Adds the calls that the model can do to the page that is being built."""
    tasks = set(parts.engine.capabilities.tasks)
    if "draw" in tasks:
        gr.api(_draw(parts), api_name="draw", **_LANE)
    if tasks & _PICTURE_TASKS:
        gr.api(_edit(parts), api_name="edit", **_LANE)
    if "describe" in tasks:
        gr.api(_describe(parts), api_name="describe", **_LANE)
    if "converse" in tasks:
        gr.api(_say(parts), api_name="say", **_LANE)


def _answering(call: Any, kind: Any) -> Any:
    """The generator `call`, annotated with the type of one answer."""
    call.__annotations__["return"] = kind
    return call


def _draw(parts: Parts) -> Callable[..., Iterator[Pictures]]:
    can = parts.engine.capabilities

    def draw(
        request: gr.Request,
        prompt: str,
        seed: int | None = None,
        count: int = 1,
        steps: int | None = None,
        mode: str | None = None,
        guidance: float | None = None,
        negative: str | None = None,
        width: int | None = None,
        height: int | None = None,
        scheduler: str | None = None,
        fast: bool = False,
        best_of: int = 1,
        strict: bool = False,
        apart: bool | dict[str, str] = False,
        refine: float | None = None,
    ) -> Iterator[Pictures]:
        """Draws pictures from a prompt; what is left out is the model's default.

        apart: true, or known things by the words in whose place they are drawn first, such as {"<mug>": "cup"}.
        refine: share of the noise from which subjects that are drawn apart are drawn again; 0: not at all.

        Returns the files so far, and "settings" of each, "notices" and the "state".
        """
        values = {
            "prompt": prompt, "seed": seed, "count": count, "steps": steps, "mode": mode, "guidance": guidance,
            "negative": negative, "width": width, "height": height, "scheduler": scheduler, "fast": fast,
            "best_of": best_of, "strict": strict, "apart": apart, "refine": refine,
        }  # fmt: skip
        yield from _pictures(parts, lambda: forms.draw_request(values, can), request)

    return _answering(draw, Pictures)


def _edit(parts: Parts) -> Callable[..., Iterator[Pictures]]:
    can = parts.engine.capabilities

    def edit(
        request: gr.Request,
        picture: FileData,
        prompt: str,
        mask: FileData | None = None,
        task: str | None = None,
        seed: int | None = None,
        count: int = 1,
        steps: int | None = None,
        mode: str | None = None,
        guidance: float | None = None,
        negative: str | None = None,
        image_guidance: float | None = None,
        strength: float | None = None,
        scheduler: str | None = None,
        width: int | None = None,
        height: int | None = None,
        fast: bool = False,
        best_of: int = 1,
        strict: bool = False,
    ) -> Iterator[Pictures]:
        """Draws from a picture. task: edit, image_to_image or inpaint; left out, the model's first of these.

        prompt: the instruction, or what is drawn. mask: a picture that is white where it may change.
        """
        values = {
            "prompt": prompt, "seed": seed, "count": count, "steps": steps, "mode": mode, "guidance": guidance,
            "negative": negative, "image_guidance": image_guidance, "strength": strength, "scheduler": scheduler,
            "width": width, "height": height, "fast": fast, "best_of": best_of, "strict": strict,
        }  # fmt: skip
        yield from _pictures(parts, lambda: _edit_request(can, task, values, picture, mask), request)

    return _answering(edit, Pictures)


def _edit_request(can: Capabilities, task: str | None, values: dict[str, Any], picture: object, mask: object) -> Any:
    """Reads the uploads and the values."""
    first = next(name for name in ("edit", "image_to_image", "inpaint") if name in can.tasks)
    painted = read_upload(mask, KEPT_SIDE, what="mask")
    source = read_upload(picture, KEPT_SIDE)
    if source is not None and painted is not None:
        painted = painted.convert("L").resize(source.size)
    source = source if source is None else source.convert("RGB")
    return forms.picture_request(
        task or ("inpaint" if mask and first != "edit" else first), values, can, source, painted
    )


def _describe(parts: Parts) -> Callable[..., Iterator[str]]:
    def describe(request: gr.Request, picture: FileData, question: str | None = None) -> Iterator[str]:
        """Answers a question about a picture, or describes it."""
        with _errors():
            asked = describe_request(picture, question)
            for now in parts.orders.run(asked, CancelToken(), reads=parts.reads(request)):
                if now.state == "done":
                    yield now.text

    return _answering(describe, str)


def _say(parts: Parts) -> Callable[..., Iterator[Reply]]:
    def say(request: gr.Request, words: str, picture: FileData | None = None, new: bool = False) -> Iterator[Reply]:
        """A turn of this client's conversation; new: begins another one. Returns words and pictures of the reply."""
        visit = parts.visits.of_session(request.session_hash)
        if new:
            visit.new_conversation()
        with _errors():
            for now in take_turn(parts.orders, visit, words, picture, reads=parts.reads(request)):
                progress = now.progress
                files = [_file(path) for path in progress.files]
                yield progress.text, files, {"notices": list(progress.notices), "state": progress.state}

    return _answering(say, Reply)


def _pictures(parts: Parts, make: Callable[[], Request], request: gr.Request) -> Iterator[Pictures]:
    """Runs a drawing; its files are removed when Gradio has copied them."""
    token, last = CancelToken(), Progress(count=0)
    try:
        with _errors():
            for last in parts.orders.run(make(), token, reads=parts.reads(request)):
                settings = [kept.settings for kept in last.kept]
                files = [_file(path) for path in last.files]
                yield files, {"settings": settings, "notices": list(last.notices), "state": last.state}
    finally:
        token.cancel()
        for path in last.files:
            Path(path).unlink(missing_ok=True)


def _file(path: str) -> Any:
    """A file as Gradio sends it."""
    return FileData(path=path, orig_name=Path(path).name, mime_type="image/png").model_dump()


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Sends a UserError's line to the client; of any other error, that there was one."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None
    except Exception as error:
        traceback.print_exc()
        raise gr.Error(UNEXPECTED, print_exception=False) from error
