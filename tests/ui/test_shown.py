"""What the page shows: texts of others are text, fields become requests, browsers' stored values are checked."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mm.core.errors import UserError
from mm.engine.capabilities import Capabilities
from mm.engine.requests import Draw, Edit
from mm.ui import forms, shown
from mm.ui.orders import Progress
from mm.ui.uploads import read_painted, read_upload

BAD = "<img src=x onerror=alert(1)>![a](http://a.example/b)"
CAN = Capabilities(
    model="m", tasks=("draw", "image_to_image", "inpaint", "edit"), size=(64, 64), multiple=16, modes=("flow",)
)


def test_every_text_is_escaped() -> None:
    pieces = [
        shown.status(BAD, [BAD]),
        shown.error(BAD),
        shown.progress(Progress(count=1, notices=(BAD,), state="running")),
        shown.details(
            {"prompt": BAD, "negative_prompt": BAD, "mode": BAD, "adapters": [BAD, {"name": BAD, "scale": 1}]}
        ),
        shown.heading(BAD, [(BAD, 0.5)], [BAD]),
    ]
    for piece in pieces:
        assert "<img" not in piece and "&lt;img" in piece


def test_the_status_of_an_order() -> None:
    assert "waiting" in shown.progress(Progress(count=2))
    running = Progress(count=4, step=3, steps=12, state="running", notices=tuple("abcdefg"))
    line = shown.progress(running, left=75)
    assert "picture 1 of 4, step 3 of 12, about 75 s left" in line and "and 2 more" in line and "<progress" in line
    assert "stopped; 0 of 4 done" in shown.progress(Progress(count=4, state="cancelled"))


def test_fields_become_requests() -> None:
    values = {
        "prompt": "a cat",
        "seed": " 7 ",
        "count": 2.0,
        "steps": 3,
        "guidance": 1,
        "negative": "",
        "scheduler": "",
    }
    assert forms.draw_request(values, CAN) == Draw(prompt="a cat", seed=7, count=2, steps=3, guidance=1.0)
    assert forms.draw_request({"prompt": "a cat", "width": 32}, CAN).size == (32, 64)
    picture, mask = Image.new("RGB", (200, 100)), Image.new("L", (200, 100), 255)
    edit = forms.picture_request("edit", {"prompt": "blue", "image_guidance": 2}, CAN, picture, None)
    assert isinstance(edit, Edit) and (edit.instruction, edit.image_guidance) == ("blue", 2)
    fill = forms.picture_request("inpaint", {"prompt": "a cat", "strength": 0.5}, CAN, picture, mask)
    assert isinstance(fill, Draw) and fill.image is not None and fill.mask is not None
    assert fill.image.size == fill.mask.size == (64, 32)  # the model's size, in its multiples
    for task, given, painted, message in (
        ("inpaint", picture, None, "nothing is painted"),
        ("edit", None, None, "no picture"),
        ("magic", picture, None, "cannot do"),
    ):
        with pytest.raises(UserError, match=message):
            forms.picture_request(task, {"prompt": "x"}, CAN, given, painted)
    with pytest.raises(UserError, match="at most 4194304 pixels"):
        forms.draw_request({"prompt": "x", "width": 8192, "height": 8192}, CAN)
    for value in (float("nan"), float("inf"), True, "nine", [1]):
        with pytest.raises(UserError):
            forms.draw_request({"prompt": "x", "steps": value}, CAN)


def test_a_painted_picture_gives_a_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.png")
    layer = Image.new("RGBA", (40, 20))
    layer.paste((255, 255, 255, 255), (10, 5, 20, 10))
    layer.save(tmp_path / "b.png")
    Image.new("RGBA", (40, 20)).save(tmp_path / "c.png")
    given = {"background": {"path": str(tmp_path / "a.png")}, "layers": [{"path": str(tmp_path / "b.png")}]}
    picture, mask = read_painted(given, 100)
    assert picture is not None and mask is not None
    assert mask.getbbox() == (10, 5, 20, 10) and mask.getpixel((12, 7)) == 255
    given["layers"] = [{"path": str(tmp_path / "c.png")}]
    assert read_painted(given, 100)[1] is None
    assert read_painted(None, 100) == (None, None)
    with pytest.raises(UserError, match="9 layers"):
        read_painted(given | {"layers": given["layers"] * 9}, 100)
    small = read_upload(str(tmp_path / "a.png"), 8)
    assert small is not None and small.size == (8, 4)
