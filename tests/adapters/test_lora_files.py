"""LoRA files from the wild: what is odd about them is applied right or named, and nothing is applied in part."""

from __future__ import annotations

import json
import time

import pytest
import torch
from lora_families import FAMILIES, fresh, noise, pipeline_of, run
from lora_writers import made
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_public import T5, TEXT
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import mm
from mm.adapters.formats.settings import matches
from mm.core.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
DATA_FREE = mm.SVDQuantConfig(rank=4, data_free=True)
TO_Q, TO_K = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"


def pair(stem: str, outputs: int = 32, inputs: int = 32, seed: int = 1) -> dict[str, torch.Tensor]:
    made = {"lora_A": noise(2, inputs, seed=seed), "lora_B": noise(outputs, 2, seed=seed + 1)}
    return {f"{stem}.{k}.weight": t for k, t in made.items()}


def product(tensors: dict[str, torch.Tensor], stem: str) -> torch.Tensor:
    return tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]


@pytest.fixture
def model():
    return fresh("FLUX")


def same(model, twin, family="FLUX", **bounds):
    torch.testing.assert_close(run(family, model), run(family, twin), **({"atol": 1e-4, "rtol": 1e-4} | bounds))


def text_encoder(**fields):
    torch.manual_seed(0)
    return CLIPTextModel(CLIPTextConfig(**(TEXT | fields), max_position_embeddings=8)).eval()


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


# ---- text encoders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["text_encoder.text_model.", "text_encoder.", "lora_te1_text_model_", "lora_te_",
                                    "text_encoders.clip_l.transformer.text_model."])  # fmt: skip
@pytest.mark.parametrize("level", [False, True])
def test_clip_with_and_without_the_level_text_model(prefix, level):
    from torch import nn

    clip = text_encoder()
    if level:  # as transformers 4 built it
        outer = type("CLIPTextModel", (nn.Module,), {})()
        outer.text_model = clip
        clip = outer
    unet = fresh("SD 1.5")
    pipe = pipeline_of("SD 1.5", unet)
    pipe.register_modules(text_encoder=clip)
    layer = "encoder.layers.0.self_attn.q_proj" if "_te" not in prefix else "encoder_layers_0_self_attn_q_proj"
    unet_layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    patch = mm.read_lora(pair(prefix + layer, 16, 16) | pair(f"unet.{unet_layer}", 8, 8), pipe)
    assert len(patch.entries) == 2
    assert any(path.startswith("text_encoder.") for path in patch.entries)
    patch.apply(pipe)
    with pytest.raises(UserError, match="1 of 2 LoRA layers are in this model; not: " + prefix[:8]):
        mm.read_lora(pair(prefix + layer, 16, 16) | pair(f"unet.{unet_layer}", 8, 8), unet)


def test_early_names_of_diffusers_in_text_encoders():
    clip = text_encoder()
    tensors = {"text_model.encoder.layers.0.self_attn.to_out_lora.down.weight": noise(2, 16),
               "text_model.encoder.layers.0.self_attn.to_out_lora.up.weight": noise(16, 2),
               "text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight": noise(2, 16),
               "text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight": noise(32, 2)}  # fmt: skip
    assert list(mm.read_lora(tensors, clip).entries) == ["encoder.layers.0.self_attn.out_proj",
                                                         "encoder.layers.0.mlp.fc1"]  # fmt: skip


@pytest.mark.parametrize("family", ["FLUX", "SD3"])
def test_t5_is_the_third_text_encoder_or_the_second(family):
    pipe = pipeline_of(family, fresh(family))
    part = "text_encoder_2" if family == "FLUX" else "text_encoder_3"
    pipe.register_modules(**{part: T5EncoderModel(T5Config(**T5))})
    flat = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    assert list(mm.read_lora(pair(flat, 16, 16), pipe).entries) == [f"{part}.encoder.block.0.layer.0.SelfAttention.q"]


def test_a_name_that_two_encoders_have_is_not_guessed():
    pipe = pipeline_of("SDXL", fresh("SDXL"))
    pipe.register_modules(text_encoder=text_encoder(), text_encoder_2=text_encoder())
    with pytest.raises(UserError, match="may be a layer of text_encoder or text_encoder_2"):
        mm.read_lora(pair("encoder.layers.0.self_attn.q_proj", 16, 16), pipe)


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
    want = mm.read_lora(tensors, model).entries[TO_Q].tensors["delta"]
    mm.read_lora({f"{TO_Q}.diff": noise(32, 32)}, model, name="other").apply(model)
    assert torch.equal(mm.read_lora(tensors, model).entries[TO_Q].tensors["delta"], want)


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
    "0 of 1 LoRA layers": pair("input_blocks.1.1.transformer_blocks.0.attn1.to_q"),
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
    with pytest.raises(UserError, match="no LoRA at"):
        mm.read_lora(tmp_path / "none.safetensors", model)
    with pytest.raises(UserError, match="no LoRA in the folder"):
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


# ---- settings -------------------------------------------------------------------------------------------------------


def read_with(tmp_path, model, **settings):
    save_file(pair(TO_Q), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    return mm.read_lora(tmp_path, model).entries[TO_Q].scale


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 3}, 1.5),
        ({"lora_alpha": 4, "use_rslora": True}, 4 / 2**0.5),
        ({"lora_alpha": 3, "alpha_pattern": {"to_q": 5}}, 2.5),
        ({"lora_alpha": 3, "alpha_pattern": {"^to_q": 5, "^transformer_blocks.0.attn.to_q": 9}}, 4.5),
        ({"lora_alpha": 3, "alpha_pattern": {r"transformer_blocks\.\d+\.attn\.to_q": 5}}, 2.5),
        ({"lora_alpha": 3, "alpha_pattern": {r"o_q": 5}}, 1.5),
        ({"init_lora_weights": "gaussian"}, 1.0),
    ],
)
def test_settings_are_obeyed_as_in_peft(model, tmp_path, settings, scale):
    assert read_with(tmp_path, model, **settings) == pytest.approx(scale)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": "3"}, "lora_alpha is '3'"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": 1, "alpha_pattern": ["to_q"]}, "alpha_pattern is a list"),
        ({"lora_alpha": 1, "alpha_pattern": {"to_q": None}}, r"alpha_pattern\['to_q'\] is None"),
        ({"lora_alpha": 1, "alpha_pattern": {"(a+)+$": 2}}, "regular expression '\\(a\\+\\)\\+\\$', which mm does not"),
        ({"lora_alpha": 1, "rank_pattern": {"(x|x)*y": 2}}, "which mm does not run"),
        ({"lora_alpha": 1, "r": -4}, "r is -4, not a positive number"),
        ({"lora_alpha": 1, "init_lora_weights": "pissa_niter_4"}, "a base that its training changed"),
        ({"lora_alpha": 1, "alora_invocation_tokens": [3]}, "an activated LoRA"),
    ],
)
def test_settings_that_mean_something_else_are_named(model, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        read_with(tmp_path, model, **settings)


def test_patterns_match_as_peft_matches_and_take_linear_time():
    import re

    names = ["a.to_q", "to_q", "b.a.to_q", "blocks.12.attn.to_q", "xto_q", "blocks..to_q", "", "a", "aa", "ba.aa"]
    patterns = [
        "to_q",
        "^to_q",
        "a.to_q",
        r"blocks\.\d+\.attn\.to_q",
        "blocks.*to_q",
        "a+",
        "a*",
        "^a+$",
        ".+q",
        "[0-9]+",
    ]
    for pattern in patterns:
        for name in names:
            want = re.match(rf"(.*\.)?({pattern})$", name) is not None
            assert matches(pattern, name) == want, (pattern, name)
    start = time.process_time()
    assert not matches(".*" * 100 + "b", "a" * 400)
    assert time.process_time() - start < 2


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
