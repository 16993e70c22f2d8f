"""Keys of LoRA files: the module that a key names, and which part of an adapter its tensor is.

Design choices
- One table of endings serves every layout (peft, diffusers, old attention processors, kohya, LyCORIS, XLabs, ComfyUI):
  the ending says the part, what stands before it is the module's name in that program.
- A key with no known ending raises, with what it stands for where that is known. Nothing is left out.
- The same part of one module twice, or parts of several adapters in one file, raise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from mm.core.errors import UserError

LONGEST_KEY = 512
_ADAPTER = r"(?:\.(?P<adapter>[^.]+))?"
_ENDINGS = {  # part: its endings; the first that matches counts
    "down": rf"\.lora_A{_ADAPTER}\.weight|\.lora_linear_layer\.down\.weight|[._]lora[._]down\.weight|\.down\.weight",
    "up": rf"\.lora_B{_ADAPTER}\.weight|\.lora_linear_layer\.up\.weight|[._]lora[._]up\.weight|\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "up_bias": rf"\.lora_B{_ADAPTER}\.bias|[._]lora[._]up\.bias",
    "alpha": r"(?:[._]lora)?\.alpha",
    "magnitude": r"\.lora_magnitude_vector(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?",
    "dora_scale": r"\.dora_scale(?:\.weight)?",
    "oft_R": rf"\.oft_R{_ADAPTER}\.weight",
    "oft_blocks": r"\.oft_blocks",
    "rescale": r"\.rescale",
    "diff": r"\.diff|\.w_norm",
    "diff_b": r"\.diff_b|\.b_norm",
}
_ENDINGS |= {part: rf"\.{part}{_ADAPTER}" for part in
             ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a",
              "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")}  # fmt: skip
_PARTS = {part: re.compile(rf"(?P<module>.+?)(?:{ending})") for part, ending in _ENDINGS.items()}
_FOREIGN = {  # pattern in a key: what it stands for, which mm does not apply
    r"\.boft_|\.oft_": "an orthogonal adapter of another kind (BOFT, or OFT of peft before 0.16)",
    r"\.on_input$|\.ia3_": "an (IA)3 adapter",
    r"\.[ab][12]\.weight$": "a GLoRA adapter",
    r"lora_embedding_[AB]": "a LoRA on an embedding",
    r"lora_A\..*bias$|lora_down\.bias$": "a bias inside a LoRA's first half",
    r"modules_to_save|\.original_module": "a layer trained in full",
    r"^bundle_emb\.|^emb_params$|^string_to_": "a textual inversion",
    r"\.set_weight$|\.reshape_weight$": "a replaced weight of ComfyUI",
    r"vera_lambda|\.vera_": "a VeRA adapter",
    r"\.scalar$": "an unfolded scalar of LyCORIS",
    r"lora_controlnet|\.zero_conv|control_": "a control LoRA",
    r"\.(?:query|key)_norm\.scale$": "a norm in full, as the control LoRAs of FLUX.1 have",
}


@dataclass(kw_only=True, eq=False)
class Parts:
    """The tensors of one module's adapter by part, and the key that each came from."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def grouped(tensors: Mapping[str, Tensor]) -> dict[str, Parts]:
    """All tensors of a file by module and part.

    Args:
        tensors: by key, as the file has them.

    Returns:
        Parts by the module's name in the file, without peft's `base_model.model.` and without `.processor`.

    Raises:
        UserError: for a key that is in no layout, a part that is there twice, or several adapters in one file.
    """
    modules: dict[str, Parts] = {}
    adapters: set[str] = set()
    odd = [key for key in tensors if _split(key) is None]
    if odd:
        raise UserError(_why_odd(odd, len(tensors)))
    for key, tensor in tensors.items():
        module, part, adapter = _split(key) or ("", "", "")
        if adapter:
            adapters.add(adapter)
        parts = modules.setdefault(module, Parts())
        if part in parts.keys:
            raise UserError(
                f"the keys {parts.keys[part]!r} and {key!r} are the same part of one layer, under two names"
            )
        parts.tensors[part], parts.keys[part] = tensor, key
    if len(adapters) > 1:
        raise UserError(
            f"the file holds {len(adapters)} adapters ({', '.join(sorted(adapters))}); give the tensors of one of them"
        )
    return modules


def is_lora(key: str) -> bool:
    """Whether a key is one of an adapter's layers, in any layout."""
    return _split(key) is not None


def foreign(key: str) -> str:
    """What a key stands for that mm does not apply; empty for other keys."""
    return next((what for pattern, what in _FOREIGN.items() if re.search(pattern, key[:LONGEST_KEY])), "")


def _split(key: str) -> tuple[str, str, str] | None:
    """Module, part and adapter name of a key; None where no ending matches."""
    if len(key) > LONGEST_KEY:
        return None
    for part, pattern in _PARTS.items():
        match = pattern.fullmatch(key)
        if match:
            module = match["module"].removeprefix("base_model.model.").replace(".processor.", ".")
            return module, part, match.groupdict().get("adapter") or ""
    return None


def _why_odd(odd: list[str], total: int) -> str:
    first = odd[0] if len(odd[0]) <= LONGEST_KEY else odd[0][:60] + "..."
    what = foreign(first)
    said = f"is {what}, which mm does not apply" if what else "is in no LoRA layout that mm reads"
    more = f"; {len(odd)} of the file's {total} keys are like it or unknown" if len(odd) > 1 else ""
    return f"the key {first!r} {said} (peft, diffusers, kohya, LyCORIS, ComfyUI, XLabs){more}"
