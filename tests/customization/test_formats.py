"""Every method's file in every layout: read again it gives the same picture, or it is refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from subject_pictures import subject_folder
from tiny_pipelines import SIDE, draw_with, tiny_pipeline_of

from mm.core.errors import UserError
from mm.core.safe_tensors import read_header
from mm.customization.customize import customize
from mm.customization.merging.files import read_adapter

LAYOUTS = ("diffusers", "kohya", "comfyui", "peft", "auto")
REFUSED = {
    ("loha", "diffusers"): "an entry of kind 'hadamard'",
    ("lokr", "diffusers"): "an entry of kind 'kron",
    ("oft", "diffusers"): "an entry of kind 'oft'",
}
AUTO = {"lora": "diffusers", "dora": "diffusers", "loha": "peft", "lokr": "peft", "oft": "peft"}


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
        found = read_header(file, "adapter").metadata
        module = "networks.lora" if method == "lora" else "lycoris.kohya"
        if layout not in ("auto", "mm", "peft") or method != "oft":  # peft's is no network of LyCORIS
            assert found["ss_network_module"] == module
        assert found.get("ss_network_dim", "2") == "2"
        read = read_adapter(file, pipe)
        read.apply(pipe)
        got = draw_with("stable-diffusion", pipe, prompt="sks thing")
        read.undo(pipe)
        assert float((got - wanted).abs().max()) < 3e-4, layout
        other = _by_others(method, layout, file)
        if other is not None:
            assert float((other - wanted).abs().max()) < 2e-3, layout


def _by_others(method: str, layout: str, file: Path) -> Any:
    """The picture with a file in plain diffusers or in peft, where they read it."""
    pipe = tiny_pipeline_of("stable-diffusion")
    if layout == "peft":
        folder = file.parent / "for peft"
        folder.mkdir()
        file.rename(folder / "adapter_model.safetensors")
        (file.parent / "adapter_config.json").rename(folder / "adapter_config.json")
        wrapped = PeftModel.from_pretrained(pipe.unet, str(folder))
        assert any("lora" in name or "hada" in name or "lokr" in name or "oft" in name
                   for name, _ in wrapped.named_parameters())  # fmt: skip
    elif layout == "diffusers" or (layout, method) == ("kohya", "lora"):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    else:
        return None
    return draw_with("stable-diffusion", pipe, prompt="sks thing")
