"""Published Nunchaku files and nunchaku_lite folders, packed here number by number from the layout's description."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import nunchaku_packer as packer
import pytest
import torch
from nunchaku_files import flux, published, write
from nunchaku_packer import make_layer, make_modulation, relative, run
from safetensors.torch import save_file

import mm
from mm.core.errors import UserError
from mm.layers.linear import ActivationRule
from mm.quantization.integrations import nunchaku_layer as layer
from mm.quantization.integrations import nunchaku_layout as layout
from mm.quantization.layout import quantized

# ---- order of numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (256, 384), (192, 64)])
def test_every_kind_of_tensor_comes_back(rows, columns):
    rng = np.random.default_rng(rows)
    codes = rng.integers(0, 16, (rows, columns), dtype=np.uint8)
    whole = layout.unpack_codes(packer.pack_codes(codes))
    assert np.array_equal(whole[:rows, :columns], codes)
    assert whole.shape == (packer.up128(rows), packer.up128(columns))
    assert layout.signed(whole)[0, 0] == (int(codes[0, 0]) + 8) % 16 - 8
    assert np.array_equal(layout.unpack_awq(packer.pack_awq(codes)), codes)
    scales = rng.normal(size=(rows, columns // 64)).astype(np.float32)
    assert np.array_equal(layout.unpack_scales(packer.pack_scales(scales, torch.float32))[:rows], scales)
    assert np.array_equal(layout.unpack_vector(packer.pack_vector(scales[:, 0], torch.float32))[:rows], scales[:, 0])
    micro = torch.from_numpy(rng.uniform(1, 400, (rows, columns // 16)).astype(np.float32)).to(torch.float8_e4m3fn)
    back = layout.unpack_micro_scales(packer.pack_micro(micro.float().numpy()))[:rows, : columns // 16]
    assert torch.equal(back.view(torch.uint8), micro.view(torch.uint8))
    down, up = (rng.normal(size=s).astype(np.float32) for s in ((32, columns), (rows, 48)))
    assert np.array_equal(layout.unpack_down(packer.pack_down(down, torch.float32))[:, :columns], down)
    assert np.array_equal(layout.unpack_up(packer.pack_up(up, torch.float32))[:rows], up)


def test_places_that_the_format_is_known_by():
    """Orders that comments of published packers and kernels spell out."""
    scales = np.arange(128, dtype=np.float32)
    assert packer.pack_vector(scales, torch.float32)[:8].tolist() == [0, 1, 8, 9, 2, 3, 10, 11]
    micro = np.arange(128, dtype=np.float32)[:, None].repeat(8, 1)
    packed = packer.pack_micro(micro).float().flatten()[::4]
    assert packed[:8].tolist() == [0, 32, 64, 96, 8, 40, 72, 104]
    columns = np.arange(64, dtype=np.uint8)[None].repeat(4, 0)
    order = [[b + 8 * i for i in range(4)] for b in range(8)]
    flat = np.zeros(256, np.uint8)
    flat[packer.awq_place(*packer.grid(columns), 64)] = columns
    assert flat[:32].reshape(8, 4).tolist() == order


# ---- one layer ------------------------------------------------------------------------------------------------------

SIZES = [(192, 64), (128, 128), (256, 384), (64, 170)]


def read(fields, n, k, **options):
    return layer.read_w4a4(fields.__getitem__, set(fields), n, k, **options)


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_int4_is_taken_over_exactly_and_computes_the_definition(n, k, unsigned):
    rng = np.random.default_rng(n + k)
    made = make_layer(rng, n, k, unsigned=unsigned, rank=32)
    piece = read(made.fields, n, k, after_gelu=unsigned)
    assert np.array_equal(piece.integers.values, made.codes)
    assert np.array_equal(piece.integers.scales.double().repeat_interleave(64, 1)[:, :k], made.steps)
    rule = ActivationRule(bits=4, group=64, unsigned=unsigned, shift=piece.shift)
    x = rng.normal(size=(5, k))
    x = np.maximum(x, 0) - 0.17 * (x < 0) if unsigned else x
    built = layer.build(piece, rule, torch.float64, torch.device("cpu"))
    assert built(torch.from_numpy(x)).numpy() == pytest.approx(made(x), rel=1e-9, abs=1e-9)
    plain = layer.build(piece.unshifted(), ActivationRule(bits=16), torch.float64, torch.device("cpu"))
    want = x @ made.dense.T + made.plain_bias
    assert plain(torch.from_numpy(x)).numpy() == pytest.approx(want, rel=1e-6, abs=1e-6)  # that bias is summed in fp32


@pytest.mark.parametrize(("n", "k"), SIZES[:3])
def test_fp4_errs_less_than_a_hundredth(n, k):
    rng = np.random.default_rng(n)
    made = make_layer(rng, n, k, fp4=True)
    piece = read(made.fields, n, k, after_gelu=True)
    assert piece.shift == 0
    assert piece.bits == 8
    errors = piece.integers.dense().double().numpy() - made.rounded
    assert np.linalg.norm(errors) < 0.008 * np.linalg.norm(made.rounded)
    built = layer.build(piece, ActivationRule(bits=16), torch.float64, torch.device("cpu"))
    x = rng.normal(size=(5, k))
    want = x @ made.dense.T + made.bias
    assert np.linalg.norm(built(torch.from_numpy(x)).numpy() - want) < 0.01 * np.linalg.norm(want)


@pytest.mark.parametrize("splits", [1, 3, 6])
def test_modulation_keeps_zero_points_and_comes_back_in_chunks(splits):
    rng = np.random.default_rng(splits)
    dense, bias, fields = make_modulation(rng, 6 * 64, 128, splits)
    piece = layer.read_awq(fields.__getitem__, set(fields), 6 * 64, 128, splits=splits)
    built = layer.build(piece, ActivationRule(bits=16), torch.float64, torch.device("cpu"))
    assert np.array_equal(built.base_weight().numpy(), dense)
    assert np.array_equal(built.bias.numpy(), bias)
    symmetric = fields | {"wzeros": -8 * fields["wscales"]}
    assert layer.read_awq(symmetric.__getitem__, set(fields), 6 * 64, 128, splits=splits).down_RK is None


# ---- whole models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    tensors, model = published()
    return write(tmp_path_factory.mktemp("nunchaku") / "first.safetensors", tensors, model), tensors, model


@pytest.mark.parametrize(("version", "fp4"), [(1, False), (2, False), (1, True), (2, True)])
def test_a_flux_file_gives_the_model_it_means(tmp_path, version, fp4):
    tensors, meant = published(version, fp4)
    file = write(tmp_path / "file.safetensors", tensors, meant)
    torch.manual_seed(5)
    model = flux()
    assert relative(run(model), run(meant)) > 0.5
    applied = mm.read_nunchaku(file, model, activation_bits=16)
    assert str(applied) == f"{len(tensors)} of {len(tensors)} tensors applied to 26 layers"
    assert relative(run(model), run(meant)) < (0.02 if fp4 else 1e-4)
    errors = [relative(run(mm.load_nunchaku(file, dtype=torch.float32, activation_bits=b)), run(meant)) for b in (8, 4)]
    assert errors[0] < 0.02
    assert fp4 or errors[0] < errors[1] < 0.3


def test_a_file_read_and_saved_is_a_folder_of_mm(first, tmp_path):
    file, tensors, _ = first
    model = mm.load_nunchaku(file, dtype=torch.float32)
    want = run(model)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    model.save_pretrained(tmp_path)
    again = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(run(again), want)
    first_folder = tmp_path / "as it came first"
    first_folder.mkdir()
    config = {"_class_name": "NunchakuFluxTransformer2dModel"} | dict(model.config, quantization_config=None)
    (first_folder / "config.json").write_text(json.dumps(config, default=list))
    for name, inside in (("transformer_blocks", True), ("unquantized_layers", False)):
        part = {k: t for k, t in tensors.items() if ("blocks." in k) == inside}
        save_file(part, first_folder / f"{name}.safetensors")
    assert torch.equal(run(mm.load_nunchaku(first_folder, dtype=torch.float32)), want)
    half = mm.load_nunchaku(file)
    assert {p.dtype for p in half.parameters() if p.is_floating_point()} == {torch.bfloat16}


def test_scales_and_integers_of_fused_layers_are_those_of_the_file(first):
    """q, k and v are rows of one layer of the file, and share its smoothing."""
    file, tensors, _ = first
    model = mm.load_nunchaku(file, dtype=torch.float32)
    attention = model.transformer_blocks[0].attn
    whole = layout.signed(layout.unpack_codes(tensors["transformer_blocks.0.qkv_proj.qweight"]))[:192, :64]
    assert torch.equal(torch.cat([m.integers() for m in (attention.to_q, attention.to_k, attention.to_v)]), whole)
    assert torch.equal(attention.to_q.smooth, attention.to_v.smooth)
    out = model.single_transformer_blocks[1].proj_out
    assert out.activation == ActivationRule(bits=8, group=64)
    down = model.transformer_blocks[0].ff.net[2]
    assert down.activation == ActivationRule(bits=4, group=64, unsigned=True, shift=0.171875)


# ---- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("x_embedder.bias"), "x_embedder.bias is not in the file"),
        (lambda t: t.update(stray=torch.zeros(2)), r"stray \(no such tensor in this model\)"),
        (lambda t: t.pop("transformer_blocks.0.mlp_fc1.wscales"), "mlp_fc1 lacks wscales"),
        (lambda t: t.pop("transformer_blocks.0.mlp_fc1.bias"), "mlp_fc1 lacks the bias that"),
        (lambda t: t.pop("transformer_blocks.0.mlp_fc1.lora_up"), "mlp_fc1 has one half of a branch only"),
        (
            lambda t: t.update({"transformer_blocks.0.mlp_fc1.smooth": torch.zeros(64)}),
            r"mlp_fc1 has smooth_factor \[64\], not \[128\]",
        ),
        (
            lambda t: t.update({"transformer_blocks.0.mlp_fc1.qweight": torch.zeros(256, 64)}),
            "mlp_fc1 has a qweight of type F32, not I8 or U8",
        ),
        (
            lambda t: t.update({"transformer_blocks.0.norm1.linear.lora_down": torch.zeros(64, 16)}),
            "norm1.linear has proj_down, which is not known",
        ),
        (
            lambda t: t.update({"transformer_blocks.0.attn.to_q.qweight": torch.zeros(1)}),
            r"transformer_blocks.0.attn.to_q \(no such layer in this model\)",
        ),
        (
            lambda t: [t.pop(k) for k in list(t) if k.startswith("single_transformer_blocks.0.mlp_fc2.")],
            "single_transformer_blocks.0.proj_out is there in part only",
        ),
        (
            lambda t: t.update({"transformer_blocks.7.mlp_fc1.qweight": torch.zeros(1)}),
            "blocks.7.mlp_fc1 belongs to transformer_blocks.7.ff.net.0.proj, which this model does not have",
        ),
        (
            lambda t: t.update({(k := "transformer_blocks.0.mlp_fc1.wscales"): t[k].view(torch.int16)}),
            "mlp_fc1 has a wscales of type I16, not BF16 or F16",
        ),
        (
            lambda t: t.update({(k := "transformer_blocks.0.mlp_fc1.lora_down"): t[k].view(torch.uint8)}),
            "mlp_fc1 has a proj_down of type U8",
        ),
        (lambda t: t.update({(k := "x_embedder.weight"): t[k].int()}), "x_embedder.weight is of type I32"),
        (
            lambda t: t.update({(k := "transformer_blocks.0.mlp_fc1.wscales"): t[k] * float("nan")}),
            "wscales. holds NaN or infinite values",
        ),
        (lambda t: t["x_embedder.bias"].fill_(float("inf")), "x_embedder.bias. holds NaN or infinite values"),
        (
            lambda t: t.update(
                {
                    k.replace("mlp_fc1", "ff.net.0.proj"): x.clone()
                    for k, x in list(t.items())
                    if k.startswith("transformer_blocks.0.mlp_fc1.")
                }
            ),
            "transformer_blocks.0.ff.net.0.proj is there in part only, or twice",
        ),
        (
            lambda t: t.update(
                {
                    "transformer_blocks.0.attn.norm_q.weight": t["transformer_blocks.0.norm_q.weight"].clone(),
                }
            ),
            "are both transformer_blocks.0.attn.norm_q.weight",
        ),
        (
            lambda t: t.update({"transformer_blocks.0.mlp_fc1.lora_down": torch.tensor(1.0).half()}),
            r"has proj_up \[256, 16\], not",
        ),
    ],
    ids=range(19),
)
def test_a_file_that_does_not_fit_names_what_and_changes_nothing(first, tmp_path, change, message):
    _, tensors, meant = first
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    file = write(tmp_path / "bad.safetensors", tensors, meant)
    model = flux()
    before = run(model)
    with pytest.raises(UserError, match=message):
        mm.read_nunchaku(file, model)
    assert not quantized(model)
    assert torch.equal(run(model), before)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"num_layers": 10**5}, "describes a larger model than its weights hold"),
        ({"num_layers": "2"}, "describes no model that can be built"),
        ({"joint_attention_dim": 10**6}, "asks for a table of 64000000 values"),
        ({"joint_attention_dim": 10**7}, "joint_attention_dim is 10000000, more than"),
        ({"_class_name": ["x"]}, "does not say which model"),
        ({"_class_name": "FluxPipeline"}, "does not say which model"),
        (
            {"_class_name": "NunchakuFluxTransformer2dModel", "axes_dims_rope": [10**9]},
            "axes_dims_rope is 1000000000, more than",
        ),
    ],
    ids=range(7),
)
def test_settings_that_do_not_fit_the_file(first, tmp_path, config, why):
    _, tensors, meant = first
    settings = {"_class_name": "NunchakuFluxTransformer2dModel"} | dict(meant.config) | config
    save_file(tensors, tmp_path / "a.safetensors", metadata={"config": json.dumps(settings, default=list)})
    with pytest.raises(UserError, match=why):
        mm.load_nunchaku(tmp_path / "a.safetensors")


def test_settings_that_are_no_object(first, tmp_path):
    _, tensors, _ = first
    for text, why in (("[1]", "a JSON object is needed"), ("{", "is no JSON"), ("[" * 9999, "nested too deeply")):
        save_file(tensors, tmp_path / "a.safetensors", metadata={"config": text})
        with pytest.raises(UserError, match=why):
            mm.load_nunchaku(tmp_path / "a.safetensors")


def test_wrong_sources_and_models(first, tmp_path):
    file, _, _ = first
    with pytest.raises(UserError, match="does not exist"):
        mm.read_nunchaku(tmp_path / "nothing", flux())
    with pytest.raises(UserError, match="is neither a nunchaku_lite folder"):
        mm.read_nunchaku(tmp_path, flux())
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(UserError, match="is no safetensors file"):
        mm.read_nunchaku(tmp_path / "text.safetensors", flux())
    with pytest.raises(UserError, match="files of Linear are not known here; known: Flux"):
        mm.read_nunchaku(file, torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="activation_bits 5"):
        mm.read_nunchaku(file, flux(), activation_bits=5)
    save_file({"a.qweight": torch.zeros(2)}, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="does not say which model"):
        mm.load_nunchaku(tmp_path / "bare.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        mm.read_nunchaku(tmp_path / "empty.safetensors", flux())
