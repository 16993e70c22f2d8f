"""LoRA files from the wild: what is odd about them is applied right or named, and nothing is applied in part."""

from __future__ import annotations

import time

import pytest
import torch
from lora_cases import DATA_FREE, TO_K, TO_Q, pair, product, same
from lora_families import FAMILIES, fresh, noise, pipeline_of, run
from lora_writers import made
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

import mm
from mm.adapters import stack_of
from mm.core.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def model():
    return fresh("FLUX")


# ---- parts beside the product ---------------------------------------------------------------------------------------


def test_biases_of_peft_are_applied_with_the_products_strength(model, tmp_path):
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "norm.linear"], lora_bias=True,
                        init_lora_weights=False)  # fmt: skip
    wrapped = get_peft_model(fresh("FLUX"), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            parameter.data = noise(*parameter.shape)
    wrapped.save_pretrained(str(tmp_path))
    before = run("FLUX", model)
    patch = mm.read_lora(tmp_path, model)
    assert sum(entry.kind == "bias" for entry in patch.entries.values()) == len(patch.entries) / 2
    patch.apply(model)
    same(model, wrapped.eval())
    assert patch.verify(model).endswith("tensors applied")
    patch.undo(model)
    assert torch.equal(run("FLUX", model), before)


@pytest.mark.parametrize("bits", [16, 4])
def test_changes_of_biases_and_norms_scale_come_off_and_bake(model, bits):
    if bits == 4:
        mm.quantize(model, DATA_FREE, progress=False)
    before, twin = run("FLUX", model), fresh("FLUX")
    change = {f"lora_unet_{TO_Q.replace('.', '_')}.diff_b": noise(32),
              "lora_unet_double_blocks_0_img_attn_norm_query_norm.diff": noise(16)}  # fmt: skip
    patch = mm.read_lora(change, model)
    assert set(patch.entries) == {f"{TO_Q}.bias", "transformer_blocks.0.attn.norm_q"}
    assert str(patch.apply(model, 0.5)) == "2 of 2 tensors applied to 2 layers"
    twin.get_submodule(TO_Q).bias.data += 0.5 * noise(32)
    twin.transformer_blocks[0].attn.norm_q.weight.data += 0.5 * noise(16)
    if bits == 16:
        same(model, twin)
    patch.scale(model, 0.0)
    torch.testing.assert_close(run("FLUX", model), before, atol=1e-6, rtol=1e-6)
    patch.undo(model)
    assert torch.equal(run("FLUX", model), before)
    patch.bake(model, 0.5)
    if bits == 16:
        same(model, twin)
    with pytest.raises(UserError, match="lack patch 'lora'"):
        patch.undo(model)


def test_a_bias_patch_travels_in_a_file_and_two_of_them_come_off_in_any_order(model, tmp_path):
    first = mm.read_lora({f"{TO_Q}.diff_b": noise(32)} | pair(TO_Q), model, name="a")
    first.save(tmp_path / "a.safetensors")
    second = mm.read_lora({f"{TO_Q}.diff_b": noise(32, seed=4)}, model, name="b")
    second.apply(model)
    alone = run("FLUX", model)
    second.undo(model)
    again = type(first).load(tmp_path / "a.safetensors")
    again.apply(model)
    second.apply(model)
    again.undo(model)
    assert torch.equal(run("FLUX", model), alone)


def test_a_full_change_stands_beside_a_product(model):
    tensors = pair(f"lora_unet_{TO_Q}") | {f"lora_unet_{TO_Q}.diff": noise(32, 32, seed=9)}
    twin = fresh("FLUX")
    twin.get_submodule(TO_Q).weight.data += product(tensors, f"lora_unet_{TO_Q}") + noise(32, 32, seed=9)
    mm.read_lora(tensors, model).apply(model)
    same(model, twin)


# ---- kinds ----------------------------------------------------------------------------------------------------------


def test_doras_magnitude_lies_along_outputs_or_inputs(model):
    tensors = pair(TO_Q)
    weight = model.get_submodule(TO_Q).weight + product(tensors, TO_Q)
    sizes = 1.0 + noise(32).abs()
    for scale, changed in (
        (sizes[:, None], weight * (sizes / weight.norm(dim=1))[:, None]),
        (sizes[None], weight * (sizes / weight.norm(dim=0))[None]),
    ):
        twin = fresh("FLUX")
        twin.get_submodule(TO_Q).weight.data = changed
        patch = mm.read_lora(tensors | {f"{TO_Q}.dora_scale": scale}, model)
        patch.apply(model)
        same(model, twin)
        patch.undo(model)


def test_dora_reads_the_weight_before_other_patches(model):
    tensors = pair(TO_Q) | {f"{TO_Q}.dora_scale": 1.0 + noise(32, 1).abs()}
    layer, other = model.get_submodule(TO_Q), noise(32, 32)
    before = layer.weight.detach().clone()
    mm.read_lora(tensors, model).apply(model)
    want = layer.weight - before
    mm.read_lora({f"{TO_Q}.diff": other}, model, name="other").apply(model)
    torch.testing.assert_close(layer.weight, before + want + other)


def test_a_lycoris_file_mixes_kinds(model):
    loha = {f"hada_{n}": noise(*s, seed=i) for i, (n, s) in enumerate(
        {"w1_a": (32, 2), "w1_b": (2, 32), "w2_a": (32, 2), "w2_b": (2, 32)}.items())}  # fmt: skip
    stem = "lycoris_transformer_blocks_0_attn_"
    tensors = pair(f"{stem}to_q") | {f"{stem}to_k.{k}": t for k, t in loha.items()}
    tensors |= {f"{stem}to_v.lokr_w1": noise(4, 4), f"{stem}to_v.lokr_w2": noise(8, 8),
                f"{stem}to_v.alpha": torch.tensor(5.0)}  # fmt: skip
    twin = fresh("FLUX")
    attention = twin.transformer_blocks[0].attn
    attention.to_q.weight.data += product(tensors, f"{stem}to_q")
    attention.to_k.weight.data += (loha["hada_w1_a"] @ loha["hada_w1_b"]) * (loha["hada_w2_a"] @ loha["hada_w2_b"])
    attention.to_v.weight.data += torch.kron(noise(4, 4), noise(8, 8))  # two full factors: alpha does not count
    patch = mm.read_lora(tensors, model)
    assert patch.method == "loha+lokr+lora"
    patch.apply(model)
    same(model, twin)


def test_tucker_forms_of_convolutions():
    """LyCORIS and kohya's CP: a core over the kernel between two 1 x 1 convolutions."""
    path = "down_blocks.0.resnets.0.conv1"
    unet, twin = fresh("SD 1.5"), fresh("SD 1.5")
    down, mid, up = noise(2, 8, 1, 1), noise(2, 2, 3, 3), noise(8, 2, 1, 1)
    tensors = {f"{path}.lora_down.weight": down, f"{path}.lora_mid.weight": mid, f"{path}.lora_up.weight": up}
    twin.get_submodule(path).weight.data += torch.einsum("nr,rskl,sc->nckl", up[..., 0, 0], mid, down[..., 0, 0])
    mm.read_lora(tensors, unet).apply(unet)
    same(unet, twin, "SD 1.5")
    core = {"hada_t1": noise(2, 2, 3, 3), "hada_t2": noise(2, 2, 3, 3, seed=2), "hada_w1_a": noise(2, 8),
            "hada_w1_b": noise(2, 8, seed=3), "hada_w2_a": noise(2, 8, seed=4),
            "hada_w2_b": noise(2, 8, seed=5)}  # fmt: skip
    first, second = (
        torch.einsum("rskl,rn,sc->nckl", core[f"hada_t{i}"], core[f"hada_w{i}_a"], core[f"hada_w{i}_b"]) for i in (1, 2)
    )
    got = mm.read_lora({f"{path}.{k}": t for k, t in core.items()}, unet).entries[path].tensors["delta"]
    torch.testing.assert_close(got, first * second)
    core = {"lokr_t2": noise(2, 2, 3, 3), "lokr_w2_a": noise(2, 4), "lokr_w2_b": noise(2, 2, seed=3)}
    second = torch.einsum("rskl,rn,sc->nckl", *core.values()).contiguous()
    tensors = {f"{path}.{k}": t for k, t in (core | {"lokr_w1": noise(2, 4, seed=4)}).items()}
    got = mm.read_lora(tensors, unet).entries[path].tensors["delta"]
    torch.testing.assert_close(got, torch.kron(noise(2, 4, seed=4)[..., None, None], second))


def test_matrices_go_onto_1x1_convolutions_and_these_onto_linears():
    unet, xl = fresh("SD 1.5"), fresh("SDXL")
    path, linear = "down_blocks.0.attentions.0.proj_in", "down_blocks.1.attentions.0.proj_in"
    flat = mm.read_lora(pair(path, 8, 8), unet).entries[path].tensors["delta"]
    assert flat.shape == (8, 8, 1, 1)
    tensors = {f"{linear}.lora_down.weight": noise(2, 16, 1, 1), f"{linear}.lora_up.weight": noise(16, 2, 1, 1)}
    assert mm.read_lora(tensors, xl).entries[linear].kind == "lowrank"
    kernel = {f"{linear}.lora_down.weight": noise(2, 16, 3, 3), f"{linear}.lora_up.weight": noise(16, 2, 1, 1)}
    with pytest.raises(UserError, match=r"proj_in\.lora_down\.weight' \(2, 16, 3, 3\)"):
        mm.read_lora(kernel, xl)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_files_of_fewer_bits(model, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in pair(TO_Q).items()}
    twin = fresh("FLUX")
    twin.get_submodule(TO_Q).weight.data += product({k: t.float() for k, t in tensors.items()}, TO_Q)
    mm.read_lora(tensors, model).apply(model)
    same(model, twin)


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["SD 1.5", "FLUX", "Qwen-Image", "Wan", "FLUX.2"])
def test_a_model_with_fused_projections(family, tmp_path):
    """`fuse_qkv_projections`: the model runs one layer for three, and a LoRA of the three goes onto its rows."""
    file = made(family, "diffusers", "LoRA", tmp_path)
    model = fresh(family)
    fuse = getattr(model, "fuse_qkv_projections", None)
    if fuse is None:
        pytest.skip("diffusers does not fuse this family")
    fuse()
    patch = mm.read_lora(file.source, pipeline_of(family, model))
    patch.apply(pipeline_of(family, model))
    torch.testing.assert_close(run(family, model), file.wanted["diffusers"], atol=1e-4, rtol=1e-4)


def test_a_file_made_on_fused_projections_is_split(model):
    tensors = pair("transformer_blocks.0.attn.to_qkv", 96)
    twin = fresh("FLUX")
    for letter, part in zip("qkv", product(tensors, "transformer_blocks.0.attn.to_qkv").chunk(3), strict=True):
        twin.get_submodule(f"transformer_blocks.0.attn.to_{letter}").weight.data += part
    mm.read_lora(tensors, model).apply(model)
    same(model, twin)


def test_one_layer_under_two_spellings_is_an_error(model):
    flat = f"lora_unet_{TO_Q.replace('.', '_')}"
    with pytest.raises(UserError, match=r"'transformer_blocks\.0\.attn\.to_q' and 'lora_unet_.* same layer"):
        mm.read_lora(pair(TO_Q) | pair(flat), model)
    with pytest.raises(UserError, match=r"same layer here, transformer_blocks\.0\.attn\.to_k"):
        mm.read_lora(pair(TO_K) | pair("double_blocks.0.img_attn.qkv", 96), model)
    down, up = pair(TO_Q).values()
    with pytest.raises(UserError, match="under two names"):
        mm.read_lora(pair(TO_Q) | {f"{TO_Q}.lora_down.weight": down, f"{TO_Q}.lora_up.weight": up}, model)


# ---- refused by name ------------------------------------------------------------------------------------------------

_BAD = {
    "no LoRA layout": {"odd.key": torch.zeros(1)},
    r"'.*boft_R' is an orthogonal adapter": pair(TO_Q) | {f"{TO_K}.boft_R": torch.ones(2, 2)},
    r"\(IA\)3": {f"{TO_K}.on_input": torch.ones(1), f"{TO_K}.weight": torch.ones(32)},
    r"on_input.* is of an \(IA\)3 adapter": {f"{TO_K}.on_input": torch.tensor(True), f"{TO_K}.weight": torch.ones(32)},
    r"reshape_weight.* is of a replaced weight of ComfyUI": {f"{TO_K}.reshape_weight": torch.tensor([32, 64])},
    "is a norm in full, as the control LoRAs": {"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(16)},
    "is of a BOFT of LyCORIS": {f"{TO_K}.oft_blocks": noise(2, 4, 8, 8)},
    "textual inversion": pair(TO_Q) | {"bundle_emb.word.string_to_param": torch.ones(4)},
    "2 adapters .a, b.": {f"{TO_Q}.lora_A.a.weight": noise(2, 32), f"{TO_Q}.lora_B.a.weight": noise(32, 2),
                          f"{TO_K}.lora_A.b.weight": noise(2, 32), f"{TO_K}.lora_B.b.weight": noise(32, 2)},
    "NaN or infinity": {**pair(TO_Q), f"{TO_Q}.lora_B.weight": torch.full((32, 2), float("nan"))},
    "alpha.* NaN or infinity": pair(TO_Q) | {f"{TO_Q}.alpha": torch.tensor(float("inf"))},
    "int32, not floating point": {**pair(TO_Q), f"{TO_Q}.lora_B.weight": torch.ones(32, 2, dtype=torch.int32)},
    "bool, not floating point": {**pair(TO_Q), f"{TO_Q}.lora_B.weight": torch.ones(32, 2, dtype=torch.bool)},
    "is empty": {**pair(TO_Q), f"{TO_Q}.lora_B.weight": torch.ones(32, 0)},
    "alpha is one number": pair(TO_Q) | {f"{TO_Q}.alpha": torch.ones(2)},
    r"lacks its second half \(lora_B, lora_up\); .*lora_A": {f"{TO_Q}.lora_A.weight": noise(2, 32)},
    r"lacks its first half": {f"{TO_Q}.lora_B.weight": noise(32, 2), f"{TO_Q}.alpha": torch.tensor(1.0)},
    "lacks its hada_w2_b": {f"{TO_Q}.hada_{n}": noise(2, 2) for n in ("w1_a", "w1_b", "w2_a")},
    "nothing to apply": pair(TO_K) | {f"{TO_Q}.alpha": torch.tensor(1.0)},
    r"made for \(32, 16\)": pair(TO_Q, 32, 16),
    "make no product": {f"{TO_Q}.lora_A.weight": noise(3, 32), f"{TO_Q}.lora_B.weight": noise(32, 2)},
    "make no weight": {f"{TO_Q}.lokr_w1": torch.ones(3000, 3000), f"{TO_Q}.lokr_w2": torch.ones(3000, 3000)},
    "several adapters at once": pair(TO_Q) | {f"{TO_Q}.lokr_w1": noise(4, 4), f"{TO_Q}.lokr_w2": noise(8, 8)},
    "has 32 outputs": {f"{TO_Q}.diff_b": noise(31)},
    "a bias inside a DoRA": pair(TO_Q) | {f"{TO_Q}.dora_scale": noise(32, 1), f"{TO_Q}.lora_B.bias": noise(32)},
    "0 of 1 LoRA layer": pair("input_blocks.1.1.transformer_blocks.0.attn1.to_q"),
}  # fmt: skip


@pytest.mark.parametrize("message", _BAD)
def test_what_cannot_be_applied_is_named(model, message):
    before = run("FLUX", model)
    start = time.process_time()
    with pytest.raises(UserError, match=message):
        mm.read_lora(_BAD[message], model)
    assert time.process_time() - start < 5
    assert torch.equal(run("FLUX", model), before)


def test_files_that_are_none(model, tmp_path):
    with pytest.raises(UserError, match="there is no adapter file"):
        mm.read_lora(tmp_path / "none.safetensors", model)
    with pytest.raises(UserError, match="there is no adapter in the folder"):
        mm.read_lora(tmp_path, model)
    (tmp_path / "text.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(UserError, match=r"text\.safetensors"):
        mm.read_lora(tmp_path / "text.safetensors", model)
    save_file(pair(TO_Q), tmp_path / "adapter_model.safetensors")
    config = tmp_path / "adapter_config.json"
    for content, message in ((b"\xff\xfe{}", "not UTF-8"), (b"[1]", "a JSON object is needed"), (b"{", "is no JSON"),
                             (b"[" * 100_000, "nested too deeply|is no JSON")):  # fmt: skip
        config.write_bytes(content)
        with pytest.raises(UserError, match=message):
            mm.read_lora(tmp_path, model)
    mm.read_lora(pair(TO_Q), model).save(tmp_path / "patch.safetensors")
    with pytest.raises(UserError, match="is a patch of mm"):
        mm.read_lora(tmp_path / "patch.safetensors", model)


# ---- 4 bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), zip(FAMILIES, ["LoRA", "LoKr"] * 4, strict=True))
def test_the_same_on_4_bits(family, kind, tmp_path):
    """Within the error of 4 bits: as near as the 16-bit model with the adapter in its weights, quantized then."""
    file = made(family, "kohya-LDM" if FAMILIES[family].part == "unet" else "ComfyUI", kind, tmp_path)
    quantized, baked = fresh(family), fresh(family)
    mm.quantize(quantized, DATA_FREE, progress=False)
    if kind == "LoKr":
        with pytest.raises(UserError, match=r"LoKr: .* give truncate_to=RANK"):
            mm.read_lora(file.source, quantized)
    mm.read_lora(file.source, quantized, truncate_to=64 if kind == "LoKr" else None).apply(quantized)
    mm.read_lora(file.source, baked).bake(baked)
    mm.quantize(baked, DATA_FREE, progress=False)
    error, own = (float((run(family, m) - file.wanted["the formula"]).norm()) for m in (quantized, baked))
    assert error < 2 * own, (error, own)


def test_what_is_cut_off_is_printed(model, capsys):
    tensors = {f"{TO_Q}.lokr_w1": noise(4, 4), f"{TO_Q}.lokr_w2": noise(8, 8)}
    patch = mm.read_lora(tensors, model, truncate_to=8)
    assert 0 < patch.report["truncated"][TO_Q] < 1
    assert "truncated 1 dense entries to rank 8" in capsys.readouterr().out
    with pytest.raises(UserError, match="truncate_to is 0"):
        mm.read_lora(tensors, model, truncate_to=0)


# ---- names ----------------------------------------------------------------------------------------------------------


def test_a_patch_is_called_as_its_file_or_folder(model, tmp_path, monkeypatch):
    folder = tmp_path / "of-peft.v2"
    folder.mkdir()
    for file in (tmp_path / "night style.v1.safetensors", folder / "adapter_model.safetensors"):
        save_file(pair(TO_Q), file)
    assert mm.read_lora(tmp_path / "night style.v1.safetensors", model).name == "night style.v1"
    assert mm.read_lora(folder, model).name == "of-peft.v2"
    assert mm.read_lora(folder / "adapter_model.safetensors", model).name == "of-peft.v2"
    monkeypatch.chdir(folder)
    assert mm.read_lora(".", model).name == "of-peft.v2"
    assert mm.read_lora(pair(TO_Q), model).name == "lora"
    assert mm.read_lora(folder, model, name="mine").name == "mine"
    with pytest.raises(UserError, match="name is 3; give a text"):
        mm.read_lora(folder, model, name=3)
    save_file(pair(TO_Q), folder / "pytorch_lora_weights.safetensors")
    with pytest.raises(UserError, match="give one of the two files"):
        mm.read_lora(folder, model)


def test_what_is_wrong_with_a_file_names_it(model, tmp_path):
    save_file({"odd.key": torch.ones(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"odd\.safetensors: the key 'odd\.key'"):
        mm.read_lora(tmp_path / "odd.safetensors", model)
    torch.save({"w": torch.ones(1)}, tmp_path / "old.pt")
    with pytest.raises(UserError, match=r"old\.pt is no safetensors file: it is pickled"):
        mm.read_lora(tmp_path / "old.pt", model)


def test_two_files_without_names_go_onto_one_model(model, tmp_path):
    for name in ("a", "b"):
        save_file(pair(TO_Q), tmp_path / f"{name}.safetensors")
        mm.read_lora(tmp_path / f"{name}.safetensors", model).apply(model)
    assert stack_of(model).names() == ("a", "b")
