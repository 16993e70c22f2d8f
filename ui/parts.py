"""What every tab is made with: the engine's orders, the visits, the readers; and the events that Gradio is given.

Design choices
- An order's event runs in Gradio's queue which takes all orders at once: the engine decides whose turn it is. With
  Gradio's own limit of one, a small order would wait for all of a large one.
- Values come as the request holds them (`preprocess=False`). Gradio's own reading decodes uploads without limits, and
  raises errors for numbers out of range that cover the page; `mm.ui.uploads` and `mm.ui.forms` do both.
- Errors are part of the page. A `gr.Error` would cover what it concerns until the page is loaded again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from gradio.context import LocalContext

from mm.engine.engine import Engine
from mm.ui.guard import Readers
from mm.ui.limits import MAX_ORDERS
from mm.ui.orders import Orders
from mm.ui.visits import Visits

UNEXPECTED = "the model failed; the server's terminal says why"
# Events of buttons: answered at once, not in the API's documentation.
AT_ONCE: dict[str, Any] = {
    "queue": False,
    "api_visibility": "private",
    "show_progress": "hidden",
    "preprocess": False,
}
# Events that the model works for.
QUEUED: dict[str, Any] = {
    "api_visibility": "private",
    "show_progress": "hidden",
    "trigger_mode": "multiple",
    "preprocess": False,
    "concurrency_id": "orders",
    "concurrency_limit": MAX_ORDERS,
}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Shared by the tabs and the API of one page."""

    orders: Orders
    visits: Visits = field(default_factory=Visits)
    readers: Readers = field(default_factory=Readers)

    @property
    def engine(self) -> Engine:
        """The model."""
        return self.orders.engine

    def reads(self, request: gr.Request) -> Callable[[], bool]:
        """Whether the answer to a request is still read."""
        return self.readers.watch(request.session_hash, LocalContext.event_id.get(None))
