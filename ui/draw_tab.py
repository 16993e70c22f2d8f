"""The tab that draws from a prompt."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr
from PIL import Image

from mm.adapters.stack import stack_of
from mm.core.errors import UserError
from mm.core.safe_json import parse_json
from mm.customization.apart import REFINE
from mm.engine.capabilities import Capabilities
from mm.engine.output import FORMATS
from mm.engine.requests import MAX_GUIDANCE, MAX_STEPS, Draw
from mm.engine.settings import Again, drawn_again
from mm.ui import forms, shown, style
from mm.ui.limits import MAX_COUNT, MAX_PROMPT, MAX_TRIES
from mm.ui.panel import GALLERY, Panel, choose
from mm.ui.parts import AT_ONCE, QUEUED, Parts
from mm.ui.public import last_part
from mm.ui.uploads import settings_of_upload

Fields = dict[str, Any]  # name of a request's field -> its component


def number_field(value: float | None, *, label: str, **limits: Any) -> gr.Number | gr.Textbox:
    """A field for a number; without a value it is a text field, since Gradio makes 0 of an empty number field."""
    if value is None:
        return gr.Textbox(label=label, placeholder="the model's own", max_lines=1, max_length=12, min_width=100)
    return gr.Number(value, label=label, min_width=100, **limits)


def sampling_fields(can: Capabilities, *, sized: bool, words: Sequence[str] = ()) -> Fields:
    """Fields of what a drawing can set, as this model allows; built where it is called.

    Args:
        can: of the model.
        sized: whether pictures are drawn from a prompt alone.
        words: of the adapters' subjects.
    """
    fields: Fields = {}
    with gr.Row():
        fields["steps"] = number_field(
            can.steps.get(can.modes[0] if can.modes else ""), minimum=1, maximum=MAX_STEPS, precision=0, label="Steps"
        )
        if can.guidance_name is not None:
            fields["guidance"] = number_field(
                can.guidance, minimum=0, maximum=MAX_GUIDANCE, step=0.5, label="Guidance (1 = off)"
            )
    if sized and not can.fixed_size:
        with gr.Row():
            for name, side in zip(("width", "height"), can.size, strict=True):
                fields[name] = gr.Number(
                    side, minimum=8, precision=0, step=can.multiple, label=name.capitalize(), min_width=100
                )
    if can.sizes:
        shown_sizes = [(f"{width} x {height}", width) for width, height in can.sizes]
        fields["width"] = gr.Radio(shown_sizes, value=can.size[0], label="Size")
    if can.modes:
        fields["mode"] = gr.Radio(list(can.modes), value=can.modes[0], label="Mode")
    served = sized or set(can.fast_tasks) >= {"edit", "image_to_image", "inpaint"} & set(can.tasks)
    if can.fast and served and not can.negative_needs:
        fields["fast"] = gr.Checkbox(False, label="Fast: leave out work that changes a picture little")
    if can.best_of:
        fields["best_of"] = gr.Number(
            1, minimum=1, maximum=MAX_TRIES, precision=0,
            label="Tries: draw again, so often at most, what the model does not see in its picture",
        )  # fmt: skip
    if sized and words:
        fields["apart"] = gr.Checkbox(False, label=f"Apart: {', '.join(words)} each in a place of its own")
        fields["stand_ins"] = gr.Textbox(
            label="Stand-ins: known things that are drawn in these places first, for Apart",
            placeholder=", ".join(f"{word}=cup" for word in words[:1]), max_length=MAX_PROMPT, lines=1,
        )  # fmt: skip
    if can.strict:
        fields["strict"] = gr.Checkbox(False, label="Strict: refuse words that the model does not know")
    if can.negative and not can.negative_needs:
        fields["negative"] = gr.Textbox(
            label="Negative prompt", placeholder=can.negative_default or None, max_length=MAX_PROMPT, lines=1
        )
    if len(can.schedulers) > 1:
        names = [("the model's own", ""), *((name, name) for name in can.schedulers)]
        fields["scheduler"] = gr.Dropdown(names, value="", label="Scheduler")
    return fields


def usual_steps(can: Capabilities, mode: str | None, fast: object) -> int | None:
    """The steps of a drawing by a model's own default, or those of the mix of less work."""
    return can.steps_of(Draw(prompt="any", mode=mode or None, fast=bool(fast)))


def follow_mode(fields: Fields, can: Capabilities) -> None:
    """Sets the steps to those of a mode, or of the mix of less work, when these are chosen."""
    fewer = any(usual_steps(can, mode, fast=True) != usual_steps(can, mode, fast=False) for mode in can.modes)
    names = [name for name in ("mode", *(["fast"] if fewer else [])) if name in fields]

    def steps(*values: Any) -> int | None:
        given = dict(zip(names, values, strict=True))
        return usual_steps(can, given.get("mode"), given.get("fast"))

    watched = [fields[name] for name in names]
    for field in watched:
        field.input(steps, watched, fields["steps"], **AT_ONCE)


class DrawTab:
    """Built where it is called, inside a tab.

    Args:
        parts: of the page.
        visit: the component with the visit's name.
        examples: prompts to click.
        words: that the model knows, each with a little picture; a click adds one to the prompt.
    """

    def __init__(
        self,
        parts: Parts,
        visit: gr.Textbox,
        examples: list[str],
        words: Sequence[tuple[Image.Image, str]] = (),
    ) -> None:
        self.parts, self.can = parts, parts.engine.capabilities
        self.fields: Fields = {}
        with gr.Row(elem_id="draw-tab"):
            with gr.Column(elem_id="draw-ask"):
                self._ask(examples)
            with gr.Column(elem_id="draw-result"):
                self.panel = Panel(parts, visit, self.go, self.cancel, "draw")
                self.again = gr.Button("Use these settings", size="sm")
                gr.HTML('<p class="mm-title">Drawn in this visit</p>', padding=False)
                self.history = gr.Gallery(label="Drawn in this visit", elem_id="earlier", height="auto", **GALLERY)
            with gr.Column(elem_id="draw-more"):
                self._more(examples)
                if words:
                    self._words(words)
        self._connect(visit)

    def _ask(self, examples: list[str]) -> None:
        self.fields["prompt"] = gr.Textbox(
            label="Prompt", value=examples[0], lines=2, max_lines=6, max_length=MAX_PROMPT, elem_id="prompt",
            submit_btn=False,
        )  # fmt: skip
        with gr.Row(elem_classes="mm-buttons"):
            self.go = gr.Button("Draw", variant="primary", min_width=80, elem_id="go")
            self.cancel = gr.Button("Cancel", min_width=80, interactive=False, elem_id="cancel")

    def _more(self, examples: list[str]) -> None:
        with gr.Row():
            self.fields["seed"] = gr.Textbox(
                label="Seed", placeholder="random", max_lines=1, max_length=12, min_width=100, elem_id="seed"
            )
            small = max(self.can.size) <= 256
            self.fields["count"] = gr.Slider(
                1, MAX_COUNT, value=4 if small else 1, step=1, label="Count", min_width=120
            )
        self.dice = gr.Button("New random seed", size="sm")
        with gr.Accordion("More", open=False):
            words = [item.word for item in stack_of(self.parts.engine.pipeline).list() if item.word and self.can.apart]
            self.fields |= sampling_fields(self.can, sized=True, words=words)
            gr.HTML('<p class="mm-title">Draw again: drop a picture here, and its settings are filled in.</p>')
            self.like = gr.File(show_label=False, file_types=list(FORMATS), height=130, elem_id="like")
        gr.Examples(examples, self.fields["prompt"], api_visibility="private")

    def _words(self, words: Sequence[tuple[Image.Image, str]]) -> None:
        with gr.Accordion("Words that the model knows", open=False, elem_id="words"):
            gallery = gr.Gallery(
                list(words), columns=8, height=260, allow_preview=False, object_fit="contain", elem_id="word-pictures",
                show_label=False, interactive=False, format="png", buttons=[],
            )  # fmt: skip

        def add(prompt: str, event: gr.SelectData) -> str:
            return f"{prompt.rstrip()} {words[int(event.index)][1]}".lstrip()

        gallery.select(add, self.fields["prompt"], self.fields["prompt"], **AT_ONCE)

    def _connect(self, visit: gr.Textbox) -> None:
        shown_fields = list(self.fields.values())
        for start in (self.go.click, self.fields["prompt"].submit):
            drawn = start(self._draw, [visit, *shown_fields], self.panel.outputs, **QUEUED)
            drawn.then(self.pictures, visit, self.history, **AT_ONCE)
        follow_mode(self.fields, self.can)
        self.dice.click(lambda: str(secrets.randbelow(2**31)), None, self.fields["seed"], **AT_ONCE)
        self.history.select(self._choose, visit, self.panel.details, **AT_ONCE)
        self.again.click(self._reuse, visit, [*shown_fields, self.panel.status], **AT_ONCE)
        self.like.upload(self._like, self.like, [*shown_fields, self.panel.status, self.like], **AT_ONCE)
        keep = [field.change for field in shown_fields]
        gr.on(keep, None, shown_fields, None, js=style.save_fields(self.can.model), api_visibility="private")

    def _draw(self, name: str, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        given = dict(zip(self.fields, values, strict=True))
        yield from self.panel.follow(lambda: forms.draw_request(given, self.can), name, request)

    def pictures(self, name: str) -> list[str]:
        """The files of all pictures of a visit, newest first."""
        return [kept.path for kept in self.parts.visits.open(name).history]

    def _choose(self, name: str, event: gr.SelectData) -> str:
        visit = self.parts.visits.open(name)
        return choose(visit, visit.history, event)

    def _reuse(self, name: str) -> list[Any]:
        chosen = self.parts.visits.open(name).chosen
        if chosen is None:
            return [*self.unchanged(), shown.status("there is no picture whose settings could be used")]
        return self._filled(chosen)

    def _like(self, file: object) -> list[Any]:
        try:
            settings = settings_of_upload(file)
        except UserError as error:
            return [*self.unchanged(), shown.error(str(error)), None]
        if settings is None:
            return [gr.skip()] * (len(self.fields) + 2)
        return [*self._filled(settings), None]

    def _filled(self, settings: dict[str, Any]) -> list[Any]:
        """Values of the fields by the settings of a picture, and a line that says what they are."""
        if settings.get("strength") is not None:
            return [*self.unchanged(), shown.error("the picture was drawn from another one; give that one, too")]
        try:
            again = drawn_again(settings, self.can)
        except UserError as error:
            return [*self.unchanged(), shown.error(str(error))]
        notes, model = list(again.notes), settings.get("model")
        if isinstance(model, str) and last_part(model) != self.can.model:
            notes.append(f"it was drawn with {last_part(model)}")
        request = again.request if again.keep is None else _alone(again)
        notes += without_field(request, self.can, self.fields)
        return [*self._values(request), shown.status("the settings are filled in; press Draw", notes)]

    def _values(self, asked: Draw) -> list[Any]:
        size = asked.size or self.can.size
        values = {
            "prompt": asked.prompt, "negative": asked.negative or "", "width": size[0], "height": size[1],
            "seed": "" if asked.seed is None else str(asked.seed), "steps": self.can.steps_of(asked),
            "guidance": self.can.guidance_of(asked), "mode": self.can.mode(asked), "scheduler": asked.scheduler or "",
            "fast": asked.fast is not False, "best_of": asked.best_of, "strict": bool(asked.strict),
            "apart": asked.apart is not False, "stand_ins": _written(asked),
        }  # fmt: skip
        return [values.get(name, gr.skip()) for name in self.fields]

    def unchanged(self) -> list[Any]:
        """No update of any field."""
        return [gr.skip()] * len(self.fields)

    def restored(self, stored: str) -> list[Any]:
        """Values of the fields as a browser kept them; no updates where they are for another model, or damaged."""
        try:
            values = parse_json(stored, "the fields") if stored else []
        except UserError:
            return self.unchanged()
        if not isinstance(values, list) or len(values) != len(self.fields) + 1 or values[0] != self.can.model:
            return self.unchanged()
        return [_same_kind(field, value) for field, value in zip(self.fields.values(), values[1:], strict=True)]


def without_field(asked: Draw, can: Capabilities, fields: Collection[str]) -> list[str]:
    """A line for each thing in a request that the page has no field for, so that it draws another picture.

    Args:
        asked: by the settings of a picture.
        can: of the model.
        fields: names of those that the page has.
    """
    notes = []
    if asked.apart is not False and "apart" not in fields:
        notes.append("it was drawn apart; start the page with its adapters (--lora) for that")
    elif isinstance(asked.apart, Mapping) and any("," in thing for thing in asked.apart.values()):
        notes.append(f"it was drawn with the stand-ins {_written(asked)}; the page's field cannot hold commas in them")
    if "apart" in fields and asked.refine is not None and asked.refine != REFINE:
        notes.append(f"it was drawn with refine {asked.refine:g}, and the page draws with {REFINE:g}")
    if isinstance(asked.fast, Mapping) and can.fast_of(asked) != can.fast_of(replace(asked, fast=True)):
        notes.append("it was drawn with other settings of fast than those of the page")
    if asked.options:
        notes.append(f"it was drawn with options that the page does not take: {', '.join(asked.options)}")
    return notes


def _written(asked: Draw) -> str:
    """The stand-ins of a request as the field holds them."""
    things = asked.apart if isinstance(asked.apart, Mapping) else {}
    return ", ".join(f"{word}={thing}" for word, thing in things.items())


def _alone(again: Again) -> Draw:
    """One picture of a call: the page draws each picture in a call of its own."""
    seed = (again.request.seed or 0) + (again.keep or 0)
    return replace(again.request, seed=seed, count=1, batch_size=1)


def _same_kind(field: Any, value: Any) -> Any:
    """A kept value where the field can take it."""
    if isinstance(field, gr.Textbox):
        return value if isinstance(value, str) and len(value) <= MAX_PROMPT else gr.skip()
    if isinstance(field, gr.Slider | gr.Number):
        low, high = field.minimum, field.maximum
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        fits = fits and (low is None or value >= low) and (high is None or value <= high)
        return value if fits else gr.skip()
    if isinstance(field, gr.Checkbox):
        return value if isinstance(value, bool) else gr.skip()
    if isinstance(field, gr.Radio | gr.Dropdown):
        return value if value in [key for _, key in field.choices] else gr.skip()
    return gr.skip()
