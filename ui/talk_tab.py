"""The tab in which one converses."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

import gradio as gr

from mm.core.errors import UserError
from mm.ui import shown
from mm.ui.limits import MAX_PROMPT
from mm.ui.parts import AT_ONCE, QUEUED, UNEXPECTED, Parts
from mm.ui.talk import say
from mm.ui.visits import BusyError, Message

_EXAMPLE = "draw a tree at night / add an owl above it / how many animals are there?"
_EMPTY = shown.status("Say something.")


def as_chat(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as the chat box takes them; a message with words and a picture becomes two.

    The box reads HTML also where Markdown is off, so words are escaped.
    """
    out: list[dict[str, Any]] = []
    for message in messages:
        if message["file"]:
            out.append({"role": message["role"], "content": {"path": message["file"]}})
        if message["text"]:
            out.append({"role": message["role"], "content": shown.escaped(message["text"])})
    return out


class TalkTab:
    """Built where it is called, inside a tab.

    Args:
        parts: of the page.
        visit: the component with the visit's name.
    """

    def __init__(self, parts: Parts, visit: gr.Textbox) -> None:
        self.parts = parts
        self.chat = gr.Chatbot(
            label="Conversation", elem_id="chat", buttons=["copy"], render_markdown=False, feedback_options=None,
            latex_delimiters=[], allow_tags=False,
        )  # fmt: skip
        self.status = gr.HTML(_EMPTY, elem_id="talk-status")
        with gr.Row():
            self.words = gr.Textbox(
                label="Message", placeholder=_EXAMPLE, scale=4, max_length=MAX_PROMPT, min_width=240, elem_id="say",
                max_lines=4,
            )  # fmt: skip
            self.picture = gr.Image(
                label="Picture", type="filepath", sources=["upload", "clipboard"], height=120, scale=1, min_width=120,
                elem_id="talk-give", buttons=[],
            )  # fmt: skip
        with gr.Row(elem_classes="mm-buttons"):
            self.send = gr.Button("Send", variant="primary", min_width=80, elem_id="send")
            halt = gr.Button("Stop", min_width=80)
            new = gr.Button("New conversation", min_width=110, elem_id="new")
        outputs = [self.chat, self.status, self.words, self.picture, self.send]
        for start in (self.send.click, self.words.submit):
            start(self._say, [visit, self.words, self.picture], outputs, **QUEUED)
        halt.click(self._stop, visit, None, **AT_ONCE)
        for start in (new.click, self.chat.clear):
            start(self._anew, visit, [self.chat, self.status, self.send], **AT_ONCE)

    def _say(self, name: str, words: Any, given: Any, request: gr.Request) -> Iterator[list[Any]]:
        visit, sent = self.parts.visits.open(name), False
        conversation = visit.messages
        try:
            for now in say(self.parts.orders, visit, words, given, reads=self.parts.reads(request)):
                if visit.messages is not conversation:  # a new one was begun
                    break
                fields = [gr.skip(), gr.skip()] if sent else ["", None]
                line = now.progress.state if now.progress.state in ("stopping", "done") else "answering"
                sent = True
                update = gr.update(interactive=now.progress.state == "done")
                yield [as_chat(now.messages), shown.status(line, now.progress.notices), *fields, update]
        except BusyError as error:
            gr.Info(str(error))
            yield [gr.skip()] * 5
        except Exception as error:
            if not isinstance(error, UserError):
                traceback.print_exc()
            line = str(error) if isinstance(error, UserError) else UNEXPECTED
            again = words if sent else gr.skip()  # what was typed comes back, to be changed and sent again
            yield [as_chat(visit.messages), shown.error(line), again, gr.skip(), gr.update(interactive=True)]

    def _stop(self, name: str) -> None:
        self.parts.visits.open(name).cancel()

    def _anew(self, name: str) -> list[Any]:
        self.parts.visits.open(name).new_conversation()
        return [[], _EMPTY, gr.update(interactive=True)]

    def restored(self, messages: list[Message]) -> list[dict[str, Any]]:
        """The conversation, for a page that was loaded again."""
        return as_chat(messages)
