"""Kandinsky 2.2 (UNet), 3 (UNet with attention that is cross or self by its place), 5 and 6 (transformers)."""

from __future__ import annotations

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names, unet_names
from mm.families.rules import Rules, cross, keep, keep_text, modulation, plain, time
from mm.families.stable_diffusion import UNET
from mm.families.text_encoders import CLIP, QWEN_VL, T5
from mm.layers.sites import Reads, Rule

# In version 3 `attentions.0` of a level is self-attention where it is there, the others read text.
RULES_3: Rules = (
    Rule(r"(.*_blocks\.\d+\.attentions\.0\.attention)\.to_(q|k|v)", "attn_{2}", group="{1}.qkv", parent="{1}"),
    *cross(r".*_blocks\.\d+\.attentions\.\d+\.attention"),
    *modulation(r".*\.context_mlp\.\d+"),
    *keep_text(r"add_time_condition\..*", r"encoder_hid_proj\..*"),
    *time(r"time_embedding\..*"),
)


def _attention(block: str, reads: Reads, *, text: bool = False) -> Rules:
    """Attention under the names of Kandinsky 5: `text` where keys and values read text."""
    keys = "cross_{2}" if text else "attn_{2}"
    group = "{1}.kv" if text else "{1}.qkv"
    return (
        Rule(rf"({block})\.to_query", "attn_q", reads, group="" if text else group, parent="{1}"),
        Rule(rf"({block})\.to_key", keys.replace("{2}", "k"), "text" if text else reads, group=group, parent="{1}"),
        Rule(rf"({block})\.to_value", keys.replace("{2}", "v"), "text" if text else reads, group=group, parent="{1}"),
        Rule(rf"({block})\.out_layer", "attn_out", reads, parent="{1}"),
    )


RULES_5: Rules = (
    *_attention(r"visual_transformer_blocks\.\d+\.self_attention", "picture"),
    *_attention(r"visual_transformer_blocks\.\d+\.cross_attention", "picture", text=True),
    *_attention(r"text_transformer_blocks\.\d+\.self_attention", "text"),
    *plain(r"visual_transformer_blocks\.\d+\.feed_forward", "in_layer", "out_layer", after="gelu"),
    *plain(r"text_transformer_blocks\.\d+\.feed_forward", "in_layer", "out_layer", "text", "gelu"),
    *modulation(r"(?:visual|text)_transformer_blocks\.\d+\.\w+_modulation\.out_layer"),
    *keep(r"visual_embeddings\..*", r"out_layer\..*"),
    *keep_text(r"(?:pooled_)?text_embeddings\..*"),
    *time(r"time_embeddings\..*"),
)
_TEXT_3 = (r".*_blocks\.\d+\.attentions\.[1-9]\d*\.attention\.to_(?:k|v)",)
_TEXT_5 = (r"text_embeddings\.in_layer", r"visual_transformer_blocks\.\d+\.cross_attention\.to_(?:key|value)")

KANDINSKY_3 = Family(
    name="kandinsky-3",
    pipelines={"text_to_image": "Kandinsky3Pipeline", "image_to_image": "Kandinsky3Img2ImgPipeline"},
    denoisers={"Kandinsky3UNet": RULES_3},
    text_encoders=T5,
    steps=25,
    guidance=3.0,
    size=SizeRule(default=1024, multiple=8, maximum=1536),
    no_preview=previews.NONE_KNOWN,
    mixed=False,  # the mean over a prompt counts its padding
    text_sites=("encoder_hid_proj.projection_linear", *_TEXT_3),
    edit_sites=_TEXT_3,
    lora=unet_names(1),
)
KANDINSKY_5 = Family(
    name="kandinsky-5",
    pipelines={"text_to_image": "Kandinsky5T2IPipeline", "image_to_image": "Kandinsky5I2IPipeline"},
    more_pipelines=("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline"),
    denoisers={"Kandinsky5Transformer3DModel": RULES_5},
    text_encoders=QWEN_VL | CLIP,
    steps=50,
    guidance=3.5,
    size=SizeRule(default=1024, multiple=16, maximum=1408),
    preview=previews.FLUX,
    text_sites=_TEXT_5,
    edit_sites=_TEXT_5,
    lora=transformer_names(2, "KandinskyLoraLoaderMixin"),
)
KANDINSKY_2 = Family(
    name="kandinsky-2.2",
    pipelines={
        "text_to_image": "KandinskyV22Pipeline",
        "image_to_image": "KandinskyV22Img2ImgPipeline",
        "inpaint": "KandinskyV22InpaintPipeline",
    },
    more_pipelines=("KandinskyV22CombinedPipeline",),
    denoisers={"UNet2DConditionModel": UNET},
    config={"addition_embed_type": "image"},
    steps=100,
    guidance=4.0,
    size=SizeRule(default=512, multiple=64, maximum=1024),
    no_preview=previews.NONE_KNOWN,
    lora=unet_names(0),
)
FAMILIES = (KANDINSKY_3, KANDINSKY_5, KANDINSKY_2)
