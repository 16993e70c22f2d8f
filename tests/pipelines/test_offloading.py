"""Offloading, casting and checkpointing of every pipeline: a method that uses weights runs within their hooks.

All tests run on a CPU. What would stay unnoticed there is made visible: accelerate's offload leaves no weights at all
between calls, and group offloading to the disk empties them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from PIL import Image
from tiny import draw, seeded, tiny_pipeline, tiny_reader
from torch import nn

import mm
from mm import ImageEditPipeline, UnderstandingPipeline
from mm.layers.linear import BranchedLinear

CPU = torch.device("cpu")
PICTURE = Image.new("RGB", (128, 128), (200, 60, 30))


def with_reader(kind: type) -> Any:
    """A pipeline of random parts that reads."""
    parts = tiny_reader()
    return kind(**{name: parts[name] for name in inspect.signature(kind.__init__).parameters if name in parts})


def quantized() -> Any:
    pipe = tiny_pipeline()
    mm.quantize(pipe, mm.SVDQuantConfig(rank=4, data_free=True, smooth=False), progress=False)
    assert any(isinstance(m, BranchedLinear) for m in pipe.trunk.modules())
    return pipe


def edited(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(PICTURE, "make it red", generator=seeded(7)[0], num_inference_steps=2, output_type="pt").images


def probabilities(pipe: Any) -> torch.Tensor:
    """Logits of a reply, where words would hide small differences."""
    pixels = torch.linspace(-1, 1, 3 * 128 * 128).view(1, 3, 128, 128)
    tokens = pipe.understanding_connector(pipe.understanding_encoder(pixels)[1])
    count = pipe.understanding_connector.tokens_per_picture
    ids = torch.tensor([[2] + [pipe.trunk.config.understanding_token] * count + [9, 8]])
    with torch.no_grad():
        return pipe.trunk.read(ids, None, tokens)[0]


RUNS: dict[str, tuple[Callable[[], Any], Callable[[Any], torch.Tensor]]] = {
    "flow": (tiny_pipeline, lambda pipe: draw(pipe, num_inference_steps=2)),
    "codes": (tiny_pipeline, lambda pipe: draw(pipe, mode="codes")),
    "quantized": (quantized, lambda pipe: draw(pipe, num_inference_steps=2)),
    "edit": (lambda: with_reader(ImageEditPipeline), edited),
    "read": (lambda: with_reader(UnderstandingPipeline), probabilities),
}


def parts_of(pipe: Any) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def group_leaves(pipe: Any, folder: Path) -> None:
    for k, part in enumerate(parts_of(pipe)):
        place = str(folder / str(k))
        apply_group_offloading(part, CPU, CPU, offload_type="leaf_level", offload_to_disk_path=place)


def group_blocks(pipe: Any, folder: Path) -> None:
    for k, part in enumerate(parts_of(pipe)):
        place = str(folder / str(k))
        options = {"offload_type": "block_level", "num_blocks_per_group": 1, "offload_to_disk_path": place}
        apply_group_offloading(part, CPU, CPU, **options)


def pipeline_groups(pipe: Any, folder: Path) -> None:
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def model_offload(pipe: Any, folder: Path) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def accelerates(pipe: Any, folder: Path) -> None:
    for part in parts_of(pipe):
        cpu_offload(part, CPU, offload_buffers=True)
        assert all(p.device.type == "meta" for p in part.parameters())


def checkpointing(pipe: Any, folder: Path) -> None:
    pipe.trunk.enable_gradient_checkpointing()


WAYS = (group_leaves, group_blocks, pipeline_groups, model_offload, accelerates, checkpointing)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", RUNS)
def test_offloaded_pipelines_give_what_they_give_on_the_device(name: str, way: Callable, tmp_path: Path) -> None:
    make, run = RUNS[name]
    want, pipe = run(make()), make()
    way(pipe, tmp_path)
    for _ in range(2):  # what is offloaded after the first run comes back
        torch.testing.assert_close(run(pipe), want, atol=1e-5, rtol=1e-5)  # weights from a file are aligned otherwise


@pytest.mark.parametrize("name", RUNS)
def test_weights_stored_in_8_bits_are_cast_wherever_they_are_used(name: str) -> None:
    make, run = RUNS[name]
    pipe, plain = make(), make()
    for part, other in zip(parts_of(pipe), parts_of(plain), strict=True):
        part.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        stored = dict(part.named_parameters())
        for path, parameter in other.named_parameters():
            parameter.data = stored[path].data.to(parameter.dtype)
    assert any(p.dtype == torch.float8_e4m3fn for part in parts_of(pipe) for p in part.parameters())
    torch.testing.assert_close(run(pipe), run(plain), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["trunk", "velocity_decoder", "code_head", "autoencoder", "bridge"])
def test_models_know_return_dict(name: str) -> None:
    model = getattr(tiny_pipeline(), name)
    inputs = _inputs(model, name)
    with torch.no_grad():
        plain = model(*inputs)
        assert torch.equal(model(*inputs, return_dict=False)[0], plain)
        assert torch.equal(model(*inputs, return_dict=True).sample, plain)
    assert "return_dict" in inspect.signature(model.forward).parameters


def test_the_encoder_names_its_two_outputs() -> None:
    encoder = tiny_reader()["understanding_encoder"]
    pictures = torch.zeros(1, 3, 128, 128)
    with torch.no_grad():
        pooled, tokens = encoder(pictures, return_dict=False)
        named = encoder(pictures, return_dict=True)
    assert torch.equal(named.pooled, pooled)
    assert torch.equal(named.tokens, tokens)


def _inputs(model: Any, name: str) -> tuple[Any, ...]:
    latents, sigma = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    if name == "trunk":
        return latents, sigma, model.encode_text(torch.tensor([[2, 20, 21]]))
    return {
        "velocity_decoder": (latents, sigma, torch.ones(1, 64, 32)),
        "code_head": (torch.ones(3, 32), torch.zeros(3, 16, dtype=torch.int64)),
        "autoencoder": (torch.zeros(1, 3, 128, 128),),
        "bridge": (latents,),
    }[name]
