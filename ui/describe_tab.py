"""The tab that describes a picture, and answers questions about one."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

import gradio as gr

from mm.core.errors import UserError
from mm.engine.requests import Describe
from mm.ui import forms, shown
from mm.ui.limits import KEPT_SIDE, MAX_PROMPT
from mm.ui.parts import QUEUED, UNEXPECTED, Parts
from mm.ui.uploads import read_upload
from mm.ui.visits import BusyError


class DescribeTab:
    """Built where it is called, inside a tab.

    Args:
        parts: of the page.
        visit: the component with the visit's name.
    """

    def __init__(self, parts: Parts, visit: gr.Textbox) -> None:
        self.parts = parts
        with gr.Row(elem_id="describe-tab"):
            with gr.Column(elem_id="describe-ask"):
                picture = gr.Image(
                    label="Picture", type="filepath", sources=["upload", "clipboard"], height=280, buttons=[],
                    elem_id="describe-given",
                )  # fmt: skip
            with gr.Column(elem_id="describe-result"):
                question = gr.Textbox(
                    label="Question (leave it empty for a description)", max_length=MAX_PROMPT, elem_id="question"
                )
                go = gr.Button("Ask", variant="primary", min_width=80, elem_id="ask")
                status = gr.HTML(shown.status("Nothing asked yet."), elem_id="describe-status")
                answer = gr.Textbox(label="Answer", interactive=False, lines=3, elem_id="answer")
        for start in (go.click, question.submit):
            start(self._ask, [visit, picture, question], [status, answer, go], **QUEUED)

    def _ask(self, name: str, given: Any, question: Any, request: gr.Request) -> Iterator[list[Any]]:
        visit = self.parts.visits.open(name)
        try:
            token = visit.begin()
        except BusyError as error:
            gr.Info(str(error))
            yield [gr.skip()] * 3
            return
        try:
            yield [shown.status("starting", done=0), "", gr.update(interactive=False)]
            asked = describe_request(given, question)
            for now in self.parts.orders.run(asked, token, reads=self.parts.reads(request)):
                line = "waiting for the model" if now.state == "waiting" else "done"
                yield [shown.status(line, now.notices), now.text, gr.skip()]
            yield [gr.skip(), gr.skip(), gr.update(interactive=True)]
        except UserError as error:
            yield [shown.error(str(error)), "", gr.update(interactive=True)]
        except Exception:
            traceback.print_exc()
            yield [shown.error(UNEXPECTED), "", gr.update(interactive=True)]
        finally:
            visit.end(token)


def describe_request(given: object, question: object) -> Describe:
    """A question about an uploaded picture; without one, for its description."""
    picture = read_upload(given, KEPT_SIDE)
    if picture is None:
        raise UserError("there is no picture; give one first")
    asked = forms.words("question", question, empty=True).strip()
    return Describe(image=picture, question=asked or None)
