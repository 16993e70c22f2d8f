"""Eight families of diffusers as tiny random models, with inputs and other programs' names for their layers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import torch
from tiny_public import flux_inputs, zimage
from torch import Tensor, nn

Named = tuple[str, list[str], bool]  # original name, layers of diffusers in the order of its rows, halves swapped


@dataclass(frozen=True, kw_only=True)
class Family:
    """`linears`: layers that peft adapts; `convs`: (1 x 1, 3 x 3). `original`: names of the original code, those that
    diffusers' own reader has for the tiny sizes; `only_ours`: others. `ldm`: names in latent diffusion's numbers."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    pipeline: type
    part: str
    linears: list[str]
    convs: tuple[str, str] = ("", "")
    original: list[Named] = field(default_factory=list)
    only_ours: list[Named] = field(default_factory=list)
    ldm: list[Named] = field(default_factory=list)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _unet(**fields: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        **{"block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 4,
           "layers_per_block": 2, "sample_size": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
           "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")} | fields
    )  # fmt: skip


def _sdxl() -> nn.Module:
    return _unet(
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=56, transformer_layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def _sd_inputs() -> dict[str, Any]:
    return {"sample": noise(1, 4, 8, 8), "timestep": torch.tensor([7]), "encoder_hidden_states": noise(1, 5, 8, seed=1)}


def _sdxl_inputs() -> dict[str, Any]:
    added = {"text_embeds": noise(1, 8, seed=2), "time_ids": torch.arange(6.0)[None]}
    return _sd_inputs() | {"added_cond_kwargs": added}


def _flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip


def _flux2() -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16,
    )  # fmt: skip


def _flux2_inputs() -> dict[str, Any]:
    ids = {"img_ids": torch.zeros(16, 4), "txt_ids": torch.zeros(5, 4)}
    return {"hidden_states": noise(1, 16, 4), "encoder_hidden_states": noise(1, 5, 32, seed=1),
            "timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.0])} | ids  # fmt: skip


def _sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64, out_channels=4,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def _sd3_inputs() -> dict[str, Any]:
    return {"hidden_states": noise(1, 4, 8, 8), "encoder_hidden_states": noise(1, 5, 32, seed=1),
            "pooled_projections": noise(1, 64, seed=2), "timestep": torch.tensor([3.0])}  # fmt: skip


def _qwen() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip


def _qwen_inputs() -> dict[str, Any]:
    return {"hidden_states": noise(1, 16, 16), "encoder_hidden_states": noise(1, 5, 16, seed=1),
            "encoder_hidden_states_mask": torch.ones(1, 5), "timestep": torch.tensor([0.5]),
            "img_shapes": [[(1, 4, 4)]]}  # fmt: skip


def _zimage_inputs() -> dict[str, Any]:
    return {"x": [noise(16, 1, 4, 4)], "t": torch.tensor([0.5]), "cap_feats": [noise(5, 16, seed=1)]}


def _wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, image_dim=8, added_kv_proj_dim=24,
    )  # fmt: skip


def _wan_inputs() -> dict[str, Any]:
    return {"hidden_states": noise(1, 4, 1, 4, 4), "timestep": torch.tensor([5]),
            "encoder_hidden_states": noise(1, 5, 16, seed=1),
            "encoder_hidden_states_image": noise(1, 3, 8, seed=2)}  # fmt: skip


def _same(*paths: str) -> list[Named]:
    return [(path, [path], False) for path in paths]


def _each(stem: str, *leaves: str) -> list[str]:
    return [f"{stem}.{leaf}" for leaf in leaves]


_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_SD_LINEARS = [
    f"{block}.attentions.{i}.transformer_blocks.0.{layer}"
    for block, i in (("down_blocks.0", 1), ("mid_block", 0), ("up_blocks.1", 2))
    for layer in ("attn1.to_q", "attn2.to_k", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
]
_T = "attentions.{}.transformer_blocks.0.{}"
_SD_LDM = [
    ("input_blocks.1.1.transformer_blocks.0.attn1.to_q", "down_blocks.0." + _T.format(0, "attn1.to_q")),
    ("input_blocks.2.1.transformer_blocks.0.attn2.to_k", "down_blocks.0." + _T.format(1, "attn2.to_k")),
    ("input_blocks.2.1.proj_in", "down_blocks.0.attentions.1.proj_in"),
    ("middle_block.1.transformer_blocks.0.ff.net.0.proj", "mid_block." + _T.format(0, "ff.net.0.proj")),
    ("output_blocks.3.1.transformer_blocks.0.attn1.to_out.0", "up_blocks.1." + _T.format(0, "attn1.to_out.0")),
    ("output_blocks.5.1.transformer_blocks.0.attn2.to_v", "up_blocks.1." + _T.format(2, "attn2.to_v")),
    ("input_blocks.4.0.emb_layers.1", "down_blocks.1.resnets.0.time_emb_proj"),
    ("time_embed.0", "time_embedding.linear_1"),
]
_SDXL_LDM = [
    ("input_blocks.4.1.transformer_blocks.1.attn1.to_q", "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"),
    ("input_blocks.5.1.proj_out", "down_blocks.1.attentions.1.proj_out"),
    ("middle_block.1.transformer_blocks.0.ff.net.2", "mid_block." + _T.format(0, "ff.net.2")),
    ("output_blocks.0.1.transformer_blocks.0.attn2.to_k", "up_blocks.0." + _T.format(0, "attn2.to_k")),
    ("output_blocks.2.1.transformer_blocks.0.attn1.to_v", "up_blocks.0." + _T.format(2, "attn1.to_v")),
    ("input_blocks.1.0.emb_layers.1", "down_blocks.0.resnets.0.time_emb_proj"),
    ("time_embed.2", "time_embedding.linear_2"), ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
]  # fmt: skip
_SDXL_LINEARS = [
    f"{block}.attentions.{i}.transformer_blocks.{j}.{layer}"
    for block, i, j in (("down_blocks.1", 1, 0), ("mid_block", 0, 1), ("up_blocks.0", 2, 0))
    for layer in ("attn1.to_q", "attn2.to_k", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
]
_CONVS = ("down_blocks.1.resnets.0.conv_shortcut", "down_blocks.0.resnets.0.conv1")
_TIME_FLUX2 = "time_guidance_embed.timestep_embedder.linear_"


def _fused(original: str, stem: str, leaves: tuple[str, ...]) -> Named:
    return original, _each(stem, *leaves), False


FAMILIES: dict[str, Family] = {
    "SD 1.5": Family(
        build=_unet, inputs=_sd_inputs, pipeline=diffusers.StableDiffusionPipeline, part="unet", linears=_SD_LINEARS,
        convs=_CONVS, original=_same(*_SD_LINEARS), ldm=[(a, [b], False) for a, b in _SD_LDM],
    ),
    "SDXL": Family(
        build=_sdxl, inputs=_sdxl_inputs, pipeline=diffusers.StableDiffusionXLPipeline, part="unet",
        linears=_SDXL_LINEARS, convs=_CONVS, original=_same(*_SDXL_LINEARS),
        ldm=[(a, [b], False) for a, b in _SDXL_LDM],
    ),
    "SD3": Family(
        build=_sd3, inputs=_sd3_inputs, pipeline=diffusers.StableDiffusion3Pipeline, part="transformer",
        linears=[*_each("transformer_blocks.0.attn", *_QKV, *_ADDED, "to_out.0", "to_add_out"),
                 *_each("transformer_blocks.1", "ff.net.0.proj", "ff.net.2", "norm1.linear"), "proj_out"],
        convs=("pos_embed.proj", ""),
        only_ours=[
            _fused("joint_blocks.0.x_block.attn.qkv", "transformer_blocks.0.attn", _QKV),
            _fused("joint_blocks.0.x_block.attn2.qkv", "transformer_blocks.0.attn2", _QKV),
            _fused("joint_blocks.1.context_block.attn.qkv", "transformer_blocks.1.attn", _ADDED),
            ("joint_blocks.1.x_block.attn.proj", ["transformer_blocks.1.attn.to_out.0"], False),
            ("joint_blocks.0.context_block.attn.proj", ["transformer_blocks.0.attn.to_add_out"], False),
            ("joint_blocks.0.x_block.mlp.fc1", ["transformer_blocks.0.ff.net.0.proj"], False),
            ("joint_blocks.0.context_block.mlp.fc2", ["transformer_blocks.0.ff_context.net.2"], False),
            ("joint_blocks.0.x_block.adaLN_modulation.1", ["transformer_blocks.0.norm1.linear"], False),
            ("joint_blocks.0.context_block.adaLN_modulation.1", ["transformer_blocks.0.norm1_context.linear"], False),
            ("joint_blocks.1.context_block.adaLN_modulation.1", ["transformer_blocks.1.norm1_context.linear"], True),
            ("final_layer.adaLN_modulation.1", ["norm_out.linear"], True), ("final_layer.linear", ["proj_out"], False),
            ("t_embedder.mlp.0", ["time_text_embed.timestep_embedder.linear_1"], False),
        ],
    ),
    "FLUX": Family(
        build=_flux, inputs=lambda: flux_inputs() | {"guidance": torch.tensor([3.0])}, pipeline=diffusers.FluxPipeline,
        part="transformer",
        linears=[*_each("transformer_blocks.0", *(f"attn.{a}" for a in (*_QKV, *_ADDED, "to_out.0")), "ff.net.2"),
                 *_each("single_transformer_blocks.1", "attn.to_q", "proj_mlp", "proj_out", "norm.linear")],
        original=[
            _fused("double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn", _QKV),
            _fused("double_blocks.1.txt_attn.qkv", "transformer_blocks.1.attn", _ADDED),
            ("double_blocks.0.img_attn.proj", ["transformer_blocks.0.attn.to_out.0"], False),
            ("double_blocks.1.txt_attn.proj", ["transformer_blocks.1.attn.to_add_out"], False),
            ("double_blocks.0.img_mlp.0", ["transformer_blocks.0.ff.net.0.proj"], False),
            ("double_blocks.0.txt_mlp.2", ["transformer_blocks.0.ff_context.net.2"], False),
            ("double_blocks.1.img_mod.lin", ["transformer_blocks.1.norm1.linear"], False),
            ("single_blocks.1.linear2", ["single_transformer_blocks.1.proj_out"], False),
            ("single_blocks.0.modulation.lin", ["single_transformer_blocks.0.norm.linear"], False),
        ],
        only_ours=[
            ("single_blocks.0.linear1", [*_each("single_transformer_blocks.0.attn", *_QKV),
                                         "single_transformer_blocks.0.proj_mlp"], False),
            ("final_layer.adaLN_modulation.1", ["norm_out.linear"], True), ("img_in", ["x_embedder"], False),
            ("vector_in.in_layer", ["time_text_embed.text_embedder.linear_1"], False),
        ],
    ),
    "FLUX.2": Family(
        build=_flux2, inputs=_flux2_inputs, pipeline=diffusers.Flux2Pipeline, part="transformer",
        linears=[*_each("transformer_blocks.0", *(f"attn.{a}" for a in (*_QKV, *_ADDED, "to_out.0")), "ff.linear_in"),
                 *_each("single_transformer_blocks.0.attn", "to_qkv_mlp_proj", "to_out"), "proj_out"],
        original=[
            _fused("double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn", _QKV),
            _fused("double_blocks.0.txt_attn.qkv", "transformer_blocks.0.attn", _ADDED),
            ("double_blocks.0.img_attn.proj", ["transformer_blocks.0.attn.to_out.0"], False),
            ("double_blocks.0.img_mlp.0", ["transformer_blocks.0.ff.linear_in"], False),
            ("double_blocks.0.txt_mlp.2", ["transformer_blocks.0.ff_context.linear_out"], False),
            ("single_blocks.0.linear1", ["single_transformer_blocks.0.attn.to_qkv_mlp_proj"], False),
            ("single_blocks.0.linear2", ["single_transformer_blocks.0.attn.to_out"], False),
            ("img_in", ["x_embedder"], False), ("final_layer.linear", ["proj_out"], False),
            ("time_in.in_layer", [f"{_TIME_FLUX2}1"], False),
        ],
        only_ours=[("final_layer.adaLN_modulation.1", ["norm_out.linear"], True)],
    ),
    "Qwen-Image": Family(
        build=_qwen, inputs=_qwen_inputs, pipeline=diffusers.QwenImagePipeline, part="transformer",
        linears=_each("transformer_blocks.0", *(f"attn.{a}" for a in (*_QKV, *_ADDED, "to_out.0")), "img_mlp.net.2"),
        original=_same(*_each("transformer_blocks.0", "attn.to_q", "attn.add_k_proj", "attn.to_out.0",
                              "attn.to_add_out", "img_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1"), "img_in"),
    ),
    "Z-Image": Family(
        build=zimage, inputs=_zimage_inputs, pipeline=diffusers.ZImagePipeline, part="transformer",
        linears=[*_each("layers.0.attention", *_QKV, "to_out.0"), "noise_refiner.0.feed_forward.w1",
                 "layers.0.adaLN_modulation.0"],
        original=[
            ("layers.0.attention.out", ["layers.0.attention.to_out.0"], False),
            *_same("layers.0.feed_forward.w1", "layers.0.feed_forward.w2", "noise_refiner.0.attention.to_q",
                   "context_refiner.0.feed_forward.w3", "layers.0.adaLN_modulation.0"),
        ],
        only_ours=[
            _fused("layers.0.attention.qkv", "layers.0.attention", _QKV),
            ("x_embedder", ["all_x_embedder.2-1"], False),
            ("final_layer.linear", ["all_final_layer.2-1.linear"], False),
        ],
    ),
    "Wan": Family(
        build=_wan, inputs=_wan_inputs, pipeline=diffusers.WanPipeline, part="transformer",
        linears=[*_each("blocks.0.attn1", *_QKV, "to_out.0"), *_each("blocks.1.attn2", "to_q", "add_k_proj"),
                 "blocks.1.ffn.net.0.proj"],
        original=[
            (f"blocks.{i}.{theirs}", [f"blocks.{i}.{ours}"], False)
            for i in (0, 1)
            for theirs, ours in (
                *((f"{a}_attn.{letter}", f"attn{n}.{layer}") for a, n in (("self", 1), ("cross", 2))
                  for letter, layer in zip("qkvo", (*_QKV, "to_out.0"), strict=True)),
                ("cross_attn.k_img", "attn2.add_k_proj"), ("cross_attn.v_img", "attn2.add_v_proj"),
                ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"),
            )
        ],
        only_ours=[
            ("head.head", ["proj_out"], False),
            ("time_embedding.0", ["condition_embedder.time_embedder.linear_1"], False),
        ],
    ),
}  # fmt: skip


@cache
def _built(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family].build().eval().requires_grad_(False)
    for parameter in model.parameters():  # SD3's last layers and others start at zero
        if parameter.ndim > 1 and not parameter.any():
            parameter.copy_(noise(*parameter.shape, seed=3) / parameter.shape[-1] ** 0.5)
    return model


def fresh(family: str) -> nn.Module:
    """A copy of the family's model, always of the same weights."""
    return copy.deepcopy(_built(family))


@torch.no_grad()
def run(family: str, model: nn.Module) -> Tensor:
    out = model(**FAMILIES[family].inputs(), return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


def pipeline_of(family: str, model: nn.Module) -> Any:
    """A pipeline of the family's class with the model alone."""
    kind, part = FAMILIES[family].pipeline, FAMILIES[family].part
    names = inspect.signature(kind.__init__).parameters
    required = [n for n, p in names.items() if p.default is inspect.Parameter.empty and n not in ("self", "kwargs")]
    return kind(**dict.fromkeys(required) | {part: model})
