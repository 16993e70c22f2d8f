"""What a model brings along that would go wrong in silence: each is refused, handled or named in the report."""

from __future__ import annotations

import dataclasses
import json

import diffusers
import pytest
import tiny_calibration as tiny
import torch
import transformers
from damaged import damaged_states
from safetensors.torch import load_file, save_file
from tiny_block import INPUTS, SMALL, block
from tiny_public import flux, flux_inputs
from torch import nn

import mm
from mm.core.errors import UserError
from mm.layers.linear import Branch, BranchedLinear
from mm.layers.surgery import branched
from mm.quantization import numerics as n
from mm.quantization import sources
from mm.quantization.quantize import GROWS

CONFIG = mm.SVDQuantConfig(rank=4, data_free=True)
pytestmark = pytest.mark.filterwarnings("ignore:mm")


def test_an_adapter_of_peft_is_refused_before_anything_changes():
    from peft import LoraConfig

    model = flux()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"adapters attached by peft \(style\).*unload_lora_weights"):
        mm.quantize(model, CONFIG, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_branches_that_are_attached_stay_and_are_named():
    plain, adapted = block(), block()
    g = torch.Generator().manual_seed(0)
    branch = Branch(name="style", down=torch.randn(2, 64, generator=g), up=torch.randn(64, 2, generator=g) / 8)
    branched(adapted, "attn.to_v").attach(branch)
    wanted = adapted(**INPUTS[0])
    with pytest.warns(UserWarning, match="adapters style stay attached"):
        report = mm.quantize(adapted, SMALL, calibration=INPUTS, progress=False)
    assert report.adapters == ["style"]
    assert (adapted(**INPUTS[0]) - wanted).norm() < 0.15 * wanted.norm()
    layer = adapted.get_submodule("attn.to_v")
    layer.detach("style")
    mm.quantize(plain, SMALL, calibration=INPUTS, progress=False)
    want = plain.get_submodule("attn.to_v").base_weight(torch.float32)
    assert (layer.base_weight(torch.float32) - want).norm() < 0.15 * want.norm()  # not baked in


def test_layers_that_would_grow_stay_and_are_listed():
    model = nn.ModuleDict({"small": nn.Linear(16, 80), "large": nn.Linear(128, 80)})
    report = mm.quantize(model, CONFIG, progress=False)
    assert report.notes() == {GROWS: ["model.small"]}
    assert not isinstance(model["small"], BranchedLinear)
    assert all(layer.bytes_after < layer.bytes_before for layer in report.layers if layer.bits != 16)
    with pytest.raises(UserError, match="nothing is quantized: stays at 16 bits"):
        mm.quantize(nn.ModuleDict({"small": nn.Linear(16, 80)}), CONFIG, progress=False)


def test_nothing_to_quantize_is_an_error_that_says_why():
    model = block()
    mm.quantize(model, CONFIG, progress=False)
    with pytest.raises(UserError, match=r"quantized already \(5 layers\)"):
        mm.quantize(model, CONFIG, progress=False)
    gpt = transformers.GPT2Model(transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=50))
    with pytest.raises(UserError, match="Conv1D of transformers"):
        mm.quantize(gpt, CONFIG, progress=False)


class Experts(nn.Module):
    """A mixture as one 3-D parameter, beside a plain layer and an expert that no token reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.idle, self.dead = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.stacked = nn.Parameter(torch.randn(4, 64, 64) / 8)
        nn.init.zeros_(self.dead.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x)
        return x + self.idle(x[:0]).sum() + self.dead(x) + torch.einsum("...k,ekn->...n", x, self.stacked)


def test_experts_in_one_parameter_without_tokens_and_of_zeros():
    torch.manual_seed(0)
    model = Experts()
    with pytest.warns(UserWarning, match="stay at 16 bits, since they are one 3-D parameter"):
        report = mm.quantize(model, SMALL, calibration=[{"x": torch.randn(20, 64)}], progress=False)
    assert report.untouched == [
        {"path": "model.stacked", "kind": "one 3-D parameter, as mixtures of experts have", "weights": 4 * 64 * 64}
    ]
    assert report.notes() == {"its input was never seen in calibration: quantized without data": ["model.idle"]}
    assert not model.dead.base_weight().any()
    assert bool(model(torch.randn(3, 64)).isfinite().all())


def test_damaged_weights_and_inputs_are_named():
    model = block()
    model.up.weight.data[3, 4] = torch.nan
    before = model.down.weight
    with pytest.raises(UserError, match=r"model\.up: 1 of 8192 weights are NaN or infinite"):
        mm.quantize(model, CONFIG, progress=False)
    assert model.down.weight is before
    bad = [{"x": torch.full((1, 9, 64), torch.inf)}]
    with pytest.raises(UserError, match=r"the input of model\.attn\.to_q holds NaN or infinity"):
        mm.quantize(block(), SMALL, calibration=bad, progress=False)


@pytest.mark.filterwarnings("ignore:mm.families")
def test_a_pattern_to_keep_that_matches_nothing_is_named():
    config = mm.SVDQuantConfig(rank=4, data_free=True, keep=(r"^up$", "no_such_layer"))
    with pytest.warns(
        UserWarning, match=r"keep holds 'no_such_layer', which no linear layer of model matches.* attn\.to_q"
    ):
        report = mm.quantize(block(), config, progress=False)
    assert "model.up" not in [layer.path for layer in report.layers]


class _Packed(nn.Linear):
    """Packs two weights a byte, as other libraries do."""

    def __init__(self) -> None:
        super().__init__(128, 64)
        self.weight = nn.Parameter(torch.zeros(64 * 64, 1, dtype=torch.uint8), requires_grad=False)


@pytest.mark.filterwarnings("ignore:mm.families")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda model: model.down.to(torch.float8_e4m3fn), "whose weight is float8_e4m3fn"),
        (lambda model: setattr(model, "down", _Packed()), "whose weight is uint8"),
    ],
)
def test_weights_that_another_program_packed_are_refused_before_anything_changes(change, why):
    model = block().requires_grad_(False)
    change(model)
    with pytest.raises(UserError, match=rf"model\.down is .*{why}"):
        mm.quantize(model, CONFIG, progress=False)
    assert type(model.up) is nn.Linear


def test_a_singular_hessian_is_damped_and_a_hopeless_one_has_no_factor():
    x = torch.randn(300, 1) @ torch.randn(1, 128) * 1e4  # one direction only
    gram = n.Gram(x)
    weight = torch.randn(20, 128)
    got = n.error_feedback(weight, n.group_scales(weight, 4, torch.float32), 4, gram)
    assert bool(got.dense().isfinite().all())
    # Rounding made it indefinite by more than the usual damping: more of it is taken.
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -0.5]))
    factor = n.damped_cholesky(indefinite, 0.01, 0.0)
    assert factor is not None
    assert n.damped_cholesky(torch.full((3, 3), torch.nan), 0.01, 0.0) is None
    gram.whole = torch.full((128, 128), torch.nan)
    nearest = n.round_to_nearest(weight, n.group_scales(weight, 4, torch.float32), 4)
    again = n.error_feedback(weight, n.group_scales(weight, 4, torch.float32), 4, gram)
    assert torch.equal(again.values, nearest.values)
    assert gram.singular


def test_a_resume_folder_belongs_to_one_model_settings_and_calibration(tmp_path):
    mm.quantize(block(), SMALL, calibration=INPUTS, progress=False, resume=tmp_path)
    other = block()
    other.up.weight.data += 1
    with pytest.raises(UserError, match="quantized from another model"):
        mm.quantize(other, SMALL, calibration=INPUTS, progress=False, resume=tmp_path)
    assert not isinstance(other.up, BranchedLinear)
    with pytest.raises(UserError, match="other settings"):
        changed = dataclasses.replace(SMALL, rank=2)
        mm.quantize(block(), changed, calibration=INPUTS, progress=False, resume=tmp_path)
    mm.quantize(block(), SMALL, calibration=INPUTS, progress=False, resume=tmp_path)
    foreign = tmp_path / "mine"
    foreign.mkdir()
    save_file({"x": torch.zeros(1)}, foreign / "weights.safetensors")
    with pytest.raises(UserError, match="no folder of a stopped run"):
        mm.quantize(block(), SMALL, calibration=INPUTS, progress=False, resume=foreign)


def test_damaged_parts_of_a_stopped_run_are_one_error_that_says_what_to_do(tmp_path):
    mm.quantize(block(), SMALL, calibration=INPUTS, progress=False, resume=tmp_path)
    part, mark = next(tmp_path.glob("*.safetensors")), tmp_path / "base.json"
    whole, kept = part.read_bytes(), mark.read_bytes()
    for done, data in damaged_states(part):
        if done in ("without tensors", "rule = {}") or done.endswith("of another shape"):
            continue
        part.write_bytes(data)
        with pytest.raises(UserError) as caught:
            mm.quantize(block(), SMALL, calibration=INPUTS, progress=False, resume=tmp_path)
        assert f"; delete {part}, and its layers are quantized again" in str(caught.value), (done, str(caught.value))
    part.write_bytes(whole)
    for data in (b"", b"[]", b"{", b"\xff"):
        mark.write_bytes(data)
        with pytest.raises(UserError, match=f"{mark}.*; remove {tmp_path}, or choose another folder"):
            mm.quantize(block(), SMALL, calibration=INPUTS, progress=False, resume=tmp_path)
    mark.write_bytes(kept)
    mm.quantize(block(), SMALL, calibration=INPUTS, progress=False, resume=tmp_path)


def test_fusing_projections_of_a_quantized_model_is_refused(tmp_path):
    pipe = tiny.sdxl()
    mm.quantize(pipe.unet, CONFIG, progress=False)
    with pytest.raises(UserError, match="fuse_qkv_projections would replace quantized layers"):
        pipe.unet.fuse_qkv_projections()
    pipe.unet.save_pretrained(tmp_path)
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="fuse_qkv_projections"):
        loaded.fuse_qkv_projections()
    fused = tiny.sdxl().unet
    fused.fuse_qkv_projections()
    with pytest.raises(UserError, match="unfuse_qkv_projections"):
        mm.quantize(fused, CONFIG, progress=False)


@pytest.mark.filterwarnings("error:.*torch_dtype")  # a name that diffusers gives up
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_copy_keeps_the_type_of_its_source(tmp_path, dtype):
    from mm.quantization.folders import quantize_folder

    source = tiny.sdxl().to(dtype)
    source.save_pretrained(tmp_path / "source")
    config = mm.SVDQuantConfig(rank=2, data_free=True)
    report = quantize_folder(f"{tmp_path}/source", f"{tmp_path}/small", config, pictures=0, progress=False)
    unet = load_file(tmp_path / "small" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in unet.values() if tensor.is_floating_point()} == {dtype}
    for part, file in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        kept, made = (load_file(tmp_path / w / part / f"{file}.safetensors") for w in ("source", "small"))
        assert kept.keys() == made.keys()
        assert all(torch.equal(made[name], tensor) for name, tensor in kept.items()), part
    plain = source.unet.conv_in.weight
    assert torch.equal(unet["conv_in.weight"], plain)
    whole = report.whole
    assert whole["folder_after"] < whole["folder_before"]
    assert json.loads((tmp_path / "small" / "report.json").read_text())["whole"] == whole


def test_pickles_are_refused_and_variants_are_read(tmp_path):
    folder = tmp_path / "source"
    pipe = tiny.sdxl().to(torch.float16)
    pipe.save_pretrained(folder, variant="fp16")
    parts = sources.stored_parts(folder, "fp16")
    assert {part.main for part in parts.values()} == {torch.float16}
    with pytest.raises(UserError, match="no file of variant 'bf16'"):
        sources.stored_parts(folder, "bf16")
    file = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    file.rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="is a pickle, and reading one may run code"):
        sources.stored_parts(folder)


def test_saved_and_loaded_a_model_gives_the_same_outputs(tmp_path):
    torch.manual_seed(0)
    model = flux().eval()
    mm.quantize(model, CONFIG, progress=False)
    model.save_pretrained(tmp_path)
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**flux_inputs()).sample, model(**flux_inputs()).sample)
    assert all(p.data_ptr() % 64 == 0 for p in loaded.parameters())


def test_from_config_of_a_quantized_model_is_a_16_bit_one_that_saves_as_such(tmp_path):
    model = flux()
    mm.quantize(model, CONFIG, progress=False)
    fresh = diffusers.FluxTransformer2DModel.from_config(model.config)
    assert not any(isinstance(m, BranchedLinear) for m in fresh.modules())
    fresh.save_pretrained(tmp_path / "first")  # diffusers' from_config keeps the mark in the config
    with pytest.warns(UserWarning, match="names 4-bit layers and its weights are plain; loaded at 16 bits"):
        again = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "first")
    assert not any(isinstance(m, BranchedLinear) for m in again.modules())
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), again.parameters(), strict=True))
    again.save_pretrained(tmp_path / "second")
    assert "quantization_config" not in (tmp_path / "second" / "config.json").read_text()
    mm.quantize(again, CONFIG, progress=False)
    assert any(isinstance(m, BranchedLinear) for m in again.modules())


def test_the_same_of_a_text_encoder(tmp_path):
    sizes = {"d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    model = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    mm.quantize(model, CONFIG, progress=False)
    fresh = transformers.T5EncoderModel(model.config)
    fresh.save_pretrained(tmp_path / "first")
    with pytest.warns(UserWarning, match="names 4-bit layers and its weights are plain; loaded at 16 bits"):
        again = transformers.T5EncoderModel.from_pretrained(tmp_path / "first")
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), again.parameters(), strict=True))
    again.save_pretrained(tmp_path / "second")
    assert "quantization_config" not in (tmp_path / "second" / "config.json").read_text()
