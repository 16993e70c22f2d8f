"""A published Nunchaku file of a tiny FLUX, packed number by number, and the dense model that it means."""

from __future__ import annotations

import json

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from nunchaku_packer import make_layer, make_modulation, put
from safetensors.torch import save_file

# file's layer: (second version's name, diffusers' layers)
DOUBLE = {
    "qkv_proj": ("attn.to_qkv", "attn.to_q attn.to_k attn.to_v"),
    "qkv_proj_context": ("attn.add_qkv_proj", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
    "out_proj": ("attn.to_out.0", "attn.to_out.0"),
    "out_proj_context": ("attn.to_add_out", "attn.to_add_out"),
    "mlp_fc1": ("ff.net.0.proj", "ff.net.0.proj"),
    "mlp_fc2": ("ff.net.2", "ff.net.2"),
    "mlp_context_fc1": ("ff_context.net.0.proj", "ff_context.net.0.proj"),
    "mlp_context_fc2": ("ff_context.net.2", "ff_context.net.2"),
}
SINGLE = {
    "qkv_proj": ("attn.to_qkv", "attn.to_q attn.to_k attn.to_v"),
    "out_proj": ("attn.to_out", "proj_out"),
    "mlp_fc1": ("mlp_fc1", "proj_mlp"),
    "mlp_fc2": ("mlp_fc2", "proj_out"),
}
FIRST_FIELDS = {"proj_down": "lora_down", "proj_up": "lora_up", "smooth_factor": "smooth"}
FIRST_FIELDS |= {"smooth_factor_orig": "smooth_orig"}


def flux():
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[8, 12, 12],
    ).eval()  # fmt: skip


def published(version=1, fp4=False):
    """(tensors of a file, the 16-bit model that they mean)."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = flux()
    tensors = {}

    def add(prefix, fields):
        for name, tensor in fields.items():
            tensors[f"{prefix}.{FIRST_FIELDS.get(name, name) if version == 1 else name}"] = tensor

    for path, table in [
        ("transformer_blocks.0", DOUBLE),
        *[(f"single_transformer_blocks.{i}", SINGLE) for i in (0, 1)],
    ]:
        for first, (second, targets) in table.items():
            layers = [model.get_submodule(f"{path}.{t}") for t in targets.split()]
            joint = targets == "proj_out"
            k = layers[0].in_features if not joint else 64 if first == "out_proj" else 256
            made = make_layer(rng, 64 * len(layers) if not first.endswith("fc1") else 256, k, fp4=fp4,
                              unsigned=first.endswith("fc2"))  # fmt: skip
            add(f"{path}.{first if version == 1 else second}", made.fields)
            size = len(made.codes) // len(layers)
            for i, target in enumerate(targets.split()):
                rows = slice(i * size, (i + 1) * size)
                columns = (slice(0, 64) if first == "out_proj" else slice(64, 320)) if joint else slice(None)
                put(model, f"{path}.{target}", made.dense[rows], made.plain_bias[rows], columns,
                    add=joint and first == "mlp_fc2")  # fmt: skip
        for name in ("norm1.linear", "norm1_context.linear") if table is DOUBLE else ("norm.linear",):
            linear = model.get_submodule(f"{path}.{name}")
            dense, bias, fields = make_modulation(rng, linear.out_features, 64, linear.out_features // 64)
            add(f"{path}.{name}", fields)
            put(model, f"{path}.{name}", dense, bias)
    taken = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "blocks." in n]
    for key, tensor in model.state_dict().items():
        if key.rpartition(".")[0] not in taken:
            tensors[key.replace(".attn.", ".") if version == 1 else key] = tensor.bfloat16()
            tensor.copy_(tensor.bfloat16())
    return tensors, model


def write(path, tensors, model):
    config = {"_class_name": "NunchakuFluxTransformer2dModel"} | dict(model.config)
    save_file(tensors, path, metadata={"config": json.dumps(config, default=list)})
    return path
