"""The part of a tab in which an order is followed: status, preview, pictures, the settings of the chosen one."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from mm.core.errors import UserError
from mm.engine.requests import Request
from mm.ui import shown, style
from mm.ui.orders import Progress, keep_all
from mm.ui.parts import AT_ONCE, UNEXPECTED, Parts
from mm.ui.visits import BusyError, Kept, Visit

GALLERY: dict[str, Any] = {"format": "png", "interactive": False, "show_label": False}
GALLERY["buttons"] = ["download", "download_all", "fullscreen"]  # by default there is one that shares on a website
_BUSY, _FREE = gr.update(interactive=False), gr.update(interactive=True)


class Panel:
    """Built where it is called, inside a tab.

    Args:
        parts: of the page.
        visit: the component with the visit's name.
        go, cancel: the buttons that start and stop an order.
        name: of the tab, for element ids.
    """

    def __init__(self, parts: Parts, visit: gr.Textbox, go: gr.Button, cancel: gr.Button, name: str) -> None:
        self.parts, self.visit, self.go, self.cancel = parts, visit, go, cancel
        self.status = gr.HTML(shown.status("Nothing drawn yet."), elem_id=f"{name}-status", padding=False)
        self.preview = gr.HTML("", elem_id=f"{name}-preview", elem_classes="mm-preview-box", padding=False)
        self.gallery = gr.Gallery(
            label="Pictures", elem_id=f"{name}-pictures", elem_classes="mm-gallery", height="auto", **GALLERY
        )
        self.details = gr.HTML(shown.details(None), elem_id=f"{name}-details", padding=False)
        self.gallery.select(self._choose, visit, self.details, **AT_ONCE)
        go.click(None, None, None, js=style.show_results(name), api_visibility="private")
        cancel.click(self._stop, visit, None, **AT_ONCE)

    @property
    def outputs(self) -> list[Any]:
        """What `follow` updates, in its order."""
        return [self.status, self.preview, self.gallery, self.details, self.go, self.cancel]

    def follow(self, make: Callable[[], Request], name: object, request: gr.Request) -> Iterator[list[Any]]:
        """Runs the request that `make` gives; updates of `outputs`, in this order.

        Args:
            make: reads the fields; its UserError is shown.
            name: of the visit.
            request: of Gradio, by which a closed page is noticed.
        """
        visit = self.parts.visits.open(name)
        try:
            token = visit.begin()
        except BusyError as error:
            gr.Info(str(error))  # a text of ours
            yield [gr.skip()] * 6
            return
        try:
            yield [shown.status("starting", done=0), "", gr.skip(), gr.skip(), _BUSY, _FREE]
            asked = make()
            yield from self._run(asked, visit, token, request)
        except UserError as error:
            yield [shown.error(str(error)), "", gr.skip(), gr.skip(), _FREE, _BUSY]
        except Exception:
            traceback.print_exc()
            yield [shown.error(UNEXPECTED), "", gr.skip(), gr.skip(), _FREE, _BUSY]
        finally:
            visit.end(token)

    def _run(self, asked: Request, visit: Visit, token: Any, request: gr.Request) -> Iterator[list[Any]]:
        visit.latest, known, clock = [], 0, _Clock()
        yield [gr.skip(), "", [], gr.skip(), gr.skip(), gr.skip()]
        for now in self.parts.orders.run(asked, token, reads=self.parts.reads(request)):
            fresh = len(now.kept) > known
            known = keep_all(visit, now, known)
            over = now.state in ("done", "cancelled")
            yield [
                shown.progress(now, left=clock.left(now)),
                shown.preview(now.preview),
                now.files if fresh else gr.skip(),
                shown.details(visit.chosen) if fresh else gr.skip(),
                _FREE if over else gr.skip(),
                _BUSY if over else gr.skip(),
            ]

    def _stop(self, name: str) -> None:
        self.parts.visits.open(name).cancel()

    def _choose(self, name: str, event: gr.SelectData) -> str:
        visit = self.parts.visits.open(name)
        return choose(visit, visit.latest, event)


def choose(visit: Visit, pictures: list[Kept], event: gr.SelectData) -> str:
    """The settings of the picture that was clicked."""
    if isinstance(event.index, int) and 0 <= event.index < len(pictures):
        visit.chosen = pictures[event.index].settings
    return shown.details(visit.chosen)


class _Clock:
    """Estimates how long an order still takes, by the share that is done since its first step."""

    def __init__(self) -> None:
        self.begun: float | None = None
        self.first = 0.0

    def left(self, now: Progress) -> float | None:
        """Seconds, or None while nothing is known."""
        share = (len(now.kept) + (now.step / now.steps if now.steps else 0)) / now.count
        if now.state != "running":
            return None
        if self.begun is None:
            self.begun, self.first = time.monotonic(), share
        done = share - self.first
        return None if done < 0.02 else (time.monotonic() - self.begun) * (1 - share) / done
