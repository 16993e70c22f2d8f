"""Pieces of HTML on the page. Every text of a user, a file or a model is escaped here, and nowhere else.

Nothing is shown as Markdown, which could hold pictures that the visitor's browser would fetch.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mm.ui.orders import Progress

_SHOWN = (
    "seed", "steps", "guidance", "image_guidance", "strength", "mode", "scheduler", "width", "height",
    "best_of", "strict", "apart", "refine", "negative_prompt", "bits", "model",
)  # fmt: skip
_MOST_NOTICES = 5


def escaped(text: object) -> str:
    """A text where the page reads HTML."""
    return html.escape(str(text))


def status(line: str, notices: Sequence[str] = (), *, done: float | None = None) -> str:
    """A line, a bar where `done` is a share from 0 to 1, and warnings below."""
    bar = "" if done is None else f'<progress max="1" value="{done:.4f}"></progress>'
    first = list(notices[:_MOST_NOTICES])
    first += [f"and {len(notices) - _MOST_NOTICES} more"] if len(notices) > _MOST_NOTICES else []
    items = "".join(f"<li>{escaped(notice)}</li>" for notice in first)
    below = f"<ul>{items}</ul>" if items else ""
    return f'<div class="mm-status" role="status"><p>{escaped(line)}</p>{bar}{below}</div>'


def error(text: str) -> str:
    """An error in place of the status."""
    return f'<div class="mm-status mm-error" role="alert"><p>{escaped(text)}</p></div>'


def progress(now: Progress, *, left: float | None = None) -> str:
    """The status of an order.

    Args:
        now: how far it is.
        left: seconds until it is done, where an estimate is known.
    """
    done, of = len(now.kept), f"of {now.count}"
    if now.state == "done":
        return status(f"{done} {of} done", now.notices)
    if now.state == "cancelled":
        return status(f"stopped; {done} {of} done", now.notices)
    if now.state == "stopping":
        return status("stopping", now.notices)
    if now.state == "waiting":
        return status("waiting for the model", now.notices, done=0)
    share = (done + (now.step / now.steps if now.steps else 0)) / now.count
    line = f"picture {min(done + 1, now.count)} {of}"
    line += f", step {now.step} of {now.steps}" if now.steps and now.step else ""
    if left is not None and left >= 1:
        line += f", about {_time(left)} left"
    return status(line, now.notices, done=share)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def preview(picture: Image.Image | None) -> str:
    """A rough picture of the current latents; nothing without one."""
    if picture is None:
        return ""
    out = io.BytesIO()
    picture.convert("RGB").save(out, "JPEG", quality=85)
    data = base64.b64encode(out.getvalue()).decode("ascii")
    return f'<img class="mm-preview" alt="preview of the current picture" src="data:image/jpeg;base64,{data}">'


def details(settings: Mapping[str, Any] | None) -> str:
    """The settings of a picture."""
    if not settings:
        return '<p class="mm-details">Choose a picture to see its settings.</p>'
    rows = [(name, settings[name]) for name in _SHOWN if settings.get(name) not in (None, "")]
    items = "".join(f"<span>{escaped(name.replace('_', ' '))} {escaped(value)}</span>" for name, value in rows)
    items += "".join(f"<span>LoRA {escaped(_adapter(one))}</span>" for one in _list(settings.get("adapters")))
    return f'<div class="mm-details"><p>{escaped(settings.get("prompt", ""))}</p><p>{items}</p></div>'


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _adapter(one: object) -> str:
    """An adapter as name and strength."""
    if isinstance(one, Mapping):
        return " ".join(str(one[key]) for key in ("name", "file", "scale") if key in one)
    return " ".join(map(str, one)) if isinstance(one, list | tuple) else str(one)


def heading(model: str, adapters: Sequence[tuple[str, float]], notes: Sequence[str]) -> str:
    """The head of the page: the model, its adapters with their strengths, and what was chosen when it was loaded."""
    strengths = "".join(f"<span>{escaped(name)} × {scale:g}</span>" for name, scale in adapters)
    items = "".join(f"<li>{escaped(note)}</li>" for note in notes)
    about = f"<details><summary>about this model</summary><ul>{items}</ul></details>" if items else ""
    return f'<header class="mm-head"><h1>mm</h1><span>{escaped(model)}</span>{strengths}{about}</header>'
