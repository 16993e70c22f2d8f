"""Sites: what each linear layer of a model is for, by model family. Quantization, erasure and customization read this.

Design choices
- A family is a short table of patterns over module paths; a new one is one entry here and a row in the test. Unknown
  models get the generic table, with a warning that says so.
- Layers that read the same input form a group (q, k, v; two halves of a gate): one smoothing, one rounding of x.
- `precision` follows the field's practice: attention and feed-forward go low, modulation (adaLN) gets low weights with
  16-bit inputs, embeddings, projections at the ends and time stay as they are; PixArt and SANA also keep the keys and
  values of cross-attention (SVDQuant, arXiv 2411.05007).
- `bits` names weights that want more than 4 bits, whatever was asked: of our velocity decoder, whose errors nothing
  after it makes good, 8 bits for a ninth of the weights took a third of the error off the first steps' velocity, and 8
  bits for all of the text side nothing.
- `after` names an activation right before the layer whose outputs have a small lower bound, so that they can be shifted
  and rounded without a sign. Gated products have no such bound.

This module does not know how layers are changed.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from mm.layers.surgery import linears

Precision = Literal["low", "weight_only", "keep"]
Reads = Literal["text", "picture", "both", "time"]
After = Literal["gelu", "silu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One linear layer. `group`: who shares its input. `parent`: the module, holding the whole group, at whose output
    errors are scored; empty = at the layers' own outputs.
    """

    path: str
    role: str
    reads: Reads = "picture"
    precision: Precision = "low"
    group: str
    parent: str
    after: After | None = None
    bits: int | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """Paths that match `pattern` as a whole; {1}, {2} in the other fields stand for its groups.

    An empty `group` is the path: the layer shares its input with no other.
    """

    pattern: str
    role: str
    reads: Reads = "picture"
    precision: Precision = "low"
    group: str = ""
    parent: str = ""
    after: After | None = None
    bits: int | None = None


def _attention(block: str, reads: Reads = "picture") -> tuple[Rule, ...]:
    """Self-attention with diffusers' names in a module that matches `block`."""
    return (
        Rule(rf"({block})\.to_(q|k|v)", "attn_{2}", reads, group="{1}.qkv", parent="{1}"),
        Rule(rf"({block})\.to_out(?:\.0)?", "attn_out", reads, parent="{1}"),
    )


def _cross(block: str, precision: Precision = "low") -> tuple[Rule, ...]:
    """Cross-attention: its keys and values read text, and are where concepts are edited."""
    return (
        Rule(rf"({block})\.to_q", "attn_q", parent="{1}"),
        Rule(rf"({block})\.to_(k|v)", "cross_{2}", "text", precision, group="{1}.kv", parent="{1}"),
        Rule(rf"({block})\.to_out(?:\.0)?", "attn_out", parent="{1}"),
    )


def _joint(block: str) -> tuple[Rule, ...]:
    """Joint attention of two streams (MM-DiT), the text stream's maps apart."""
    return (
        *_attention(block),
        Rule(rf"({block})\.add_(k|v)_proj", "cross_{2}", "text", group="{1}.add_qkv", parent="{1}"),
        Rule(rf"({block})\.add_q_proj", "attn_q", "text", group="{1}.add_qkv", parent="{1}"),
        Rule(rf"({block})\.to_add_out", "attn_out", "text", parent="{1}"),
    )


def _feed_forward(block: str, reads: Reads = "picture", after: After | None = None) -> tuple[Rule, ...]:
    return (
        Rule(rf"({block})\.net\.0\.proj", "ff_up", reads, parent="{1}"),
        Rule(rf"({block})\.net\.2", "ff_down", reads, parent="{1}", after=after),
    )


def _gated(block: str, ups: str, down: str, reads: Reads = "picture") -> tuple[Rule, ...]:
    return (
        Rule(rf"({block})\.(?:{ups})", "ff_up", reads, group="{1}.up", parent="{1}"),
        Rule(rf"({block})\.{down}", "ff_down", reads, parent="{1}"),
    )


def _ours(block: str, reads: Reads = "picture") -> tuple[Rule, ...]:
    """A layer of ours: `attn` only projects, the rest happens in the layer."""
    return (
        Rule(rf"({block}\.attn)\.to_(q|k|v)", "attn_{2}", reads, group="{1}.qkv", parent="{1}"),
        Rule(rf"{block}\.attn\.to_out", "attn_out", reads),
        Rule(rf"({block}\.ff)\.up", "ff_up", reads, parent="{1}"),
        Rule(rf"({block}\.ff)\.down", "ff_down", reads, parent="{1}", after="silu"),
    )


def _keep(*patterns: str, role: str = "embed", reads: Reads = "picture") -> tuple[Rule, ...]:
    return tuple(Rule(pattern, role, reads, "keep") for pattern in patterns)


def _eight(*rules: Rule, roles: tuple[str, ...] = ()) -> tuple[Rule, ...]:
    """The rules, those of `roles` (all, if none are named) at 8 bits at least."""
    return tuple(replace(rule, bits=8) if not roles or rule.role in roles else rule for rule in rules)


def _modulation(*patterns: str) -> tuple[Rule, ...]:
    return tuple(Rule(pattern, "adaln", "time", "weight_only") for pattern in patterns)


_TIME = _keep(r".*(?:time|timestep|guidance|t|sigma)_?(?:text_)?embed.*", role="time", reads="time")
_MMDIT = (
    *_joint(r".*\.attn2?"),
    *_feed_forward(r".*\.ff", after="gelu"),
    *_feed_forward(r".*\.ff_context", "text", "gelu"),
    *_modulation(r".*blocks\.\d+\.norm1(?:_context)?\.linear"),
    *_keep("x_embedder", "context_embedder", "proj_out", r"norm_out\.linear"),
    *_TIME,
)
_LANGUAGE = (
    Rule(r"(.*)\.(q|k|v)(?:_proj)?", "attn_{2}", "text", group="{1}.qkv", parent="{1}"),
    Rule(r"(.*)\.(?:o|out_proj|o_proj)", "attn_out", "text", parent="{1}"),
    *_gated(r".*", r"gate_proj|up_proj|wi_0|wi_1|wi", r"(?:down_proj|wo)", "text"),
    Rule(r"(.*)\.fc1", "ff_up", "text", parent="{1}"),
    Rule(r"(.*)\.fc2", "ff_down", "text", parent="{1}"),
)
# Unified models: the language model carries words and pictures alike. What sees and what turns codes into pictures is
# small beside it, and stays. Attention cannot be called again for scoring: its cache has grown meanwhile.
_UNIFIED = (
    *_keep(r"model\.(?:vision_model|aligner|generation_aligner|generation_head|vqmodel)\..*"),
    *_keep("lm_head", reads="both"),
    *(replace(r, reads="both", parent="" if r.role.startswith("attn") else r.parent) for r in _LANGUAGE),
)
# First match wins, so the ends and the modulation stand before patterns that would take them as well.
_GENERIC = (
    *_keep(r".*(?:embed|proj_in|proj_out|conv_in|conv_out|lm_head|classifier|head|text_projection).*"),
    *_modulation(r".*(?:adaln|ada_ln|adaLN|modulation|norm\d?(?:_context)?\.linear).*"),
    *_cross(r".*\.attn2"),
    *_joint(r".*"),
    *_feed_forward(r".*"),
    *_LANGUAGE,
    *_gated(r".*", r"w1|w3", "w2"),
    Rule(r".*", "linear"),
)

FAMILIES: dict[str, tuple[Rule, ...]] = {
    "Trunk": (
        Rule(r"(text_layers\.\d+)\.attn\.to_(q|k|v)", "attn_{2}", "text", group="{1}.in"),
        Rule(r"(text_layers\.\d+)\.to_(k|v)_pic", "cross_{2}", "text", group="{1}.in"),
        *_ours(r"text_layers\.\d+", "text"),
        *_ours(r"picture_layers\.\d+"),
        *_modulation("modulation"),
        *_keep("latent_in"),
        *_keep(r"sigma_embedding\..*", role="time", reads="time"),
        *_keep(r"number_copy\..*", reads="text"),
    ),
    "VelocityDecoder": (
        *_eight(*_ours(r"layers\.\d+"), roles=("ff_up", "ff_down")),
        *_eight(*_modulation(r"layers\.\d+\.modulation")),
        *_keep("latent_in", "feature_in", "modulation_out", "velocity_out"),
        *_keep(r"sigma_embedding\..*", role="time", reads="time"),
    ),
    "FluxTransformer2DModel": (
        Rule(r"(single_transformer_blocks\.\d+)\.attn\.to_(q|k|v)", "attn_{2}", "both", group="{1}.in", parent="{1}"),
        Rule(r"(single_transformer_blocks\.\d+)\.proj_mlp", "ff_up", "both", group="{1}.in", parent="{1}"),
        Rule(r"single_transformer_blocks\.\d+\.proj_out", "ff_down", "both"),
        *_modulation(r"single_transformer_blocks\.\d+\.norm\.linear"),
        *_MMDIT,
    ),
    "SD3Transformer2DModel": _MMDIT,
    "QwenImageTransformer2DModel": (
        *_joint(r".*\.attn"),
        *_feed_forward(r".*\.img_mlp", after="gelu"),
        *_feed_forward(r".*\.txt_mlp", "text", "gelu"),
        *_modulation(r".*\.(?:img|txt)_mod\.1"),
        *_keep("img_in", "txt_in", "proj_out", r"norm_out\.linear"),
        *_TIME,
    ),
    "PixArtTransformer2DModel": (
        *_attention(r".*\.attn1"),
        *_cross(r".*\.attn2", "keep"),
        *_feed_forward(r".*\.ff", after="gelu"),
        *_modulation(r"adaln_single\.linear"),
        *_keep(r"caption_projection\..*", "proj_out"),
        *_keep(r"adaln_single\.emb\..*", role="time", reads="time"),
    ),
    "SanaTransformer2DModel": (
        *_attention(r".*\.attn1"),
        *_cross(r".*\.attn2", "keep"),
        *_modulation(r"time_embed\.linear"),
        *_keep(r"caption_projection\..*", "proj_out"),
        *_keep(r"time_embed\.emb\..*", role="time", reads="time"),
    ),
    "ZImageTransformer2DModel": (
        *_attention(r"(?:layers|noise_refiner)\.\d+\.attention", "both"),
        *_attention(r"context_refiner\.\d+\.attention", "text"),
        *_gated(r"(?:layers|noise_refiner)\.\d+\.feed_forward", "w1|w3", "w2", "both"),
        *_gated(r"context_refiner\.\d+\.feed_forward", "w1|w3", "w2", "text"),
        *_modulation(r"(?:layers|noise_refiner)\.\d+\.adaLN_modulation\.\d+"),
        *_keep(r"all_x_embedder\..*", r"all_final_layer\..*", r"cap_embedder\..*", r"siglip.*"),
        *_keep(r"t_embedder\..*", role="time", reads="time"),
    ),
    "UNet2DConditionModel": (
        *_attention(r".*\.attn1"),
        *_cross(r".*\.attn2"),
        *_feed_forward(r".*\.ff"),
        *_keep(r".*\.proj_(?:in|out)", r"add_embedding\..*", r"encoder_hid_proj.*"),
        *_keep(r".*\.time_emb_proj", r"time_embedding\..*", role="time", reads="time"),
    ),
    "JanusForConditionalGeneration": _UNIFIED,
    "Emu3ForConditionalGeneration": _UNIFIED,
    "CLIPTextModel": _LANGUAGE,
    "CLIPTextModelWithProjection": (*_keep("text_projection", reads="text"), *_LANGUAGE),
    "T5EncoderModel": _LANGUAGE,
    "CodeHead": (
        *_ours(r"layers\.\d+"),
        *_modulation(r"layers\.\d+\.modulation"),
        *_keep("feature_in", "modulation_out"),
    ),
}


def _fill(template: str, match: re.Match[str]) -> str:
    return re.sub(r"\{(\d)\}", lambda m: match.group(int(m[1])), template)


def _site(path: str, rules: tuple[Rule, ...]) -> Site | None:
    for rule in rules:
        match = re.fullmatch(rule.pattern, path)
        if match:
            return Site(
                path=path,
                role=_fill(rule.role, match),
                reads=rule.reads,
                precision=rule.precision,
                group=_fill(rule.group, match) or path,
                parent=_fill(rule.parent, match),
                after=rule.after,
                bits=rule.bits,
            )
    return None


def find_sites(root: nn.Module) -> list[Site]:
    """Every linear layer of `root` as a site, in the model's order. Warns where the family is not known."""
    names = [kind.__name__ for kind in type(root).__mro__]
    name = next((n for n in names if n in FAMILIES), None)
    rules = FAMILIES[name] if name else _GENERIC
    if name is None and any(True for _ in linears(root)):
        warnings.warn(
            f"mm.layers.sites has no table for {names[0]}; layers are told apart by their names. Known families: "
            f"{', '.join(FAMILIES)}",
            stacklevel=2,
        )
    found = [_site(path, rules) or _site(path, _GENERIC) for path, _ in linears(root)]
    return [site for site in found if site is not None]
