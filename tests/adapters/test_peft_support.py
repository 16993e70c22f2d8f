"""diffusers' and peft's LoRA calls on models that mm quantized: the sum they stand for, or an error before anything."""

from __future__ import annotations

import copy
import inspect

import diffusers
import pytest
import tiny_public
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import mm
from mm.adapters.patch import Entry, Patch
from mm.core.errors import UserError
from mm.layers.linear import BranchedLinear

pytestmark = pytest.mark.filterwarnings("ignore:patch .* does not say", "ignore:.*Already unmerged")


def empty(kind: type, **parts: nn.Module):
    """A pipeline of diffusers' class with these parts only."""
    names = [n for n, p in inspect.signature(kind.__init__).parameters.items() if n != "self" and p.default is p.empty]
    return kind(**(dict.fromkeys(names) | parts))


def sd3_inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=g),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=g),
        "pooled_projections": torch.randn(1, 64, generator=g),
        "timestep": torch.tensor([500.0]),
    }


def unet_inputs() -> dict:
    g = torch.Generator().manual_seed(0)
    added = {"text_embeds": torch.randn(1, 8, generator=g), "time_ids": torch.ones(1, 6)}
    return {
        "sample": torch.randn(1, 4, 16, 16, generator=g),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=g),
        "added_cond_kwargs": added,
    }


def qwen_inputs() -> dict:
    g = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 16, generator=g),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=g),
        "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.long),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
    }


CASES = {
    "flux": (diffusers.FluxPipeline, "transformer", tiny_public.flux, tiny_public.flux_inputs),
    "sd3": (diffusers.StableDiffusion3Pipeline, "transformer", tiny_public.sd3, sd3_inputs),
    "sdxl": (diffusers.StableDiffusionXLPipeline, "unet", tiny_public.unet, unet_inputs),
    "qwen": (diffusers.QwenImagePipeline, "transformer", tiny_public.qwen, qwen_inputs),
}


@pytest.fixture(params=CASES)
def case(request):
    """A pipeline with a 4-bit part, how to run it, and two LoRAs for it."""
    kind, part, make, inputs = CASES[request.param]
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    mm.quantize(model, mm.SVDQuantConfig(rank=4, data_free=True), progress=False)
    pipe = empty(kind, **{part: model})

    @torch.no_grad()
    def run() -> Tensor:
        return getattr(pipe, part)(**inputs(), return_dict=False)[0]

    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(("to_q", "to_v", "net.2"))]
    assert all(isinstance(model.get_submodule(n), BranchedLinear) for n in layers)

    def lora(seed: int) -> Patch:
        g = torch.Generator().manual_seed(seed)
        entries = {}
        for name in layers:
            layer = model.get_submodule(name)
            halves = {
                "down": torch.randn(3, layer.in_features, generator=g),
                "up": torch.randn(layer.out_features, 3, generator=g) / 8,
            }
            entries[f"{part}.{name}"] = Entry(kind="lowrank", tensors=halves)
        return Patch(entries=entries, name=f"p{seed}")

    return pipe, run, lora


def as_file(patch: Patch) -> dict[str, Tensor]:
    halves = {"lora_A": "down", "lora_B": "up"}
    return {f"{p}.{k}.weight": e.tensors[h] for p, e in patch.entries.items() for k, h in halves.items()}


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_diffusers_calls_do_on_4_bits_what_patches_do(case):
    pipe, run, lora = case
    before, first, second = run(), lora(1), lora(2)

    def same(one: Tensor, other: Tensor) -> None:
        """Sums in another order flip a few roundings of 8-bit inputs, which must stay far below what a LoRA changes."""
        assert (one - other).norm() < 0.02 * (other - before).norm()

    def with_patches(**scales: float) -> Tensor:
        chosen = [p for p in (first, second) if p.name in scales]
        for patch in chosen:
            patch.apply(pipe, scales[patch.name])
        out = run()
        for patch in chosen:
            patch.undo(pipe)
        return out

    want_one, want_both = with_patches(p1=1.0), with_patches(p1=0.5, p2=1.5)
    assert torch.equal(run(), before)
    assert (want_one - before).abs().max() > 1e-2
    pipe.load_lora_weights(as_file(first), adapter_name="one")
    same(run(), want_one)
    pipe.load_lora_weights(as_file(second), adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.5, 1.5])
    same(run(), want_both)
    pipe.fuse_lora()
    same(run(), want_both)
    pipe.unfuse_lora()
    same(run(), want_both)
    pipe.delete_adapters("two")
    pipe.set_adapters("one", 1.0)
    same(run(), want_one)
    pipe.fuse_lora(lora_scale=1.0)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(run(), before)


def test_what_was_fused_stays_when_the_adapter_is_unloaded(case):
    pipe, run, lora = case
    patch = lora(1)
    patch.apply(pipe, 0.7)
    want = run()
    patch.undo(pipe)
    pipe.load_lora_weights(as_file(patch), adapter_name="one")
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    same(run(), want)


@torch.no_grad()
def run_flux(model: nn.Module) -> Tensor:
    return model(**tiny_public.flux_inputs()).sample


def quantized_flux() -> nn.Module:
    torch.manual_seed(0)
    model = tiny_public.flux().eval()
    mm.quantize(model, mm.SVDQuantConfig(rank=4, data_free=True), progress=False)
    return model


def with_peft(model: nn.Module, **settings):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **settings)).eval()


def test_pefts_merge_and_unload_keeps_the_lora_on_4_bits(tmp_path):
    model = quantized_flux()
    before = run_flux(model)
    wrapped = with_peft(model, target_modules=["to_q", "proj_out", "linear"])
    want = run_flux(wrapped)
    assert not torch.allclose(want, before, atol=1e-2)
    merged = wrapped.merge_and_unload()
    same(run_flux(merged), want)
    with pytest.warns(UserWarning, match="saved without what is applied to it: 'merged default'"):
        merged.save_pretrained(tmp_path)


def test_what_cannot_be_merged_raises_before_anything_is():
    wrapped = with_peft(quantized_flux(), target_modules=["x_embedder", "to_q"], use_dora=True)
    before, weight = run_flux(wrapped), wrapped.base_model.model.x_embedder.base_layer.weight.clone()
    with pytest.raises(UserError, match=r"to_q: adapter 'default' has DoRA"):
        wrapped.merge_and_unload()
    with pytest.raises(UserError, match="DoRA"):
        wrapped.merge_adapter()
    assert torch.equal(wrapped.base_model.model.x_embedder.base_layer.weight, weight)
    assert torch.equal(run_flux(wrapped), before)


def test_the_weight_of_a_quantized_layer_takes_no_writing():
    layer = quantized_flux().transformer_blocks[0].attn.to_q
    assert isinstance(layer, BranchedLinear)
    change = torch.ones(32, 32)
    with pytest.raises(UserError, match="quantized weights, which take no merging"):
        layer.weight.data += change
    with pytest.raises(UserError, match="quantized weights"):
        layer.weight.data = change
    with pytest.raises(UserError, match="quantized weights"):
        layer.weight.add_(change)
    assert type(layer.weight + change) is Tensor
    assert copy.deepcopy(layer).weight.shape == (32, 32)


def test_peft_does_not_merge_into_a_weight_that_patches_changed():
    torch.manual_seed(0)
    model = tiny_public.flux().eval()
    place = "transformer_blocks.0.attn.to_q"
    patch = Patch(entries={place: Entry(kind="dense", tensors={"delta": torch.randn(32, 32)})}, name="dense")
    patch.apply(model)
    wrapped = with_peft(model, target_modules=["to_k", "to_q"])
    with pytest.raises(UserError, match=r"patches \('dense'\) have changed the weight"):
        wrapped.merge_adapter()
    patch.undo(wrapped)
    wrapped.merge_adapter()
