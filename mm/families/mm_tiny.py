"""mm-tiny, the embedded unified model of mm. Its classes and its world are named here, never imported."""

from __future__ import annotations

from mm.families.family import Family, LatentPreview, LoraNames, SizeRule
from mm.families.rules import Rules, at_bits, keep, keep_text, modulation, time
from mm.layers.sites import Reads, Rule

# Steps where nothing is said: codes that are drawn together do not see each other, so few steps cost more there.
STEPS: dict[str, int] = {"flow": 12, "codes": 32}
# Guidance where nothing is said: over 360 tuning pictures 4 gave .911, 5.5 .931, 7 .936.
GUIDANCE = 5.5


def _layer(block: str, reads: Reads = "picture") -> Rules:
    """A layer of ours: `attn` only projects, the rest happens in the layer."""
    return (
        Rule(rf"({block}\.attn)\.to_(q|k|v)", "attn_{2}", reads, group="{1}.qkv", parent="{1}"),
        Rule(rf"{block}\.attn\.to_out", "attn_out", reads),
        Rule(rf"({block}\.ff)\.up", "ff_up", reads, parent="{1}"),
        Rule(rf"({block}\.ff)\.down", "ff_down", reads, parent="{1}", after="silu"),
    )


TRUNK: Rules = (
    Rule(r"(text_layers\.\d+)\.attn\.to_(q|k|v)", "attn_{2}", "text", group="{1}.in"),
    Rule(r"(text_layers\.\d+)\.to_(k|v)_pic", "cross_{2}", "text", group="{1}.in"),
    *_layer(r"text_layers\.\d+", "text"),
    *_layer(r"picture_layers\.\d+"),
    *modulation("modulation"),
    *keep("latent_in"),
    *time(r"sigma_embedding\..*"),
    *keep_text(r"number_copy\..*"),
)
# Errors of the velocity decoder are made good by nothing after it: 8 bits for a ninth of the weights took a third of
# the error off the first steps' velocity, and 8 bits for all of the text side nothing.
VELOCITY: Rules = (
    *at_bits(8, *_layer(r"layers\.\d+"), roles=("ff_up", "ff_down")),
    *at_bits(8, *modulation(r"layers\.\d+\.modulation")),
    *keep("latent_in", "feature_in", "modulation_out", "velocity_out"),
    *time(r"sigma_embedding\..*"),
)
CODES: Rules = (
    *_layer(r"layers\.\d+"),
    *modulation(r"layers\.\d+\.modulation"),
    *keep("feature_in", "modulation_out"),
)
# Explains .72 of the variance of colours averaged over 16 x 16 pixels, on 64 other scenes.
PREVIEW = LatentPreview(
    factors=(
        (0.0023, -0.0613, -0.1310), (0.0559, 0.1443, 0.0681), (0.0311, 0.0937, 0.1625), (0.1259, 0.1583, 0.0853),
        (-0.0647, -0.0878, -0.0576), (-0.2043, -0.1737, -0.0365), (0.1562, 0.1369, 0.0538), (-0.1357, -0.1326, -0.0868),
        (0.2316, 0.1792, 0.1486), (-0.0632, -0.0811, -0.0071), (0.1174, 0.0387, 0.0748), (-0.1380, -0.1149, -0.0900),
        (-0.1199, -0.1008, -0.1597), (0.0656, 0.1293, 0.1239), (0.1203, 0.0272, 0.0137), (0.0112, 0.0566, 0.1813),
    ),
    bias=(0.1725, 0.2098, 0.2176),
    source="mm.families.previews.fit on the autoencoder's own pictures of 192 rendered scenes",
)  # fmt: skip
_TEXT = (r"text_layers\.\d+\.to_(?:k|v)_pic",)

MM_TINY = Family(
    name="mm-tiny",
    pipelines={
        "text_to_image": "mm:TextToImagePipeline",
        "edit": "mm:ImageEditPipeline",
        "understanding": "mm:UnderstandingPipeline",
        "conversation": "mm:InterleavedPipeline",
    },
    denoisers={"Trunk": TRUNK, "VelocityDecoder": VELOCITY, "CodeHead": CODES},
    steps=STEPS,
    guidance=GUIDANCE,
    size=SizeRule(default=128, multiple=128, maximum=128),
    modes=("flow", "codes"),
    prompts="mm.world.calibration:captions",
    preview=PREVIEW,
    text_sites=_TEXT,
    edit_sites=_TEXT,
    lora=LoraNames(components={"trunk": "trunk"}, kohya={"lora_unet_": "trunk"}),
    contexts="mm.world.concepts:WorldContexts",
    objective="mm.pipelines.objective:TrunkObjective",
    score="mm.evaluation.verdicts:verdicts",
    fast="mm.pipelines.fast:fast_settings",
    dtype="float32",
)
FAMILIES = (MM_TINY,)


def steps_for(mode: str, steps: int | None = None) -> int:
    """`steps`, or what the mode of mm-tiny takes by itself."""
    return MM_TINY.steps_for(mode, steps)
