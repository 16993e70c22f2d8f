"""The tab that draws from a picture: edits by an instruction, draws a picture anew, fills in a painted part."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import gradio as gr

from mm.engine.engine import Engine
from mm.engine.requests import Draw, Edit
from mm.engine.views import call_parameters
from mm.families import family_of
from mm.families.family import resolve
from mm.ui import forms
from mm.ui.draw_tab import Fields, follow_mode, number_field, sampling_fields
from mm.ui.limits import KEPT_SIDE, MAX_COUNT, MAX_PROMPT
from mm.ui.panel import Panel
from mm.ui.parts import QUEUED, Parts
from mm.ui.uploads import read_painted, read_upload

WAYS = {"edit": "edit by an instruction", "image_to_image": "draw it anew", "inpaint": "fill in what is painted"}


class PictureTab:
    """Built where it is called, inside a tab.

    Args:
        parts: of the page.
        visit: the component with the visit's name.
    """

    def __init__(self, parts: Parts, visit: gr.Textbox) -> None:
        self.parts, self.can = parts, parts.engine.capabilities
        self.ways = [way for way in WAYS if way in self.can.tasks]
        self.edit_mask = edit_takes_mask(parts.engine)
        self.paints = "inpaint" in self.ways or self.edit_mask
        self.fields: Fields = {}
        with gr.Row(elem_id="picture-tab"):
            with gr.Column(elem_id="picture-ask"):
                self._ask()
            with gr.Column(elem_id="picture-result"):
                self.panel = Panel(parts, visit, self.go, self.cancel, "picture")
            with gr.Column(elem_id="picture-more"):
                self._more()
        inputs = [visit, self.way, self.picture, *self.fields.values()]
        for start in (self.go.click, self.fields["prompt"].submit):
            start(self._draw, inputs, self.panel.outputs, **QUEUED)
        follow_mode(self.fields, self.can)

    def _ask(self) -> None:
        if self.paints:
            gr.HTML(f'<p class="mm-title">{self._hint()}</p>', padding=False)
            self.picture: Any = gr.ImageEditor(
                show_label=False, sources=["upload", "clipboard"], type="filepath", height=380, layers=False,
                transforms=(),
                brush=gr.Brush(colors=["#ffffff"], color_mode="fixed"), elem_id="picture-given", buttons=[],
                canvas_size=(512, 512), format="png",
            )  # fmt: skip
        else:
            self.picture = gr.Image(
                label="Picture", type="filepath", sources=["upload", "clipboard"], height=300, elem_id="picture-given",
                buttons=[],
            )  # fmt: skip
        choices = [(WAYS[way], way) for way in self.ways]
        self.way = gr.Radio(choices, value=self.ways[0], label="What to do", visible=len(self.ways) > 1)
        edits = self.ways[0] == "edit"
        self.fields["prompt"] = gr.Textbox(
            label="Instruction" if self.ways == ["edit"] else "Instruction or prompt", lines=2, max_lines=6,
            max_length=MAX_PROMPT, placeholder="make the cat blue" if edits else "what the picture shows",
            elem_id="instruction",
        )  # fmt: skip
        with gr.Row(elem_classes="mm-buttons"):
            self.go = gr.Button("Draw", variant="primary", min_width=80, elem_id="picture-go")
            self.cancel = gr.Button("Cancel", min_width=80, interactive=False, elem_id="picture-cancel")

    def _hint(self) -> str:
        """What painting does."""
        if "edit" in self.ways and self.edit_mask:
            return "Give a picture. Paint over the part that may change; without paint all of it may."
        return "Give a picture. Paint over the part that is to be filled in."

    def _more(self) -> None:
        with gr.Row():
            self.fields["seed"] = gr.Textbox(
                label="Seed", placeholder="random", max_lines=1, max_length=12, min_width=100
            )
            self.fields["count"] = gr.Slider(1, MAX_COUNT, value=1, step=1, label="Count", min_width=120)
        with gr.Accordion("More", open=False):
            if self.can.image_guidance and "edit" in self.ways:
                self.fields["image_guidance"] = number_field(None, label="Picture guidance (editing)")
            if {"image_to_image", "inpaint"} & set(self.ways):
                self.fields["strength"] = number_field(None, label="Strength, 0 to 1 (1 = all anew)")
            self.fields |= sampling_fields(self.can, sized=False)

    def _draw(self, name: str, request: gr.Request, way: str, given: Any, *values: Any) -> Iterator[list[Any]]:
        fields = dict(zip(self.fields, values, strict=True))
        yield from self.panel.follow(self._request(way, given, fields), name, request)

    def _request(self, way: str, given: Any, fields: dict[str, Any]) -> Callable[[], Draw | Edit]:
        """Reads picture and fields; those of another way are left out."""
        if way == "edit":
            fields["strength"] = None
        else:
            fields["image_guidance"] = None

        def make() -> Draw | Edit:
            if self.paints:
                picture, mask = read_painted(given, KEPT_SIDE)
            else:
                picture, mask = read_upload(given, KEPT_SIDE), None
            if way == "edit" and not self.edit_mask:
                mask = None
            return forms.picture_request(way, fields, self.can, picture, mask)

        return make


def edit_takes_mask(engine: Engine) -> bool:
    """Whether the model's editing can be kept to a part of the picture."""
    family = family_of(engine.pipeline)
    name = "" if family is None else family.pipelines.get("edit", "")
    if not name:
        return "edit" in engine.capabilities.tasks and "mask_image" in call_parameters(engine.pipeline)
    kind = resolve(name) if ":" in name else getattr(diffusers, name)
    return "mask_image" in inspect.signature(kind.__call__).parameters
