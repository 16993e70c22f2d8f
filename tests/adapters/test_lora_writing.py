"""What mm writes as a LoRA is read again as the same patch, and by peft and diffusers with the same effect."""

from __future__ import annotations

import pytest
import torch
from lora_families import FAMILIES, fresh, noise, pipeline_of, run
from peft import PeftModel
from safetensors.torch import load_file

import mm
from mm.adapters.patch import Entry, Patch
from mm.core.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
LAYOUTS = ("diffusers", "peft", "kohya", "comfyui")


def patch_for(family: str, model, prefix: str = "", ranks: int = 2) -> Patch:
    """Products of different ranks and scales on the layers that peft adapts in the table."""
    entries = {}
    for seed, path in enumerate(FAMILIES[family].linears):
        layer, rank = model.get_submodule(path), 2 + seed % ranks
        down, up = noise(rank, layer.in_features, seed=seed), noise(layer.out_features, rank, seed=seed + 50)
        tensors = {"down": down / layer.in_features**0.5, "up": up}
        entries[prefix + path] = Entry(kind="lowrank", tensors=tensors, scale=0.5 + seed / 10)
    return Patch(entries=entries)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_file_is_the_same_patch(family, layout, tmp_path):
    model = fresh(family)
    pipe = pipeline_of(family, model)
    patch = patch_for(family, model, f"{FAMILIES[family].part}.")
    patch.apply(pipe)
    want = run(family, model)
    patch.undo(pipe)
    file = tmp_path / "adapter_model.safetensors"
    mm.write_lora(patch, file, layout, target=pipe)
    again = mm.read_lora(file, pipe)
    assert set(again.entries) >= set(patch.entries)
    again.apply(pipe)
    torch.testing.assert_close(run(family, model), want, atol=1e-4, rtol=1e-4)
    if layout == "peft":
        wrapped = PeftModel.from_pretrained(fresh(family), str(tmp_path))
        torch.testing.assert_close(run(family, wrapped.eval()), want, atol=1e-4, rtol=1e-4)
    reads = layout == "diffusers" or (layout == "kohya" and FAMILIES[family].part == "unet")
    if reads or (layout == "kohya" and family == "Qwen-Image"):
        other = fresh(family)
        pipeline_of(family, other).load_lora_weights(load_file(file), adapter_name="a")
        torch.testing.assert_close(run(family, other.eval()), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_base_of_a_patch_is_written(layout, tmp_path):
    model, file = fresh("SD 1.5"), tmp_path / "w.safetensors"
    patch = patch_for("SD 1.5", model, "unet.")
    patch.base = "the base's hash"
    pipe = pipeline_of("SD 1.5", model)
    mm.write_lora(patch, file, layout, target=pipe)
    assert mm.read_lora(file, pipe).base == patch.base


@pytest.mark.parametrize("layout", ["mm", *LAYOUTS])
def test_a_lora_on_a_fused_layer_is_written(layout, tmp_path):
    """Its parts share one half in memory, which safetensors refuses to write."""
    pipe = pipeline_of("FLUX", fresh("FLUX"))
    halves = {"down": noise(2, 32), "up": noise(96, 2, seed=1)}
    patch = mm.read_lora(
        {f"lora_unet_double_blocks_0_img_attn_qkv.lora_{k}.weight": t for k, t in halves.items()}, pipe
    )
    file = tmp_path / "adapter_model.safetensors"
    if layout == "mm":
        patch.save(file)
    else:
        mm.write_lora(patch, file, layout, target=pipe)
    again = Patch.load(file) if layout == "mm" else mm.read_lora(file, pipe)
    assert len(again.entries) == 3
    for number, name in enumerate(("to_q", "to_k", "to_v")):
        entry = again.entries[f"transformer.transformer_blocks.0.attn.{name}"]
        made = entry.scale * entry.tensors["up"] @ entry.tensors["down"]
        torch.testing.assert_close(made, (halves["up"] @ halves["down"])[32 * number : 32 * (number + 1)])


def test_names_of_the_original_code_are_written(tmp_path):
    model = fresh("FLUX")
    patch = mm.read_lora({"double_blocks.0.img_attn.qkv.lora_down.weight": noise(2, 32),
                          "double_blocks.0.img_attn.qkv.lora_up.weight": noise(96, 2),
                          "final_layer.adaLN_modulation.1.lora_down.weight": noise(2, 32),
                          "final_layer.adaLN_modulation.1.lora_up.weight": noise(64, 2)}, model)  # fmt: skip
    for layout, stem in (("comfyui", "diffusion_model.double_blocks.0.img_attn.qkv"),
                         ("kohya", "lora_unet_double_blocks_0_img_attn_qkv")):  # fmt: skip
        mm.write_lora(patch, tmp_path / "w.safetensors", layout, target=model)
        tensors = load_file(tmp_path / "w.safetensors")
        assert len(tensors) == 6
        assert torch.equal(tensors[f"{stem}.lora_up.weight"], noise(96, 2))
        assert torch.equal(tensors[f"{stem}.lora_down.weight"], noise(2, 32))
        again = mm.read_lora(tensors, model)
        for path, entry in patch.entries.items():
            for key, tensor in entry.tensors.items():
                torch.testing.assert_close(again.entries[path].tensors[key], tensor)


def test_whole_weights_and_biases_go_into_the_layouts_that_hold_them(tmp_path):
    model, path, file = fresh("SD 1.5"), "down_blocks.0.resnets.0.conv1", tmp_path / "w.safetensors"
    patch = mm.read_lora({f"{path}.diff": noise(8, 8, 3, 3), f"{path}.diff_b": noise(8)}, model)
    for layout in ("kohya", "comfyui"):
        mm.write_lora(patch, file, layout, target=model)
        again = mm.read_lora(file, model)
        assert set(again.entries) == {path, f"{path}.bias"}
        assert torch.equal(again.entries[path].tensors["delta"], noise(8, 8, 3, 3))
    file.unlink()
    for layout in ("peft", "diffusers"):
        with pytest.raises(UserError, match=r"kind 'dense', which .* does not hold"):
            mm.write_lora(patch, file, layout)
    assert not file.exists()
    entries = patch_for("SD 1.5", model).entries
    first = next(iter(entries))
    biased = Patch(entries=entries | {f"{first}.bias": Entry(kind="bias", tensors={"delta": noise(8)}, scale=0.5)})
    mm.write_lora(biased, file, "diffusers")
    assert torch.equal(mm.read_lora(file, model).entries[f"{first}.bias"].tensors["delta"], 0.5 * noise(8))


def test_what_no_file_holds_is_refused(tmp_path):
    turn = Patch(entries={"proj_out": Entry(kind="rotation", tensors={"rotation": torch.eye(4)})})
    scoped = Patch(entries={"proj_out": Entry(kind="lowrank", tensors={"down": noise(1, 32), "up": noise(4, 1)},
                                              scope="text")})  # fmt: skip
    plain = patch_for("FLUX", fresh("FLUX"))
    for patch, layout, message in (
        (turn, "kohya", "kind 'rotation', which no LoRA file holds"), (scoped, "kohya", "for text tokens only"),
        (Patch(entries={}), "peft", "the patch is empty"), (plain, "bin", "the layout is 'bin'"),
        (plain, "comfyui", "give target="),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            mm.write_lora(patch, tmp_path / "w.safetensors", layout)
    assert not list(tmp_path.iterdir())
