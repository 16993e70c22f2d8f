"""Nunchaku files of other families than Flux, and nunchaku_lite folders, against the dense models that they mean."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from nunchaku_packer import make_layer, make_modulation, put, relative, run
from safetensors.torch import save_file

import mm
from mm.core.errors import UserError
from mm.quantization.layout import quantized


def test_a_qwen_image_file(tmp_path):
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    model = QwenImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(8, 12, 12),
    ).eval()  # fmt: skip
    tensors, path = {}, "transformer_blocks.0"
    three = {"attn.to_qkv": "to_q to_k to_v", "attn.add_qkv_proj": "add_q_proj add_k_proj add_v_proj"}
    one = "attn.to_out.0 attn.to_add_out img_mlp.net.0.proj img_mlp.net.2 txt_mlp.net.0.proj txt_mlp.net.2".split()
    for name, targets in [(n, [f"attn.{t}" for t in ts.split()]) for n, ts in three.items()] + [(n, [n]) for n in one]:
        linears = [model.get_submodule(f"{path}.{t}") for t in targets]
        n, k = linears[0].out_features, linears[0].in_features
        made = make_layer(rng, n * len(linears), k, unsigned=name.endswith("net.2"))
        tensors |= {f"{path}.{name}.{field}": tensor for field, tensor in made.fields.items()}
        for i, target in enumerate(targets):
            rows = slice(i * n, (i + 1) * n)
            put(model, f"{path}.{target}", made.dense[rows], made.plain_bias[rows])
    for name in ("img_mod.1", "txt_mod.1"):
        dense, bias, fields = make_modulation(rng, 6 * 64, 64, 6)
        tensors |= {f"{path}.{name}.{field}": tensor for field, tensor in fields.items()}
        put(model, f"{path}.{name}", dense, bias)
    taken = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "blocks." in n]
    tensors |= {k: t for k, t in model.state_dict().items() if k.rpartition(".")[0] not in taken}
    config = {"_class_name": "NunchakuQwenImageTransformer2DModel"} | dict(model.config)
    save_file(tensors, tmp_path / "q.safetensors", metadata={"config": json.dumps(config)})
    got = mm.load_nunchaku(tmp_path / "q.safetensors", dtype=torch.float32, activation_bits=16)
    g = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, 4, generator=g),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=g),
        "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.bool),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [(1, 4, 4)],
    }
    with torch.no_grad():
        assert relative(got(**inputs).sample, model(**inputs).sample) < 1e-4


def test_a_z_image_file_with_refiners_at_16_bits(tmp_path):
    torch.manual_seed(0)
    rng = np.random.default_rng(3)
    model = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=64, n_layers=1, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=32, axes_dims=[8, 12, 12], axes_lens=[16, 16, 16],
    )  # fmt: skip
    tensors = dict(model.state_dict())
    fused = {
        "attention.to_qkv": "attention.to_q attention.to_k attention.to_v",
        "feed_forward.net.2": "feed_forward.w2",
    }
    fused |= {"feed_forward.net.0.proj": "feed_forward.w3 feed_forward.w1", "attention.to_out.0": "attention.to_out.0"}
    for name, targets in fused.items():
        paths = [f"layers.0.{t}" for t in targets.split()]
        n, k = model.get_submodule(paths[0]).weight.shape
        made = make_layer(rng, n * len(paths), k)
        tensors |= {f"layers.0.{name}.{f}": t for f, t in made.fields.items() if f != "bias"}
        for i, path in enumerate(paths):
            del tensors[f"{path}.weight"]
            model.get_submodule(path).weight.data = torch.from_numpy(made.dense[i * n : (i + 1) * n]).float()
    for block in ("noise_refiner.0", "context_refiner.0"):
        w1, w2, w3 = (tensors.pop(f"{block}.feed_forward.w{i}.weight") for i in (1, 2, 3))
        tensors[f"{block}.feed_forward.net.0.proj.weight"] = torch.cat([w3, w1])
        tensors[f"{block}.feed_forward.net.2.weight"] = w2.clone()
    config = {"_class_name": "NunchakuZImageTransformer2DModel"} | dict(model.config)
    save_file(tensors, tmp_path / "z.safetensors", metadata={"config": json.dumps(config)})
    got = mm.load_nunchaku(tmp_path / "z.safetensors", dtype=torch.float32)
    assert len(quantized(got)) == 7
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear):
            assert torch.allclose(got.get_submodule(name).weight, linear.weight, atol=1e-6), name


def test_an_sdxl_file(tmp_path):
    torch.manual_seed(0)
    rng = np.random.default_rng(5)
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=(2, 2), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
    ).eval()  # fmt: skip
    tensors, ending = dict(model.state_dict()), ("attn1.to_q", "attn2.to_q", "to_out.0", "ff.net.0.proj", "ff.net.2")
    for path in [name for name, _ in model.named_modules() if name.endswith(ending)]:
        targets = [path[:-1] + letter for letter in "qkv"] if path.endswith("attn1.to_q") else [path]
        n, k = model.get_submodule(path).weight.shape
        made = make_layer(rng, n * len(targets), k)
        fields = dict(made.fields)
        for i, target in enumerate(targets):
            rows = slice(i * n, (i + 1) * n)
            del tensors[f"{target}.weight"]
            model.get_submodule(target).weight.data = torch.from_numpy(made.dense[rows]).float()
            if tensors.pop(f"{target}.bias", None) is None:
                fields.pop("bias", None)
            else:
                model.get_submodule(target).bias.data = torch.from_numpy(made.plain_bias[rows]).float()
        name = path.replace("attn1.to_q", "attn1.to_qkv")
        tensors |= {f"{name}.{field}": tensor for field, tensor in fields.items()}
    config = {"_class_name": "NunchakuSDXLUNet2DConditionModel"} | dict(model.config)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"config": json.dumps(config)})
    got = mm.load_nunchaku(tmp_path / "x.safetensors", dtype=torch.float32, activation_bits=16)
    assert len(quantized(got)) == 8 * 4  # of four transformer blocks
    g = torch.Generator().manual_seed(0)
    inputs = (torch.randn(1, 4, 8, 8, generator=g), torch.tensor(3), torch.randn(1, 5, 32, generator=g))
    with torch.no_grad():
        assert relative(got(*inputs).sample, model(*inputs).sample) < 1e-4


# ---- nunchaku_lite --------------------------------------------------------------------------------------------------


def lite_folder(folder, *, fp4=False, change=None):
    """A folder as diffusers documents it, of a Flux whose widths are whole tiles; and the model it means."""
    torch.manual_seed(0)
    rng = np.random.default_rng(2)
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[16, 24, 24],
    ).eval()  # fmt: skip
    low = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.proj_out"]
    modulation = ["transformer_blocks.0.norm1.linear"]
    tensors = {}
    for path in low + modulation:
        linear = model.get_submodule(path)
        if path in modulation:
            dense, bias, fields = make_modulation(rng, linear.out_features, linear.in_features, 1)
        else:
            made = make_layer(rng, linear.out_features, linear.in_features, fp4=fp4, lite=True)
            dense, bias, fields = made.dense, made.bias, made.fields
        put(model, path, dense, bias)
        tensors |= {f"{path}.{name}": tensor for name, tensor in fields.items()}
    for key, tensor in model.state_dict().items():
        if key.rpartition(".")[0] not in low + modulation:
            tensors[key] = tensor.copy_(tensor.bfloat16()).bfloat16()
    kinds = {"precision": "nvfp4" if fp4 else "int4", "group_size": 16 if fp4 else 64, "rank": 16, "targets": low}
    quantization = {"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16", "svdq_w4a4": kinds}
    quantization["awq_w4a16"] = {"precision": "int4", "group_size": 64, "targets": modulation}
    config = {"_class_name": "FluxTransformer2DModel"} | dict(model.config) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, default=list))
    save_file(change(tensors) if change else tensors, folder / "diffusion_pytorch_model.safetensors")
    return model


@pytest.mark.parametrize("fp4", [False, True])
def test_a_nunchaku_lite_folder(tmp_path, fp4):
    meant = lite_folder(tmp_path, fp4=fp4)
    near = mm.load_nunchaku(tmp_path, dtype=torch.float32, activation_bits=16)
    assert relative(run(near), run(meant)) < (0.02 if fp4 else 1e-4)
    as_it_is = mm.load_nunchaku(tmp_path, dtype=torch.float32)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(run(loaded), run(as_it_is))
    loaded.save_pretrained(tmp_path / "ours")
    assert (
        json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]["quant_method"] == "svdquant"
    )
    assert torch.equal(run(FluxTransformer2DModel.from_pretrained(tmp_path / "ours")), run(as_it_is))


@pytest.mark.parametrize("how", ["mm", "diffusers"])
def test_nunchaku_lite_folders_that_do_not_fit(tmp_path, how):
    def load():
        if how == "mm":
            return mm.load_nunchaku(tmp_path)
        return FluxTransformer2DModel.from_pretrained(tmp_path)

    lite_folder(tmp_path, change=lambda tensors: tensors | {"nowhere.qweight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"does not fit FluxTransformer2DModel: nowhere(\.qweight \(no such| belongs)"):
        load()
    lite_folder(tmp_path, change=lambda t: {k: x for k, x in t.items() if k != "x_embedder.weight"})
    with pytest.raises(UserError, match=r"x_embedder\.weight is not in the f"):
        load()
