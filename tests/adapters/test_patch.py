"""Patches on and off, in files, on 16-bit and 4-bit models; LoRA files of others against peft's own arithmetic."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import draw, tiny_pipeline
from tiny_public import flux, flux_inputs, unet
from torch import nn

import mm
from mm import read_lora, write_lora
from mm.adapters.factors import whole_change
from mm.adapters.patch import Entry, Patch
from mm.core.errors import UserError
from mm.layers.base_hash import base_hash
from mm.layers.linear import Branch, BranchedLinear
from mm.layers.surgery import branched

pytestmark = pytest.mark.filterwarnings("ignore:patch .* does not say")

DATA_FREE = mm.SVDQuantConfig(rank=4, data_free=True)


@torch.no_grad()
def run(model) -> torch.Tensor:
    return model.eval()(**flux_inputs()).sample


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return flux()


def entry(outputs: int, inputs: int, scale: float = 1.0) -> Entry:
    return Entry(kind="lowrank", tensors={"down": torch.randn(2, inputs), "up": torch.randn(outputs, 2)}, scale=scale)


def some_patch(**fields) -> Patch:
    entries = {"transformer_blocks.0.attn.to_q": entry(32, 32), "single_transformer_blocks.0.proj_mlp": entry(128, 32)}
    return Patch(entries=entries, **fields)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_patch_goes_on_scales_and_comes_off(model, bits, tmp_path):
    base = base_hash(model)
    if bits == 4:
        mm.quantize(model, DATA_FREE, progress=False)
    before = run(model)
    some_patch(base=base, report={"note": 3}).save(tmp_path / "p.safetensors")
    patch = Patch.load(tmp_path / "p.safetensors")
    assert patch.report == {"note": 3}
    assert str(patch.apply(model)) == "4 of 4 tensors applied to 2 layers"
    assert patch.verify(model) == "4 of 4 tensors applied"
    full = run(model)
    assert not torch.equal(full, before)
    patch.scale(model, 0.0)
    torch.testing.assert_close(run(model), before, atol=1e-5, rtol=1e-5)
    patch.scale(model, 1.0)
    torch.testing.assert_close(run(model), full, atol=1e-5, rtol=1e-5)
    patch.undo(model)
    assert torch.equal(run(model), before)
    with pytest.raises(UserError, match="2 layers lack patch"):
        patch.verify(model)


def test_baking_is_what_the_branch_does(model):
    patch, twin = some_patch(), copy.deepcopy(model)
    patch.apply(model, scale=0.5)
    patch.bake(twin, scale=0.5)
    torch.testing.assert_close(run(model), run(twin), atol=1e-4, rtol=1e-4)


def test_nothing_is_applied_where_something_does_not_fit(model):
    before = run(model)
    wrong = some_patch()
    wrong.entries["nowhere.to_q"] = entry(4, 4)
    with pytest.raises(UserError, match=r"2 of 3 layers .* not: nowhere.to_q \(no such layer\)"):
        wrong.apply(model)
    shape = some_patch()
    shape.entries["proj_out"] = entry(9, 32)
    with pytest.raises(UserError, match=r"proj_out \(made for \(9, 32\), this is \(4, 32\)\)"):
        shape.apply(model)
    with pytest.raises(UserError, match="the patch is empty"):
        Patch(entries={}).apply(model)
    assert torch.equal(run(model), before)


def test_the_base_is_known_by_its_hash_and_a_quantized_model_keeps_it(model):
    base = base_hash(model)
    quantized = copy.deepcopy(model)
    mm.quantize(quantized, DATA_FREE, progress=False)
    assert base_hash(quantized) == base
    with torch.no_grad():
        model.proj_out.weight += 1
    assert base_hash(model) != base
    with pytest.warns(UserWarning, match="made for another base"):
        some_patch(base=base).apply(model)
    some_patch(base=base).apply(quantized)


def test_dense_rotation_and_rows(model):
    before, delta = run(model), torch.randn(32, 32) @ torch.diag(torch.tensor([1.0, 0.5] + [1e-3] * 30)) / 6
    turn = torch.linalg.qr(torch.randn(32, 32))[0]
    patch = Patch(
        entries={
            "transformer_blocks.0.attn.to_q": Entry(kind="dense", tensors={"delta": delta}),
            "transformer_blocks.0.attn.to_k": Entry(kind="rotation", tensors={"rotation": turn}),
        }
    )
    weights = [
        model.transformer_blocks[0].attn.to_q.weight.clone(),
        model.transformer_blocks[0].attn.to_k.weight.clone(),
    ]
    patch.apply(model)
    torch.testing.assert_close(model.transformer_blocks[0].attn.to_q.weight.detach(), weights[0] + delta)
    torch.testing.assert_close(model.transformer_blocks[0].attn.to_k.weight.detach(), turn @ weights[1])
    patch.undo(model)
    assert torch.equal(run(model), before)
    mm.quantize(model, DATA_FREE, progress=False)
    with pytest.raises(UserError, match="cannot go onto 4-bit weights"):
        patch.apply(model)
    dense = Patch(entries={k: e for k, e in patch.entries.items() if e.kind == "dense"})
    thin = dense.truncated(2)
    assert thin.report["truncated"]["transformer_blocks.0.attn.to_q"] < 0.05
    assert str(thin.apply(model)) == "2 of 2 tensors applied to 1 layer"


def test_what_does_not_go_onto_4_bits_says_how_it_does(model, tmp_path):
    """The message said "kron changes ...; truncate them", for each layer, and no command does that."""
    factors = {"first": torch.randn(4, 4), "second": torch.randn(8, 8)}
    Patch(entries={"transformer_blocks.0.attn.to_q": Entry(kind="kron", tensors=factors)}).save(tmp_path / "a")
    mm.quantize(model, DATA_FREE, progress=False)
    with pytest.raises(UserError, match=r"LoKr, a change of the whole .*16-bit model, or .*truncated\(RANK") as refusal:
        Patch.load(tmp_path / "a").apply(model)
    assert str(refusal.value).count("truncated") == 1
    mm.Patch.load(tmp_path / "a").truncated(4, model).save(tmp_path / "b")  # as it says
    assert str(Patch.load(tmp_path / "b").apply(model)) == "2 of 2 tensors applied to 1 layer"


def test_rows_go_into_embeddings_and_come_out():
    table = nn.ModuleDict({"words": nn.Embedding(6, 4)})
    before = table["words"].weight.clone()
    rows = Entry(kind="rows", tensors={"ids": torch.tensor([1, 4]), "rows": torch.ones(2, 4)})
    patch = Patch(entries={"words": rows})
    patch.apply(table)
    assert table["words"].weight[[1, 4]].eq(1).all()
    patch.undo(table)
    assert torch.equal(table["words"].weight, before)
    with pytest.raises(UserError, match="words"):
        Patch(
            entries={"words": Entry(kind="rows", tensors={"ids": torch.tensor([9]), "rows": torch.ones(1, 4)})}
        ).apply(table)


def test_a_pipeline_is_patched_by_component(tmp_path):
    pipe = tiny_pipeline()
    before = draw(pipe)
    layer = pipe.trunk.picture_layers[0].attn.to_q
    patch = Patch(entries={"trunk.picture_layers.0.attn.to_q": entry(layer.out_features, layer.in_features)})
    patch.apply(pipe)
    assert not torch.equal(draw(pipe), before)
    patch.undo(pipe)
    assert torch.equal(draw(pipe), before)


# ---- files of other programs ----------------------------------------------------------------------------------------


def peft_lora(model: nn.Module, **settings) -> dict[str, torch.Tensor]:
    """A LoRA made and run by peft; the model keeps it."""
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["to_q", "to_v", "proj_mlp"], init_lora_weights=False, **({"r": 4} | settings))
    model.add_adapter(config)
    return get_peft_model_state_dict(model, adapter_name="default")


@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 12}, {"lora_alpha": 6, "use_rslora": True}])
def test_peft_files_act_as_in_peft(model, settings, tmp_path):
    twin = copy.deepcopy(model)
    tensors = peft_lora(twin, **settings)
    want = run(twin)
    config = {"lora_alpha": settings.get("lora_alpha", 8), "r": 4, "use_rslora": settings.get("use_rslora", False)}
    meta = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    named = {f"transformer.{k}": t.contiguous() for k, t in tensors.items()}
    save_file(named, tmp_path / "lora.safetensors", metadata=meta)
    read_lora(tmp_path / "lora.safetensors", model).apply(model)
    torch.testing.assert_close(run(model), want, atol=1e-4, rtol=1e-4)


def test_kohya_files_follow_alpha_and_find_flattened_names(model):
    twin, place = copy.deepcopy(model), "transformer_blocks.0.ff.net.0.proj"
    down, up = torch.randn(4, 32), torch.randn(128, 4)
    flat = "lora_unet_" + place.replace(".", "_")
    tensors = {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(2.0)}
    read_lora(tensors, model).apply(model)
    with torch.no_grad():
        twin.get_submodule(place).weight += 2.0 / 4 * up @ down
    torch.testing.assert_close(run(model), run(twin), atol=1e-4, rtol=1e-4)


def test_kohyas_fused_qkv_of_flux_goes_onto_three_layers(model):
    """One product over q, k and v, as BFL's layout has them; diffusers splits it, and the strength is alpha / rank."""
    twin, pipe = copy.deepcopy(model), FluxPipeline(None, None, None, None, None, None, model)
    down, up = torch.randn(4, 32), torch.randn(96, 4)
    flat = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(2.0)}
    patch = read_lora(tensors, pipe)
    assert str(patch.apply(pipe)) == "6 of 6 tensors applied to 3 layers"
    with torch.no_grad():
        for name, part in zip(("to_q", "to_k", "to_v"), (2.0 / 4 * up @ down).chunk(3), strict=True):
            twin.get_submodule(f"transformer_blocks.0.attn.{name}").weight += part
    torch.testing.assert_close(run(model), run(twin), atol=1e-4, rtol=1e-4)


def test_files_round_trip_through_every_layout(model, tmp_path):
    patch = some_patch()
    patch.entries["transformer_blocks.0.attn.to_q"] = entry(32, 32, scale=0.3)
    patch.apply(model)
    want = run(model)
    patch.undo(model)
    for layout in ("peft", "diffusers", "kohya"):
        file = tmp_path / f"{layout}.safetensors"
        write_lora(patch, file, layout)
        again = read_lora(file, model)
        again.apply(model)
        torch.testing.assert_close(run(model), want, atol=1e-4, rtol=1e-4)
        again.undo(model)
        assert load_file(file)


def test_a_unet_in_kohyas_names():
    torch.manual_seed(0)
    model = unet()
    place = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    layer = model.get_submodule(place)
    flat = "lora_unet_" + place.replace(".", "_")
    shapes = {"lora_down": (2, layer.in_features), "lora_up": (layer.out_features, 2)}
    patch = read_lora({f"{flat}.{k}.weight": torch.randn(*s) for k, s in shapes.items()}, model)
    assert list(patch.entries) == [place]
    sizes = (layer.in_features, layer.out_features)
    conv = {f"{flat}.lora_down.weight": torch.randn(2, sizes[0], 3, 3),
            f"{flat}.lora_up.weight": torch.randn(sizes[1], 2, 1, 1)}  # fmt: skip
    with pytest.raises(UserError, match=rf"{flat}\.lora_down\.weight' \(2, 32, 3, 3\) .* has \(32, 32\) here"):
        read_lora(conv, model)


def test_what_is_no_lora_is_exact_on_16_bits_and_cut_down_on_request(model, capsys):
    place = "transformer_blocks.0.attn.to_q"
    w1, w2 = torch.randn(4, 4), torch.randn(8, 8)
    lokr = {f"{place}.lokr_w1": w1, f"{place}.lokr_w2": w2}
    assert torch.equal(whole_change(read_lora(lokr, model).entries[place]), torch.kron(w1, w2))
    patch = read_lora(lokr, model, truncate_to=32)
    tensors = patch.entries[place].tensors
    torch.testing.assert_close(tensors["up"] @ tensors["down"], torch.kron(w1, w2), atol=1e-4, rtol=1e-4)
    assert "truncated 1 dense entries to rank 32" in capsys.readouterr().out
    loha = {f"{place}.hada_{n}": torch.randn(*s) for n, s in
            {"w1_a": (32, 2), "w1_b": (2, 32), "w2_a": (32, 2), "w2_b": (2, 32)}.items()}  # fmt: skip
    got = read_lora(loha | {f"{place}.alpha": torch.tensor(1.0)}, model, truncate_to=4).entries[place].tensors
    a = loha[f"{place}.hada_w1_a"] @ loha[f"{place}.hada_w1_b"]
    b = loha[f"{place}.hada_w2_a"] @ loha[f"{place}.hada_w2_b"]
    torch.testing.assert_close(got["up"] @ got["down"], a * b / 2, atol=1e-4, rtol=1e-4)


def test_dora_acts_as_in_peft_when_cut_at_full_rank(model):
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    twin.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], use_dora=True, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.3)
    tensors = get_peft_model_state_dict(twin, adapter_name="default")
    read_lora(tensors, model, truncate_to=32).apply(model)
    torch.testing.assert_close(run(model), run(twin), atol=1e-3, rtol=1e-3)


def test_unknown_layers_are_named(model):
    tensors = {"nowhere.lora_A.weight": torch.randn(2, 4), "nowhere.lora_B.weight": torch.randn(4, 2)}
    with pytest.raises(UserError, match="0 of 1 LoRA layer are in this model; not: nowhere"):
        read_lora(tensors, model)
    with pytest.raises(UserError, match=r"'odd\.key' is in no LoRA layout"):
        read_lora({"odd.key": torch.zeros(1)}, model)
    half = {"proj_out.lora_A.weight": torch.randn(2, 32)}
    with pytest.raises(UserError, match="lacks its second half"):
        read_lora(half, model)


def test_several_patches_stack_on_one_layer(model):
    layer = branched(model, "proj_out")
    first, second = (
        Patch(entries={"proj_out": entry(4, 32)}, name="a"),
        Patch(entries={"proj_out": entry(4, 32)}, name="b"),
    )
    first.apply(model)
    second.apply(model)
    layer.attach(Branch(name="c", down=torch.randn(1, 32), up=torch.randn(4, 1)))
    assert isinstance(layer, BranchedLinear)
    first.undo(model)
    assert [b.name for b in layer.branches] == ["b", "c"]
