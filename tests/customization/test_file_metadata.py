"""What LoRA files say of themselves is true of their tensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_pipelines import draw_with, tiny_pipeline_of

from mm.adapters.entry import Entry
from mm.customization.learned import Learned
from mm.customization.merging.files import read_adapter

pytestmark = pytest.mark.filterwarnings("ignore")
DOUBLE = "transformer.transformer_blocks.0.attn."
FLUX_2 = (f"{DOUBLE}to_q", f"{DOUBLE}to_out.0", "transformer.single_transformer_blocks.0.attn.to_out")


def _learned(pipe: Any, family: str, paths: tuple[str, ...], kind: str = "lowrank", ranks: int = 1) -> Learned:
    """Products in 16 bits, a magnitude in 32, as training gives them."""
    made, entries = torch.Generator().manual_seed(3), {}
    for k, path in enumerate(paths):
        component, _, below = path.partition(".")
        layer = getattr(pipe, component).get_submodule(below)
        rank = 2 + k % ranks
        tensors = {
            "down": torch.randn(rank, layer.in_features, generator=made).half() / 8,
            "up": torch.randn(layer.out_features, rank, generator=made).half() / 8,
        }
        if kind == "dora":
            tensors["magnitude"] = layer.weight.float().norm(dim=1) * 1.2
        entries[path] = Entry(kind=kind, tensors=tensors)  # type: ignore[arg-type]
    return Learned(entries=entries, name="mug", family=family, settings={"name": "sks mug", "size": 512})


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as read:
        return dict(read.metadata())


@pytest.mark.parametrize(("kind", "ranks"), [("dora", 1), ("lowrank", 3)])
def test_plain_diffusers_draws_with_dora_and_mixed_ranks_on_flux_2(kind: str, ranks: int, tmp_path: Path) -> None:
    """Its `to_out` without a number is renamed where a magnitude is the file's first tensor."""
    pipe, file = tiny_pipeline_of("flux-2"), tmp_path / "x.safetensors"
    learned = _learned(pipe, "flux-2", FLUX_2, kind, ranks)
    learned.write(file)
    learned.apply(pipe)
    wanted = draw_with("flux-2", pipe)
    learned.undo(pipe)
    assert not torch.allclose(draw_with("flux-2", pipe), wanted, atol=1e-3)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    assert torch.allclose(draw_with("flux-2", pipe), wanted, atol=1e-5)
    meta = _metadata(file)
    settings = json.loads(meta["lora_adapter_metadata"])
    assert meta["ss_network_dim"] == meta["ss_network_alpha"] == str(settings["transformer.r"]) == str(1 + ranks)
    assert settings.get("transformer.use_dora", False) == (kind == "dora")
    assert len(settings["transformer.rank_pattern"]) == ranks - 1
    assert settings["transformer.target_modules"] == sorted(path.partition(".")[2] for path in FLUX_2)


def test_ranks_of_joined_layers_and_hashes(tmp_path: Path) -> None:
    """kohya's scripts know q, k and v of FLUX as one layer, of the sum of their ranks."""
    pipe = tiny_pipeline_of("flux")
    learned = _learned(pipe, "flux", tuple(f"{DOUBLE}to_{letter}" for letter in "qkv"))
    for layout, rank in (("kohya", 6), ("comfyui", 6), ("diffusers", 2)):
        file = tmp_path / f"{layout}.safetensors"
        learned.write(file, layout, target=pipe)  # type: ignore[arg-type]
        meta, tensors = _metadata(file), load_file(file)
        alphas = {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")} or {float(rank)}
        assert {float(meta["ss_network_alpha"])} == alphas
        assert meta["ss_network_dim"] == str(rank)
        assert {len(t) for key, t in tensors.items() if key.endswith((".lora_down.weight", ".lora_A.weight"))} == {rank}
        data = file.read_bytes()
        found = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
        assert meta["sshs_model_hash"] == found and meta["modelspec.hash_sha256"] == f"0x{found}"


@pytest.mark.parametrize(
    ("width", "size", "architecture", "version"),
    [
        (768, 512, "stable-diffusion-v1", "sd_v1"),
        (1024, 512, "stable-diffusion-v2-512", "sd_v2"),
        (1024, 768, "stable-diffusion-v2-768-v", "sd_v2"),
    ],
)
def test_stable_diffusion_1_and_2_are_told_apart(
    width: int, size: int, architecture: str, version: str, tmp_path: Path
) -> None:
    tensors = {"down": torch.ones(2, width), "up": torch.ones(4, 2)}
    entries = {"unet.attn2.to_k": Entry(kind="lowrank", tensors=tensors)}
    file = tmp_path / "x.safetensors"
    Learned(entries=entries, base="x", family="stable-diffusion", settings={"size": size}).write(file)
    meta = _metadata(file)
    assert meta["modelspec.architecture"] == f"{architecture}/lora"
    assert (meta["ss_base_model_version"], meta["ss_v2"]) == (version, str(width == 1024))
    read = read_adapter(file)
    assert isinstance(read, Learned) and read.family == "stable-diffusion"


def test_a_file_for_xl_says_so(tmp_path: Path) -> None:
    """A1111's web UI hides files for other models, and takes one that does not say its model for Stable Diffusion 1."""
    pipe, file = tiny_pipeline_of("stable-diffusion-xl"), tmp_path / "x.safetensors"
    paths = ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",)
    for layout in ("diffusers", "kohya"):
        _learned(pipe, "stable-diffusion-xl", paths).write(file, layout, target=pipe)  # type: ignore[arg-type]
        meta = _metadata(file)
        assert meta["ss_base_model_version"] == "sdxl_base_v1-0" and "ss_v2" not in meta
