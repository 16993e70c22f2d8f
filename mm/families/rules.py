"""Building blocks of families' site tables, and the generic table for models of no known family.

Design choices
- A block of rules covers one kind of layer under diffusers' or transformers' names: `attention`, `cross`, `joint`,
  `feed_forward`, `gated`, `language`. A family's table joins some of them with what it keeps.
- The first match wins, so ends and modulation stand before patterns that would match them as well.
- The generic table is careful: q stands alone, since keys and values may read another input; k and v form a group;
  a layer outside the repeated blocks is an end of the model and stays, unless its name says that it is attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from mm.core.checks import texts
from mm.layers.sites import After, Precision, Reads, Rule

Rules = tuple[Rule, ...]


def attention(block: str, reads: Reads = "picture") -> Rules:
    """Self-attention with diffusers' names in a module that matches `block`; a gate of its output reads the same."""
    return (
        Rule(rf"({block})\.to_(q|k|v|gate)", "attn_{2}", reads, group="{1}.qkv", parent="{1}"),
        Rule(rf"({block})\.to_out(?:\.0)?", "attn_out", reads, parent="{1}"),
    )


def cross(block: str, precision: Precision = "low", reads: Reads = "text") -> Rules:
    """Cross-attention: its keys and values read text, and are where concepts are edited."""
    return (
        Rule(rf"({block})\.to_q", "attn_q", parent="{1}"),
        Rule(rf"({block})\.to_(k|v)", "cross_{2}", reads, precision, group="{1}.kv", parent="{1}"),
        Rule(rf"({block})\.to_out(?:\.0)?", "attn_out", parent="{1}"),
    )


def joint(block: str) -> Rules:
    """Joint attention of two streams (MM-DiT), the text stream's maps apart."""
    return (
        *attention(block),
        Rule(rf"({block})\.add_(k|v)_proj", "cross_{2}", "text", group="{1}.add_qkv", parent="{1}"),
        Rule(rf"({block})\.add_q_proj", "attn_q", "text", group="{1}.add_qkv", parent="{1}"),
        Rule(rf"({block})\.to_add_out", "attn_out", "text", parent="{1}"),
    )


def feed_forward(block: str, reads: Reads = "picture", after: After | None = None) -> Rules:
    """diffusers' `FeedForward`; `after` where its activation is plain, not gated."""
    return (
        Rule(rf"({block})\.net\.0\.proj", "ff_up", reads, parent="{1}"),
        Rule(rf"({block})\.net\.2", "ff_down", reads, parent="{1}", after=after),
    )


def gated(block: str, ups: str, down: str, reads: Reads = "picture") -> Rules:
    """A gated feed-forward: `ups` (alternatives of a pattern) read the same input, `down` reads their product."""
    return (
        Rule(rf"({block})\.(?:{ups})", "ff_up", reads, group="{1}.up", parent="{1}"),
        Rule(rf"({block})\.(?:{down})", "ff_down", reads, parent="{1}"),
    )


def plain(block: str, up: str, down: str, reads: Reads = "picture", after: After | None = None) -> Rules:
    """A feed-forward of two layers under other names than diffusers'."""
    return (
        Rule(rf"({block})\.(?:{up})", "ff_up", reads, parent="{1}"),
        Rule(rf"({block})\.(?:{down})", "ff_down", reads, parent="{1}", after=after),
    )


def single(block: str) -> Rules:
    """FLUX's single-stream block: attention and feed-forward side by side on one input, one projection out of both."""
    return (
        Rule(rf"({block})\.attn\.to_(q|k|v)", "attn_{2}", "both", group="{1}.in", parent="{1}"),
        Rule(rf"({block})\.proj_mlp", "ff_up", "both", group="{1}.in", parent="{1}"),
        Rule(rf"{block}\.proj_out", "ff_down", "both"),
        *modulation(rf"{block}\.norm\.linear"),
    )


def keep(*patterns: str, role: str = "embed", reads: Reads = "picture") -> Rules:
    """Layers that stay at 16 bits."""
    return tuple(Rule(pattern, role, reads, "keep") for pattern in patterns)


def keep_text(*patterns: str) -> Rules:
    """Layers that read text features and stay at 16 bits."""
    return keep(*patterns, reads="text")


def modulation(*patterns: str) -> Rules:
    """adaLN: 4-bit weights, 16-bit inputs."""
    return tuple(Rule(pattern, "adaln", "time", "weight_only") for pattern in patterns)


def time(*patterns: str) -> Rules:
    """Embeddings of time, guidance and size: they stay."""
    return keep(*patterns, role="time", reads="time")


def at_bits(bits: int, *rules: Rule, roles: tuple[str, ...] = ()) -> Rules:
    """The rules, those of `roles` (all, if none are named) at `bits` bits at least."""
    chosen = texts("roles", roles)
    return tuple(replace(rule, bits=bits) if not chosen or rule.role in chosen else rule for rule in rules)


TIME = time(
    r"(?:.*\.)?(?:time|timestep|guidance|t|sigma)_?(?:text_|guidance_)?(?:embed|embedder|embedding|embeddings)\..*"
)
MMDIT: Rules = (
    *joint(r".*\.attn2?"),
    *feed_forward(r".*\.ff", after="gelu"),
    *feed_forward(r".*\.ff_context", "text", "gelu"),
    *modulation(r".*blocks\.\d+\.norm1(?:_context)?\.linear"),
    *keep("x_embedder", "proj_out", r"norm_out\.linear"),
    *keep_text("context_embedder"),
    *TIME,
)
FLUX_LIKE: Rules = (*single(r"single_transformer_blocks\.\d+"), *MMDIT)
LANGUAGE: Rules = (
    Rule(r"(.*)\.(q|k|v)(?:_proj)?", "attn_{2}", "text", group="{1}.qkv", parent="{1}"),
    Rule(r"(.*)\.(?:o|out_proj|o_proj)", "attn_out", "text", parent="{1}"),
    *gated(r".*", r"gate_proj|up_proj|wi_0|wi_1|wi", r"down_proj|wo", "text"),
    Rule(r"(.*)\.fc1", "ff_up", "text", parent="{1}"),
    Rule(r"(.*)\.fc2", "ff_down", "text", parent="{1}"),
)

# The ends of models under the names that diffusers' classes give them, wherever they stand in a path.
_ENDS = (
    r"(?:x|y|img|txt|time|vector|guidance|text|image|latent|context|cond|feature|pos)_in|time_token|final\w*|norm_out"
    r"|norm_final|distilled_guidance_layer|conv_in|conv_out|classifier|text_projection|\w*head|router|pooler"
    r"|(?:time|timestep|temb|sigma)(?:_\w+)?|\w*(?:embed|refine_embed|patchif)\w*|t_block|\w*modulation_out"
)
_Q, _K, _V = (rf"(?:to_)?(?:{names})(?:_proj|_linear)?" for names in ("q|query", "k|key", "v|value"))
_BLOCK = r"(?:.*\.)?\d+\..*"  # inside a list of blocks

_BY_NAME: Rules = (
    *keep(rf"(?:.*\.)?(?:{_ENDS})(?:\..*)?"),
    *keep(r"(?:\w+_)?(?:proj|projection|projector|linear|mapper)(?:_\w+)?(?:\..*)?"),  # above all blocks
    *keep(r".*\.attentions\.\d+\.proj_(?:in|out)"),  # around a UNet's transformers
    *modulation(r".*(?:adaln|ada_ln|adaLN|modulation|_mod\b|\bmod\b|norm\d?(?:_context)?\.linear|context_mlp).*"),
    Rule(rf"(.*)\.(?:{_Q}|add_q_proj|to_gate)", "attn_q", parent="{1}"),
    Rule(r"(.*)\.add_(k|v)_proj", "attn_{2}", group="{1}.add_kv", parent="{1}"),
    Rule(rf"(.*)\.{_K}", "attn_k", group="{1}.kv", parent="{1}"),
    Rule(rf"(.*)\.{_V}", "attn_v", group="{1}.kv", parent="{1}"),
    Rule(r"(.*)\.\w*(?:qkv|kv)(?:_proj|_linear)?", "attn_kv", parent="{1}"),
    Rule(r"(.*)\.(?:to_out(?:\.0)?|to_add_out|out_layer|out_proj|o_proj|o|proj_attn)", "attn_out", parent="{1}"),
    *feed_forward(r".*"),
    *gated(r".*", r"gate_proj|up_proj|wi_0|wi_1", r"down_proj|wo"),
    *gated(r".*", r"w1|w3", "w2"),
    *plain(r".*", "fc1", "fc2"),
)
# What no name says: inside a list of blocks it works, outside it is an end. A model without lists has no such ends.
IN_BLOCKS: Rules = (Rule(_BLOCK, "linear"), *keep(r".*"))
ANYWHERE: Rules = (Rule(r".*", "linear"),)


def generic(paths: Iterable[str]) -> Rules:
    """The table for a model of no known family, by the paths of its linear layers."""
    listed = any(re.fullmatch(_BLOCK, path) for path in paths)
    return (*_BY_NAME, *(IN_BLOCKS if listed else ANYWHERE))
