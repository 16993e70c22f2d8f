"""The web app: a Draw tab in Gradio. Thin; what it does is in `mm.ui.studio`.

Design choices
- Loopback by default, no outside fonts, no analytics, one queue with one worker (two CPU cores draw one picture at a
  time), a bounded queue. No path is open to requests: pages get Gradio's copies of what an event returned, and so the
  studio's folder must lie in the system's temporary folder or the working directory.
- The layout is one column on a phone, two on a desktop.
"""

from __future__ import annotations

import html
import os
import secrets
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from mm.core.errors import UserError
from mm.families.mm_tiny import GUIDANCE, steps_for
from mm.ui.studio import MAX_COUNT, MAX_STEPS, Order, Session, Studio
from mm.ui.talk import Message, Talker, Visit

EXAMPLES = [
    "two red cats on grass, watercolor style",
    "three blue stars at night",
    "a dog left of a tree in the snow",
    "a pink rocket above a castle, pixel art style",
]
# Gradio stretches a lone picture over the whole gallery and crops it; a fixed grid shows it whole. Columns may shrink,
# or a phone's page would be as wide as all thumbnails side by side.
CSS = """
footer {display: none !important}
.gradio-container {max-width: 1100px !important; margin: auto !important}
#pictures .grid-container {grid-template-columns: repeat(2, minmax(0, 1fr)) !important}
#earlier .grid-container {grid-template-columns: repeat(6, minmax(0, 1fr)) !important}
#pictures .thumbnail-lg, #earlier .thumbnail-lg {width: 100% !important; height: auto !important}
#chat button[title="Share"], #chat button[aria-label="Share"] {display: none !important}
#pictures {height: min(640px, 100vw + 30px) !important}
"""
_THEME_FONTS = ["system-ui", "sans-serif"]
_REUSED = ("prompt", "seed", "steps", "mode", "guidance")


def _text(settings: dict[str, Any] | None) -> str:
    """Settings as short Markdown."""
    if not settings:
        return "Choose a picture to see its settings."
    shown = ", ".join(f"{name} {settings[name]}" for name in ("seed", "steps", "mode", "guidance"))
    return f"**{_plain(settings['prompt'])}**: {shown}"


def _plain(text: str) -> str:
    """A user's text where the page reads HTML."""
    return html.escape(text, quote=False)


def _seed(text: str | None) -> int | None:
    """A typed seed; empty means random."""
    typed = str(text or "").strip()
    if not typed:
        return None
    if not typed.isdecimal() or len(typed) > 12:
        raise UserError(f"seed is {typed[:20]!r}; type a whole number, or leave it empty for a random one")
    return int(typed)


def _whole(name: str, value: float) -> int:
    """A slider's value; a request of another program may hold anything."""
    if not isinstance(value, int | float) or value != value // 1:
        raise UserError(f"{name} is {value!r}; give a whole number")
    return int(value)


def _as_chat(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as the chat box takes them; a message with words and a picture becomes two."""
    out: list[dict[str, Any]] = []
    for message in messages:
        if message["file"]:
            # by default there is a button that shares on a website
            shown = gr.Image(message["file"], buttons=["download", "fullscreen"], show_label=False)
            out.append({"role": message["role"], "content": shown})
        if message["text"]:
            out.append({"role": message["role"], "content": _plain(message["text"])})
    return out


def _talk_tab(talker: Talker) -> None:
    """The tab in which one converses."""

    def say(words: str, picture: str | None, visit: Visit) -> Iterator[tuple[list[dict[str, Any]], str, None]]:
        """One turn of a conversation: words, and a picture if wanted."""
        try:
            for messages in talker.say(words, picture, visit):
                yield _as_chat(messages), "", None
        except UserError as error:
            raise gr.Error(_plain(str(error)), print_exception=False) from error

    def shown(visit: Visit) -> list[dict[str, Any]]:
        return _as_chat(visit.messages)

    def stop(visit: Visit) -> None:
        visit.stopped.set()

    def anew(visit: Visit) -> list[dict[str, Any]]:
        visit.forget()
        return []

    visit = gr.State(Visit(), time_to_live=86400, delete_callback=Visit.forget)
    chat = gr.Chatbot(label="Conversation", elem_id="chat", height=480, buttons=["copy"])
    with gr.Row():
        words = gr.Textbox(
            label="Say", placeholder="draw a tree at night / add an owl above it / how many animals are there?",
            scale=4, max_length=400, min_width=240, elem_id="say",
        )  # fmt: skip
        picture = gr.Image(label="Picture", type="filepath", sources=["upload"], height=140, scale=1, min_width=120)
    with gr.Row():
        send = gr.Button("Send", variant="primary", min_width=80)
        halt = gr.Button("Stop", min_width=80)
        new = gr.Button("New conversation", min_width=80)
    private: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
    lane: dict[str, Any] = {"concurrency_id": "pipeline", "concurrency_limit": 1}
    starts: list[tuple[Any, dict[str, Any]]] = [
        (send.click, {"api_name": "say"}),
        (words.submit, {"api_visibility": "private"}),
    ]
    for start, seen in starts:
        start(say, [words, picture, visit], [chat, words, picture], **lane, **seen).then(shown, visit, chat, **private)
    halt.click(stop, visit, None, **private)
    new.click(anew, visit, chat, **private)
    chat.clear(anew, visit, chat, **private)


def build(studio: Studio, talker: Talker | None = None) -> gr.Blocks:
    """The page for a studio; with a talker, it has a Talk tab."""

    def draw(
        prompt: str,
        seed: str,
        count: float,
        steps: float,
        mode: str,
        guidance: float,
        session: Session,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio expects it here
    ) -> Iterator[tuple[list[str], str]]:
        """Draws pictures from a prompt. Seed empty = random; mode flow or codes."""
        try:
            order = Order(
                prompt=prompt,
                seed=_seed(seed),
                count=_whole("count", count),
                steps=_whole("steps", steps),
                mode=mode,
                guidance=guidance,
            )

            def on_step(picture: int, step: int) -> None:
                done, total = picture * order.steps + step + 1, order.count * order.steps
                progress(done / total, desc=f"picture {picture + 1} of {order.count}, step {step + 1} of {order.steps}")

            shown: set[str] = set()
            for now in studio.draw(order, session, on_step):
                for note in set(now.notes) - shown:
                    gr.Warning(_plain(note))
                    shown.add(note)
                yield list(now.files), "  \n".join([f"{now.done} of {order.count} done", *map(_plain, now.notes)])
        except UserError as error:
            raise gr.Error(_plain(str(error)), print_exception=False) from error

    def stop(session: Session) -> None:
        session.cancelled.set()

    def show(session: Session) -> tuple[list[str], str]:
        return [path for path, _ in session.history], _text(session.chosen)

    def choose(pictures: list[tuple[str, dict[str, Any]]], event: gr.SelectData, session: Session) -> str:
        if event.index < len(pictures):
            session.chosen = pictures[event.index][1]
        return _text(session.chosen)

    def choose_latest(session: Session, event: gr.SelectData) -> str:
        return choose(session.latest, event, session)

    def choose_earlier(session: Session, event: gr.SelectData) -> str:
        return choose(session.history, event, session)

    def reuse(session: Session) -> list[Any]:
        if session.chosen is None:
            return [gr.skip()] * 5
        return [str(session.chosen[name]) if name == "seed" else session.chosen[name] for name in _REUSED]

    shown: dict[str, Any] = {"format": "png", "interactive": False, "show_label": False}
    shown["buttons"] = ["download", "download_all", "fullscreen"]  # by default there is one that shares on a website
    with gr.Blocks(title="mm", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        session = gr.State(Session(), time_to_live=86400, delete_callback=Session.forget)
        gr.Markdown("# mm\nType what to draw. Known are 40 objects, 8 colours, 6 backgrounds and 8 styles.")
        with gr.Tab("Draw"), gr.Row():
            with gr.Column(scale=2, min_width=280):
                prompt = gr.Textbox(label="Prompt", value=EXAMPLES[0], lines=2, max_length=600)
                with gr.Row():
                    seed = gr.Textbox(label="Seed", placeholder="random", max_lines=1, max_length=12, min_width=120)
                    count = gr.Slider(1, MAX_COUNT, value=4, step=1, label="Count", min_width=120)
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", min_width=100)
                    cancel = gr.Button("Cancel", min_width=100)
                with gr.Accordion("More", open=False):
                    steps = gr.Slider(1, MAX_STEPS, value=12, step=1, label="Steps")
                    mode = gr.Radio(["flow", "codes"], value="flow", label="Mode")
                    guidance = gr.Slider(0, 10, value=GUIDANCE, step=0.5, label="Guidance (1 = off)")
                    dice = gr.Button("New random seed", size="sm")
                gr.Examples(EXAMPLES, prompt, api_visibility="private")
            with gr.Column(scale=3, min_width=280):
                status = gr.Markdown("Nothing drawn yet.", elem_id="status")
                gallery = gr.Gallery(label="Pictures", elem_id="pictures", height=640, **shown)
                details = gr.Markdown(_text(None), elem_id="details")
                again = gr.Button("Use these settings", size="sm")
                gr.Markdown("Drawn in this session")
                history = gr.Gallery(label="Drawn in this session", elem_id="earlier", height=180, **shown)
        if talker is not None:
            with gr.Tab("Talk"):
                _talk_tab(talker)
        inputs = [prompt, seed, count, steps, mode, guidance, session]
        private: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        starts: list[tuple[Any, dict[str, Any]]] = [
            (go.click, {"api_name": "draw"}),
            (prompt.submit, {"api_visibility": "private"}),
        ]
        for start, seen in starts:
            # A cancel counts from the press of the button on, also while the order still stands in the queue.
            drawn = start(lambda session: session.cancelled.clear(), session, None, **private).then(
                draw,
                inputs,
                [gallery, status],
                concurrency_id="pipeline",
                concurrency_limit=1,
                show_progress_on=status,
                **seen,
            )
            drawn.then(show, session, [history, details], **private)
        mode.change(steps_for, mode, steps, **private)
        cancel.click(stop, session, None, **private)
        dice.click(lambda: str(secrets.randbelow(2**31)), None, seed, **private)
        gallery.select(choose_latest, session, details, **private)
        history.select(choose_earlier, session, details, **private)
        again.click(reuse, session, [prompt, seed, steps, mode, guidance], **private)
    return page.queue(max_size=32)


def launch(
    studio: Studio,
    *,
    talker: Talker | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    block: bool = True,
) -> gr.Blocks:
    """Serves the page; returns it when `block` is False."""
    theme = gr.themes.Soft(font=_THEME_FONTS, font_mono=["monospace"])
    page = build(studio, talker)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            theme=theme,
            css=CSS,
            allowed_paths=[],  # the page gets copies from Gradio's cache; nobody can ask for a file of the folder
            max_file_size="5mb",
            prevent_thread_lock=not block,
            show_error=True,
        )
    except OSError as error:
        if "empty port" not in str(error):
            raise
        raise UserError(f"port {port} is taken; give another one with --port") from error
    return page
