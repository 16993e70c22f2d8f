"""The web app: tabs by what the model can do, in Gradio.

Design choices
- Loopback by default, no outside fonts, no analytics, a bounded number of orders. No path is open to requests: pages
  get Gradio's copies of what an event returned, and so the app's folder must lie in the system's temporary folder or
  the working directory.
- Calls that skip Gradio's queue (`/gradio_api/run/...`) are refused for everything that the model works for.
- Errors of the code are not sent to the browser; they are on the server's terminal.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from mm.core.errors import UserError
from mm.core.threads import release_team
from mm.engine.engine import Engine
from mm.families import family_of
from mm.ui import shown, style
from mm.ui.api import add_calls
from mm.ui.blocks import Page
from mm.ui.describe_tab import DescribeTab
from mm.ui.draw_tab import DrawTab
from mm.ui.guard import Guard
from mm.ui.limits import MAX_ORDERS, MAX_UPLOAD_BYTES, MAX_VISITS, THREADS, VISIT_SECONDS
from mm.ui.orders import Orders
from mm.ui.parts import AT_ONCE, Parts
from mm.ui.picture_tab import WAYS, PictureTab
from mm.ui.ports import taken
from mm.ui.public import for_page
from mm.ui.talk_tab import TalkTab

EXAMPLES = (
    "two red cats on grass, watercolor style",
    "three blue stars at night",
    "a dog left of a tree in the snow",
    "a pink rocket above a castle, pixel art style",
)
PUBLIC_EXAMPLES = (
    "a lighthouse on a cliff at dusk, watercolor",
    "a red fox in fresh snow, morning light, photograph",
    "an old bookshop in a narrow street, oil painting",
    "a bowl of lemons on a blue table, still life",
)
_THEME_FONTS = ["system-ui", "sans-serif"]


def build(parts: Parts, adapters: Sequence[tuple[str, float]] = ()) -> gr.Blocks:
    """The page of a model.

    Args:
        parts: with the engine.
        adapters: names and strengths of what is applied to the model, to be shown.
    """
    engine = parts.engine
    tasks = set(engine.capabilities.tasks)
    if not tasks:
        raise UserError(f"{engine.name} can do nothing that the page offers; it is no model of pictures")
    with Page(title="mm", analytics_enabled=False, delete_cache=(900, int(VISIT_SECONDS))) as page:
        gr.HTML(shown.heading(engine.name, adapters, engine.notes))
        visit = gr.Textbox("", visible="hidden", elem_id="visit")
        tabs: dict[str, Any] = {}
        with gr.Tabs():
            if "draw" in tasks:
                with gr.Tab("Draw"):
                    tabs["draw"] = DrawTab(parts, visit, list(_examples(engine)), _words(engine))
            if tasks & set(WAYS):
                with gr.Tab("Edit" if "edit" in tasks else "From a picture"):
                    tabs["picture"] = PictureTab(parts, visit)
            if "describe" in tasks:
                with gr.Tab("Describe"):
                    tabs["describe"] = DescribeTab(parts, visit)
            if "converse" in tasks:
                with gr.Tab("Talk"):
                    tabs["talk"] = TalkTab(parts, visit)
        _restore(page, parts, visit, tabs)
        add_calls(parts)
    return page.queue(api_open=False, max_size=MAX_ORDERS)


def _is_ours(engine: Engine) -> bool:
    family = family_of(engine.pipeline)
    return family is not None and family.name == "mm-tiny"


def _examples(engine: Engine) -> Sequence[str]:
    return EXAMPLES if _is_ours(engine) else PUBLIC_EXAMPLES


def _words(engine: Engine) -> list[tuple[Any, str]]:
    """The words of our own model with little pictures."""
    if not _is_ours(engine):
        return []
    from mm.world.word_sheet import word_pictures

    return word_pictures()


def _restore(page: gr.Blocks, parts: Parts, visit: gr.Textbox, tabs: dict[str, Any]) -> None:
    """Has a page that is loaded take up its visit, and its fields from the browser's storage."""
    stored = gr.Textbox("", visible="hidden")
    draw, talk = tabs.get("draw"), tabs.get("talk")
    outputs: list[Any] = [visit]
    if draw is not None:
        outputs += [draw.history, draw.panel.gallery, *draw.fields.values()]
    if talk is not None:
        outputs.append(talk.chat)

    def load(name: str, fields: str) -> list[Any]:
        found = parts.visits.open(name)
        out: list[Any] = [found.name]
        if draw is not None:
            out += [draw.pictures(found.name), [kept.path for kept in found.latest], *draw.restored(fields)]
        if talk is not None:
            out.append(talk.restored(found.messages))
        return out

    loaded = page.load(load, [visit, stored], outputs, js=style.LOAD, **AT_ONCE)
    loaded.then(None, visit, None, js=style.SAVE_VISIT, api_visibility="private")


def launch(
    engine: Engine,
    folder: Path | None = None,
    *,
    adapters: Sequence[tuple[str, float]] = (),
    host: str = "127.0.0.1",
    port: int = 7860,
    block: bool = True,
) -> gr.Blocks:
    """Serves a model's page.

    Args:
        engine: of `mm.load`.
        folder: for the pictures; None makes one in the system's temporary folder.
        adapters: names and strengths of what is applied to the model, to be shown.
        host: address to listen at.
        port: port to listen at.
        block: whether to serve until the process ends.

    Returns:
        The page, when `block` is False.

    Raises:
        UserError: where the port is taken.
    """
    parts = Parts(orders=Orders(for_page(engine), folder or Path(tempfile.mkdtemp(prefix="mm-ui-"))))
    page = build(parts, adapters)
    guard = Middleware(Guard, readers=parts.readers)
    release_team()  # this thread drew pictures of words; from now on other threads compute
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            theme=gr.themes.Soft(font=_THEME_FONTS, font_mono=["monospace"]),
            css=style.CSS,
            allowed_paths=[],  # the page gets copies from Gradio's cache; nobody can ask for a file of the folder
            max_file_size=MAX_UPLOAD_BYTES,
            max_threads=THREADS,
            state_session_capacity=4 * MAX_VISITS,
            app_kwargs={"middleware": [guard]},
            prevent_thread_lock=not block,
            show_error=False,
            ssr_mode=False,
            run_history=False,
            mcp_server=False,
            enable_monitoring=False,
        )
    except OSError as error:
        if "empty port" not in str(error):
            raise
        raise UserError(taken(host, port)) from error
    return page
