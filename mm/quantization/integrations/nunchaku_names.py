"""Which layers of a diffusers model the layers of a Nunchaku file are, by model family.

Design choices
- Paths in a file match a rule as a whole, in the first version's names or in the second's; a quantized path without a
  rule is refused, since what the publisher did to it (fused, split, shifted) cannot be guessed.
- Flux's single blocks: the file holds `proj_out` as two layers, one for its attention columns and one for its
  feed-forward columns.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

Columns = Literal["all", "first", "rest"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Paths that match `pattern` are the layers `targets` one below the other ({1} stands for the pattern's group).

    columns: which of the target's; "first" are as many as it has outputs. after_gelu: INT4 files round this layer's
    inputs without a sign, shifted. splits: adaLN rows interleave in so many parts, with 1 added to those of scales.
    """

    pattern: str
    targets: tuple[str, ...] = ("{1}",)
    columns: Columns = "all"
    after_gelu: bool = False
    splits: int = 1


def _below(child: str, targets: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(target.replace("{1}", f"{{1}}.{child}") for target in targets)


_QKV = ("{1}.to_q", "{1}.to_k", "{1}.to_v")
_ADDED = ("{1}.add_q_proj", "{1}.add_k_proj", "{1}.add_v_proj")
_DOUBLE = r"(transformer_blocks\.\d+)"
_SINGLE = r"(single_transformer_blocks\.\d+)"

_FLUX = (
    Rule(_DOUBLE + r"\.(?:qkv_proj|attn\.to_qkv)", _below("attn", _QKV)),
    Rule(_DOUBLE + r"\.(?:qkv_proj_context|attn\.add_qkv_proj)", _below("attn", _ADDED)),
    Rule(_DOUBLE + r"\.(?:out_proj|attn\.to_out\.0)", ("{1}.attn.to_out.0",)),
    Rule(_DOUBLE + r"\.(?:out_proj_context|attn\.to_add_out)", ("{1}.attn.to_add_out",)),
    Rule(_DOUBLE + r"\.(?:mlp_fc1|ff\.net\.0\.proj)", ("{1}.ff.net.0.proj",)),
    Rule(_DOUBLE + r"\.(?:mlp_fc2|ff\.net\.2)", ("{1}.ff.net.2",), after_gelu=True),
    Rule(_DOUBLE + r"\.(?:mlp_context_fc1|ff_context\.net\.0\.proj)", ("{1}.ff_context.net.0.proj",)),
    Rule(_DOUBLE + r"\.(?:mlp_context_fc2|ff_context\.net\.2)", ("{1}.ff_context.net.2",), after_gelu=True),
    Rule(r"(transformer_blocks\.\d+\.norm1(?:_context)?\.linear)", splits=6),
    Rule(_SINGLE + r"\.(?:qkv_proj|attn\.to_qkv)", _below("attn", _QKV)),
    Rule(_SINGLE + r"\.(?:out_proj|attn\.to_out)", ("{1}.proj_out",), "first"),
    Rule(_SINGLE + r"\.mlp_fc2", ("{1}.proj_out",), "rest", after_gelu=True),
    Rule(_SINGLE + r"\.mlp_fc1", ("{1}.proj_mlp",)),
    Rule(r"(single_transformer_blocks\.\d+\.norm\.linear)", splits=3),
)
_QWEN = (
    Rule(r"(.*\.attn)\.to_qkv", _QKV),
    Rule(r"(.*\.attn)\.add_qkv_proj", _ADDED),
    Rule(r"(.*\.attn\.(?:to_out\.0|to_add_out))"),
    Rule(r"(.*\.(?:img|txt)_mlp\.net\.0\.proj)"),
    Rule(r"(.*\.(?:img|txt)_mlp\.net\.2)", after_gelu=True),
    Rule(r"(.*\.(?:img|txt)_mod\.1)", splits=6),
)
# Z-Image's gate, silu(w1 x) * (w3 x), is stored as diffusers' SwiGLU has it: what is gated first, then the gate.
_Z_IMAGE = (
    Rule(r"(.*\.attention)\.to_qkv", _QKV),
    Rule(r"(.*\.attention\.to_out\.0)"),
    Rule(r"(.*\.feed_forward)\.net\.0\.proj", ("{1}.w3", "{1}.w1")),
    Rule(r"(.*\.feed_forward)\.net\.2", ("{1}.w2",)),
)
# SDXL's UNet: keys and values of the prompt stay at 16 bits; what follows GEGLU has no lower bound, hence no shift.
_SDXL = (
    Rule(r"(.*\.transformer_blocks\.\d+\.attn1)\.to_qkv", _QKV),
    Rule(r"(.*\.transformer_blocks\.\d+\.attn2\.to_q)"),
    Rule(r"(.*\.transformer_blocks\.\d+\.attn[12]\.to_out\.0)"),
    Rule(r"(.*\.transformer_blocks\.\d+\.ff\.net\.(?:0\.proj|2))"),
)
FAMILIES: dict[str, tuple[Rule, ...]] = {
    "FluxTransformer2DModel": _FLUX,
    "QwenImageTransformer2DModel": _QWEN,
    "ZImageTransformer2DModel": _Z_IMAGE,
    "UNet2DConditionModel": _SDXL,
}
# nunchaku_lite: diffusers' own layers, unfused, unsplit and without shifts
LITE = (Rule("(.*)"),)

_FIELDS = {
    "lora_down": "proj_down",
    "lora_up": "proj_up",
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
}
_NORMS = re.compile(r"(.*transformer_blocks\.\d+)\.(norm_(?:added_)?[qk]\.weight)")


def rules_for(model: nn.Module) -> tuple[Rule, ...] | None:
    """The table of a model's family; None where there is none."""
    return next((FAMILIES[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in FAMILIES), None)


def find(rules: tuple[Rule, ...], path: str) -> tuple[Rule, tuple[str, ...]] | None:
    """The rule of a quantized path and the targets' paths; None where no rule has it."""
    for rule in rules:
        match = re.fullmatch(rule.pattern, path)
        if match:
            return rule, tuple(target.replace("{1}", match[1]) for target in rule.targets)
    return None


def plain_names(rules: tuple[Rule, ...], key: str, own: Container[str]) -> tuple[str, ...]:
    """The model's tensors that a tensor of the file holds one below the other, where it is not quantized."""
    name = _NORMS.sub(r"\1.attn.\2", key)
    path, _, field = key.rpartition(".")
    match = None if name in own else find(rules, path)
    if match and match[0].columns == "all" and match[0].splits == 1:
        return tuple(f"{target}.{field}" for target in match[1])
    return (name,)


def quantized_fields(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Keys of quantized layers, by path and by the second version's field names; and all other keys."""
    keys = list(keys)
    paths = {key.removesuffix(".qweight") for key in keys if key.endswith(".qweight")}
    layers: dict[str, dict[str, str]] = {path: {} for path in sorted(paths)}
    rest = []
    for key in keys:
        path, _, name = key.rpartition(".")
        name = _FIELDS.get(name, name)
        if path in layers and name not in layers[path]:
            layers[path][name] = key
        else:
            rest.append(key)
    return layers, rest
