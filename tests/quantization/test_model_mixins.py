"""What diffusers' models do plain, they do quantized: each check runs on both.

The kinds follow diffusers' own common tests of models: saving, types, device maps, offloading, casting, compiling,
exporting, copying and gradient checkpointing. LoRA calls are in tests/adapters/test_peft_support.py.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from tiny_public import flux, flux_inputs, sd3, unet
from torch import Tensor, nn

import mm
from mm.layers.linear import BranchedLinear

CPU = torch.device("cpu")


def sd3_inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=g),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=g),
        "pooled_projections": torch.randn(1, 64, generator=g),
        "timestep": torch.tensor([500.0]),
    }


def unet_inputs() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    added = {"text_embeds": torch.randn(1, 8, generator=g), "time_ids": torch.ones(1, 6)}
    return {
        "sample": torch.randn(1, 4, 16, 16, generator=g),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=g),
        "added_cond_kwargs": added,
    }


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "flux": (flux, flux_inputs), "sd3": (sd3, sd3_inputs), "sdxl": (unet, unet_inputs)
}  # fmt: skip
NEAR = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=[(name, bits) for name in MODELS for bits in (16, 4)], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request: pytest.FixtureRequest) -> tuple[Any, Callable[[Any], Tensor]]:
    """A model, plain or quantized, and how it is run."""
    name, bits = request.param
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    if bits == 4:
        mm.quantize(model, mm.SVDQuantConfig(rank=4, data_free=True), progress=False)
        assert sum(isinstance(m, BranchedLinear) and m.bits == 4 for m in model.modules()) > 5

    @torch.no_grad()
    def run(other: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return other(**_cast(inputs(), dtype), return_dict=False)[0].float()

    return model, run


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


def test_saving_whole_and_in_shards(case: Any, tmp_path: Path) -> None:
    model, run = case
    want = run(model)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("whole", "shards"):
        again = type(model).from_pretrained(tmp_path / folder).eval().requires_grad_(False)
        torch.testing.assert_close(run(again), want, **NEAR)
        assert sorted(again.state_dict()) == sorted(model.state_dict())


def test_other_types(case: Any, tmp_path: Path) -> None:
    model, run = case
    want = run(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert loaded.dtype == torch.bfloat16
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for other in (loaded, model):
        assert (run(other, torch.bfloat16) - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_device_maps(case: Any, tmp_path: Path, place: str) -> None:
    model, run = case
    want = run(model)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "offload").mkdir()
    blocks = [name for name, _ in model.named_children()]
    layout = dict.fromkeys(blocks, "cpu") | {blocks[-1]: place}
    options = {"device_map": layout, "offload_folder": tmp_path / "offload"}
    again = type(model).from_pretrained(tmp_path / "model", **options).eval().requires_grad_(False)
    torch.testing.assert_close(run(again), want, **NEAR)


def leaves(model: nn.Module, folder: Path) -> None:
    apply_group_offloading(model, CPU, CPU, offload_type="leaf_level", offload_to_disk_path=str(folder))


def blocks(model: nn.Module, folder: Path) -> None:
    options = {"num_blocks_per_group": 1, "offload_to_disk_path": str(folder)}
    apply_group_offloading(model, CPU, CPU, offload_type="block_level", **options)


def accelerates(model: nn.Module, folder: Path) -> None:
    cpu_offload(model, CPU, offload_buffers=True)


@pytest.mark.parametrize("way", [leaves, blocks, accelerates])
def test_offloading(case: Any, tmp_path: Path, way: Callable) -> None:
    model, run = case
    want = run(model)
    way(model, tmp_path)
    for _ in range(2):  # tensors from a file are aligned otherwise, which may flip a rounding of inputs
        assert (run(model) - want).norm() < 1e-2 * want.norm()


def test_casting_by_layer(case: Any) -> None:
    """Weights stored in 8 bits: a plain layer is rounded, a quantized one stays as it is."""
    model, run = case
    want, integers = run(model), {n: t for n, t in model.state_dict().items() if n.endswith("qweight")}
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    got = run(model)
    assert got.isfinite().all()
    assert (got - want).norm() < 0.5 * want.norm()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in integers.items())
    assert all(after[n].dtype.itemsize > 1 for n in after if n.endswith("weight_scales"))


def test_compiling_and_exporting(case: Any) -> None:
    model, run = case
    want = run(model)
    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(model, backend="eager", fullgraph=True)), want, **NEAR)
    if hasattr(model, "compile_repeated_blocks") and model._repeated_blocks:
        torch._dynamo.reset()
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        torch.testing.assert_close(run(model), want, **NEAR)


def test_copies(case: Any) -> None:
    model, run = case
    want = run(model)
    torch.testing.assert_close(run(copy.deepcopy(model)), want, **NEAR)
    torch.testing.assert_close(run(pickle.loads(pickle.dumps(model))), want, **NEAR)


def test_gradient_checkpointing_gives_the_gradients_of_without(case: Any) -> None:
    model, _ = case
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    names = {"FluxTransformer2DModel": "flux", "SD3Transformer2DModel": "sd3", "UNet2DConditionModel": "sdxl"}
    inputs = MODELS[names[type(model).__name__]][1]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model.train()
        model(**inputs(), return_dict=False)[0].square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    assert len(plain) > 4
    assert any(g.abs().max() > 0 for g in plain)
    model.enable_gradient_checkpointing()
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other, **NEAR)
