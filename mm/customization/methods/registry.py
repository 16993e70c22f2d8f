"""The methods by name."""

from __future__ import annotations

import importlib

from mm.core.errors import UserError
from mm.customization.methods.protocol import Method

METHODS: dict[str, str] = {
    "dreambooth": "dreambooth:DreamBooth",
    "class-diffusion": "class_diffusion:ClassDiffusion",
    "custom-diffusion": "custom_diffusion:CustomDiffusion",
    "textual-inversion": "textual_inversion:TextualInversion",
    "detex": "detex:Detex",
    "orthogonal": "orthogonal:Orthogonal",
    "stydeco": "stydeco:StyDeco",
    "paca": "paca:PaCA",
    "s2ft": "s2ft:S2FT",
    "eva": "eva:Eva",
    "adalora": "adalora:AdaLora",
    "lora": "through_peft:lora",
    "dora": "through_peft:dora",
    "oft": "through_peft:oft",
    "lokr": "through_peft:lokr",
    "loha": "through_peft:loha",
    "shira": "through_peft:shira",
}
DEFAULT = "dreambooth"


def method_of(name: str) -> Method:
    """The method of a name; "auto" is `DEFAULT`. Raises UserError."""
    wanted = DEFAULT if name == "auto" else name
    if wanted not in METHODS:
        raise UserError(f"no method {name!r}; there are auto, {', '.join(METHODS)}")
    module, _, kind = METHODS[wanted].partition(":")
    made: Method = getattr(importlib.import_module(f"mm.customization.methods.{module}"), kind)()
    return made
