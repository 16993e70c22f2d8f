"""The understanding encoder as one of open_clip's own models: `open_clip.create_model("mm-tiny-vit", pretrained="mm")`.

Design choices
- Registered in open_clip's tables when open_clip is imported (`mm.core.import_hooks`): `import mm` is enough, and its
  own tools (model, transforms, tokenizer, zero-shot code) load our weights without a copy in another format.
- The weights are those of the embedded model; without them the architecture is registered alone.
"""

from __future__ import annotations

import json
from typing import Any

from mm.core.paths import weights_dir
from mm.models.understanding_encoder import NAME, open_clip_config


def register() -> None:
    """Adds architecture, weights and tokenizer under the name `mm-tiny-vit`, the weights under the tag `mm`."""
    from open_clip import factory, pretrained

    folder = weights_dir() / "mm-tiny"
    settings = folder / "understanding_encoder" / "config.json"
    if not settings.is_file():
        return
    config = open_clip_config(json.loads(settings.read_text(encoding="utf-8")))
    config["vision_cfg"]["output_tokens"] = False  # its tools expect the pooled vector alone
    # The tokenizer's folder is an absolute path, so a file in open_clip's search path could not hold it.
    config["text_cfg"]["hf_tokenizer_name"] = str(folder / "text_tokenizer")
    config["text_cfg"]["tokenizer_kwargs"] = {"clean": "lower"}
    factory._MODEL_CONFIGS[NAME] = config
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # pictures in [-1, 1]
    tags: dict[str, Any] = {"mm": half | {"file": str(settings.parent / "diffusion_pytorch_model.safetensors")}}
    pretrained._PRETRAINED[NAME] = tags
