"""How other programs call the layers of each family: the names of the models' original code.

Design choices
- One table a class of diffusers. A key is a block of the original code and the same block in diffusers (`{}` is its
  number); below it stand layers, original name to diffusers' name.
- `a|b|c`: the original has one layer where diffusers has several; their outputs follow each other. `~a`: the two halves
  of the outputs are swapped (shift and scale of the last modulation).
- Names that are the same in both need no line. kohya's names are these with underscores for dots.

Facts: the layers' names and order in diffusers' own checkpoint converters (`diffusers.loaders.single_file_utils`).
"""

from __future__ import annotations

Table = dict[tuple[str, str], dict[str, str]]

_QKV, _ADDED = "attn.to_q|attn.to_k|attn.to_v", "attn.add_q_proj|attn.add_k_proj|attn.add_v_proj"
_JOINT_ATTENTION = {  # of FLUX and FLUX.2; qkv_lora1 and so on are XLabs' names for LoRAs in attention processors
    "img_attn.qkv": _QKV, "img_attn.proj": "attn.to_out.0", "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k", "txt_attn.qkv": _ADDED, "txt_attn.proj": "attn.to_add_out",
    "txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k",
    "qkv_lora1": _QKV, "proj_lora1": "attn.to_out.0", "qkv_lora2": _ADDED, "proj_lora2": "attn.to_add_out",
}  # fmt: skip

FLUX: Table = {
    ("double_blocks.{}", "transformer_blocks.{}"): _JOINT_ATTENTION | {
        "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2", "img_mod.lin": "norm1.linear",
        "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2", "txt_mod.lin": "norm1_context.linear",
    },
    ("single_blocks.{}", "single_transformer_blocks.{}"): {
        "linear1": f"{_QKV}|proj_mlp", "linear2": "proj_out", "modulation.lin": "norm.linear", "qkv": _QKV,
        "proj": "proj_out", "norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k",
    },
    ("", ""): {
        "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "~norm_out.linear",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    },
}  # fmt: skip

CHROMA: Table = FLUX | {  # its modulations come from one network
    ("distilled_guidance_layer.layers.{}", "distilled_guidance_layer.layers.{}"): {
        "in_layer": "linear_1", "out_layer": "linear_2",
    },
}  # fmt: skip

FLUX_2: Table = {
    ("double_blocks.{}", "transformer_blocks.{}"): _JOINT_ATTENTION | {
        "img_mlp.0": "ff.linear_in", "img_mlp.2": "ff.linear_out",
        "txt_mlp.0": "ff_context.linear_in", "txt_mlp.2": "ff_context.linear_out",
    },
    ("single_blocks.{}", "single_transformer_blocks.{}"): {
        "linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out", "norm.query_norm": "attn.norm_q",
        "norm.key_norm": "attn.norm_k",
    },
    ("", ""): {
        "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "~norm_out.linear",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    },
}  # fmt: skip

SD3: Table = {
    ("joint_blocks.{}.x_block", "transformer_blocks.{}"): {
        "attn.qkv": _QKV, "attn.proj": "attn.to_out.0", "attn.ln_q": "attn.norm_q", "attn.ln_k": "attn.norm_k",
        "attn2.qkv": "attn2.to_q|attn2.to_k|attn2.to_v", "attn2.proj": "attn2.to_out.0", "attn2.ln_q": "attn2.norm_q",
        "attn2.ln_k": "attn2.norm_k", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
        "adaLN_modulation.1": "norm1.linear",
    },
    ("joint_blocks.{}.context_block", "transformer_blocks.{}"): {
        "attn.qkv": _ADDED, "attn.proj": "attn.to_add_out", "attn.ln_q": "attn.norm_added_q",
        "attn.ln_k": "attn.norm_added_k", "mlp.fc1": "ff_context.net.0.proj", "mlp.fc2": "ff_context.net.2",
        "adaLN_modulation.1": "norm1_context.linear",
    },
    ("", ""): {
        "x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "~norm_out.linear",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    },
}  # fmt: skip

_Z_BLOCK = {
    "attention.qkv": "attention.to_q|attention.to_k|attention.to_v", "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q", "attention.k_norm": "attention.norm_k",
}  # fmt: skip
Z_IMAGE: Table = {(f"{part}.{{}}", f"{part}.{{}}"): _Z_BLOCK for part in ("layers", "noise_refiner", "context_refiner")}
Z_IMAGE[("", "")] = {
    "x_embedder": "all_x_embedder.2-1", "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}  # fmt: skip

WAN: Table = {
    ("blocks.{}", "blocks.{}"): {
        f"{theirs}.{letter}": f"{ours}.{layer}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for letter, layer in {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "k_img": "add_k_proj",
                              "v_img": "add_v_proj", "norm_q": "norm_q", "norm_k": "norm_k",
                              "norm_k_img": "norm_added_k"}.items()
    } | {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "norm3": "norm2"},
    ("", ""): {
        "head.head": "proj_out", "time_projection.1": "condition_embedder.time_proj",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    },
}  # fmt: skip

_LUMINA_BLOCK = {
    "attention.qkv": _QKV, "attention.out": "attn.to_out.0", "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k", "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2", "feed_forward.w3": "feed_forward.linear_3",
    "adaLN_modulation.1": "norm1.linear",
}  # fmt: skip
LUMINA_2: Table = {
    (f"{part}.{{}}", f"{part}.{{}}"): _LUMINA_BLOCK for part in ("layers", "noise_refiner", "context_refiner")
}
LUMINA_2[("", "")] = {
    "x_embedder": "x_embedder", "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "cap_embedder.0": "time_caption_embed.caption_embedder.0",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1", "final_layer.linear": "norm_out.linear_2",
}  # fmt: skip

TABLES: dict[str, Table] = {
    "FluxTransformer2DModel": FLUX,
    "ChromaTransformer2DModel": CHROMA,
    "Flux2Transformer2DModel": FLUX_2,
    "SD3Transformer2DModel": SD3,
    "Lumina2Transformer2DModel": LUMINA_2,
    "ZImageTransformer2DModel": Z_IMAGE,
    "WanTransformer3DModel": WAN,
}

CLIP_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # diffusers, until 0.20
FUSED = {  # what `fuse_qkv_projections` makes: the layer, and those that it stands for, in order
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}

# Latent diffusion's UNet (SD 1.5, SDXL): the layers inside its blocks, original name to diffusers'.
LDM_RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
              "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}  # fmt: skip
LDM_ENDS = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
            "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
            "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}  # fmt: skip
