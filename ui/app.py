"""The web app: a Draw tab in Gradio. Thin; what it does is in `mm.ui.studio`.

Design choices
- Loopback by default, no outside fonts, no analytics, one queue with one worker (two CPU cores draw one picture at a
  time), a bounded queue, and files served from the app's own folder alone.
- The layout is one column on a phone, two on a desktop.

This module does not know how pictures are drawn.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from mm.errors import UserError
from mm.ui.studio import MAX_COUNT, MAX_STEPS, Order, Session, Studio

EXAMPLES = [
    "two red cats on grass, watercolor style",
    "three blue stars at night",
    "a dog left of a tree in the snow",
    "a pink rocket above a castle, pixel art style",
]
# Gradio stretches a lone picture over the whole gallery and crops it; a fixed grid shows it whole.
CSS = """
footer {display: none !important}
.gradio-container {max-width: 1100px !important; margin: auto !important}
#pictures .grid-container {grid-template-columns: repeat(2, 1fr) !important}
#earlier .grid-container {grid-template-columns: repeat(6, 1fr) !important}
"""
_THEME_FONTS = ["system-ui", "sans-serif"]


def _text(settings: dict[str, Any] | None) -> str:
    """Settings as short Markdown."""
    if not settings:
        return "Nothing drawn yet."
    shown = ", ".join(f"{name} {settings[name]}" for name in ("seed", "steps", "mode", "guidance"))
    return f"**{html.escape(settings['prompt'])}**: {shown}"


def _seed(text: str) -> int | None:
    """A typed seed; empty means random."""
    if not text.strip():
        return None
    if not text.strip().isdecimal():
        raise UserError(f"seed is {text!r}; type a whole number, or leave it empty for a random one")
    return int(text)


def build(studio: Studio) -> gr.Blocks:
    """The page for a studio."""

    def draw(
        prompt: str, seed: str, count: float, steps: float, mode: str, guidance: float, session: Session
    ) -> Iterator[tuple[Any, ...]]:
        """Draws pictures from a prompt. Seed empty = random; mode flow or codes."""
        try:
            order = Order(
                prompt=prompt,
                seed=_seed(seed),
                count=int(count),
                steps=int(steps),
                mode=mode,
                guidance=float(guidance),
            )
            yield [], f"Drawing 1 of {order.count} ...", [path for path, _ in session.history], session
            for now in studio.draw(order, session):
                told = f"{now.done} of {order.count} done"
                if now.settings:
                    told += f"  \n{_text(now.settings)}"
                told += "".join(f"  \n*{note}*" for note in now.notes)
                yield list(now.files), told, [path for path, _ in session.history], session
        except UserError as error:
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error  # shown as HTML

    def stop(session: Session) -> Session:
        session.cancelled.set()
        return session

    def chosen(event: gr.SelectData, session: Session) -> str:
        return _text(session.history[event.index][1]) if session.history else _text(None)

    with gr.Blocks(title="mm", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        session = gr.State(Session(), time_to_live=86400)
        gr.Markdown("# mm\nType what to draw. Known are 40 objects, 8 colours, 6 backgrounds and 8 styles.")
        with gr.Tab("Draw"), gr.Row():
            with gr.Column(scale=2, min_width=280):
                prompt = gr.Textbox(label="Prompt", value=EXAMPLES[0], lines=2, max_length=600)
                with gr.Row():
                    seed = gr.Textbox(label="Seed", placeholder="random", max_lines=1, max_length=12, min_width=120)
                    count = gr.Slider(1, MAX_COUNT, value=4, step=1, label="Count", min_width=120)
                with gr.Accordion("More", open=False):
                    steps = gr.Slider(1, MAX_STEPS, value=12, step=1, label="Steps")
                    mode = gr.Radio(["flow", "codes"], value="flow", label="Mode")
                    guidance = gr.Slider(1, 10, value=4, step=0.5, label="Guidance (1 = off)")
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", min_width=100)
                    cancel = gr.Button("Cancel", min_width=100)
                gr.Examples(EXAMPLES, prompt, api_visibility="private")
            with gr.Column(scale=3, min_width=280):
                gallery = gr.Gallery(label="Pictures", elem_id="pictures", columns=2, format="png", height=520)
                status = gr.Markdown(_text(None))
                history = gr.Gallery(
                    label="Earlier in this session", elem_id="earlier", columns=6, format="png", height=170
                )
        inputs, outputs = [prompt, seed, count, steps, mode, guidance, session], [gallery, status, history, session]
        options: dict[str, Any] = {"concurrency_id": "pipeline", "concurrency_limit": 1}
        go.click(draw, inputs, outputs, api_name="draw", **options)
        prompt.submit(draw, inputs, outputs, api_visibility="private", **options)
        cancel.click(stop, session, session, queue=False, api_visibility="private")
        history.select(chosen, session, status, queue=False, api_visibility="private")
    return page.queue(max_size=32)


def launch(studio: Studio, *, host: str = "127.0.0.1", port: int = 7860, block: bool = True) -> gr.Blocks:
    """Serves the page; returns it when `block` is False."""
    theme = gr.themes.Soft(font=_THEME_FONTS, font_mono=["monospace"])
    page = build(studio)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        theme=theme,
        css=CSS,
        allowed_paths=[str(studio.folder)],
        max_file_size="5mb",
        prevent_thread_lock=not block,
        show_error=True,
    )
    return page
