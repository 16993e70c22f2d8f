"""Every method's file in every layout: read again it gives the same picture, or it is refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from subject_pictures import subject_folder
from tiny_pipelines import SIDE, draw_with, tiny_pipeline_of

from mm.core.errors import UserError
from mm.customization.customize import customize
from mm.customization.merging.files import read_adapter

LAYOUTS = ("diffusers", "kohya", "comfyui", "peft", "auto")
REFUSED = {
    **{(method, "diffusers"): "an entry of kind 'dense'" for method in ("dora", "loha", "lokr", "oft")},
}
AUTO = {"lora": "diffusers", "dora": "peft", "loha": "peft", "lokr": "peft", "oft": "peft"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", list(AUTO))
def test_a_file_of_each_layout(method: str, tmp_path: Path) -> None:
    pipe, folder = tiny_pipeline_of("stable-diffusion"), subject_folder(tmp_path / "data")
    short: dict[str, Any] = {
        "steps": 3, "batch_size": 1, "size": SIDE, "preview_every": 3, "preserved": (), "learning_rate": 4e-2,
    } | ({} if method == "oft" else {"rank": 2})  # fmt: skip
    learned = customize(pipe, folder, name="sks thing", method=method, **short)
    plain = draw_with("stable-diffusion", pipe, prompt="sks thing")
    learned.apply(pipe)
    wanted = draw_with("stable-diffusion", pipe, prompt="sks thing")
    learned.undo(pipe)
    assert learned.layout() == AUTO[method]
    assert float((wanted - plain).abs().max()) > 3e-3
    for layout in LAYOUTS:
        file = tmp_path / f"{layout}.safetensors"
        if (method, layout) in REFUSED:
            with pytest.raises(UserError, match=REFUSED[method, layout]):
                learned.write(file, layout, target=pipe)  # type: ignore[arg-type]
                read_adapter(file, pipe)
            continue
        learned.write(file, layout, target=pipe)  # type: ignore[arg-type]
        read = read_adapter(file, pipe)
        read.apply(pipe)
        got = draw_with("stable-diffusion", pipe, prompt="sks thing")
        read.undo(pipe)
        assert float((got - wanted).abs().max()) < 3e-4, layout
