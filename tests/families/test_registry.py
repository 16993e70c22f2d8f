"""The registry: which family a model is of, families of other packages, and models of no known family."""

from __future__ import annotations

import importlib
import sys
import textwrap
import warnings
from dataclasses import replace

import pytest
import torch
from tiny_families import TINY
from torch import nn

import mm
from mm.core.errors import UserError
from mm.families import Family, families, family_named, family_of, find_sites, quantizable_parts, register, unregister
from mm.families import registry as registry_module
from mm.families.family import LatentPreview, LoraNames, SizeRule, resolve
from mm.families.previews import fit
from mm.layers.linear import BranchedLinear
from mm.layers.sites import Rule

QUICK = {"rank": 1, "iterations": 1, "smooth": False, "gptq": False}
PACKAGE = """
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from mm.families import Family
from mm.families.rules import attention, keep


class HareTransformer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 64):
        super().__init__()
        self.entrance = nn.Linear(4, width)
        self.hops = nn.ModuleList([nn.ModuleDict({n: nn.Linear(width, width) for n in ("to_q", "to_k", "to_v")})])

    def forward(self, x):
        x = self.entrance(x)
        hop = self.hops[0]
        return hop["to_v"](x) * torch.sigmoid(hop["to_q"](x) * hop["to_k"](x))


HARE = Family(
    name="hare",
    pipelines={"text_to_image": "hare_family:HarePipeline"},
    denoisers={"HareTransformer": (*attention(r"hops\\.\\d+"), *keep("entrance"))},
    steps=3,
    no_preview="none was fitted",
)
"""


@pytest.fixture
def fresh(monkeypatch):
    """The registry as at the start of a process, put back afterwards."""
    monkeypatch.setattr(registry_module, "_families", {})
    monkeypatch.setattr(registry_module, "_loaded", False)


@pytest.fixture
def package(tmp_path, monkeypatch, fresh):
    """A third party's package with one good and one broken entry point, installed into a folder on the path."""
    (tmp_path / "hare_family.py").write_text(PACKAGE)
    info = tmp_path / "hare_family-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hare-family\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        textwrap.dedent("""
        [mm.families]
        hare = hare_family:HARE
        tortoise = hare_family:TORTOISE
        number = hare_family:__doc__
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("hare_family", None)


def test_a_third_partys_family_is_found_quantized_saved_and_loaded(package, tmp_path):
    with pytest.warns(UserWarning) as caught:
        assert family_named("hare").steps_for() == 3
    messages = [str(w.message) for w in caught]
    assert any("tortoise = hare_family:TORTOISE cannot be loaded" in text for text in messages)
    assert any("number = hare_family:__doc__ cannot be loaded" in text for text in messages)
    import hare_family

    torch.manual_seed(0)
    model = hare_family.HareTransformer().eval()
    assert family_of(model).name == "hare"
    x = torch.randn(2, 5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = mm.quantize(model, mm.SVDQuantConfig(**QUICK), calibration=[{"x": x}], progress=False)
    assert [layer.path for layer in report.layers] == [f"model.hops.0.to_{n}" for n in "qkv"]
    assert not isinstance(model.entrance, BranchedLinear)
    model.save_pretrained(tmp_path / "saved")
    again = hare_family.HareTransformer.from_pretrained(tmp_path / "saved")
    assert torch.equal(model(x), again(x))


def test_names_classes_and_configs_tell_families_apart():
    wanted = {
        "FluxPipeline": "flux", "FluxKontextPipeline": "flux-kontext", "FluxFillPipeline": "flux-fill",
        "FluxTransformer2DModel": "flux", "Flux2KleinPipeline": "flux-2-klein", "Flux2Transformer2DModel": "flux-2",
        "UNet2DConditionModel": "stable-diffusion", "StableDiffusionXLPipeline": "stable-diffusion-xl",
        "QwenImageEditPlusPipeline": "qwen-image-edit", "SanaSprintPipeline": "sana-sprint",
        "PixArtAlphaPipeline": "pixart-alpha", "TextToImagePipeline": "mm-tiny", "mm:TextToImagePipeline": "mm-tiny",
        "janus": "janus", "Emu3ForConditionalGeneration": "emu3", "Kandinsky5T2IPipeline": "kandinsky-5",
    }  # fmt: skip
    assert {name: family_of(name).name for name in wanted} == wanted
    assert family_of("UNet2DConditionModel", {"addition_embed_type": "text_time"}).name == "stable-diffusion-xl"
    assert family_of("FluxTransformer2DModel", {"guidance_embeds": False, "in_channels": 64}).name == "flux-schnell"
    assert family_of(nn.Linear(2, 2)) is None
    assert family_of("NoSuchPipeline") is None
    with pytest.raises(KeyError, match=r"no family 'fluxx'; known: .*flux"):
        family_named("fluxx")


def test_families_are_registered_replaced_and_taken_off(fresh):
    mine = replace(family_named("flux"), name="mine", denoisers={"Mine": ()}, pipelines={}, more_pipelines=())
    assert register(mine) is mine
    assert family_of("Mine") is mine
    with pytest.raises(UserError, match="'mine' is registered already"):
        register(mine)
    other = replace(mine, steps=7)
    assert register(other, replace=True) is family_of("Mine")
    unregister("mine")
    assert family_of("Mine") is None
    with pytest.raises(TypeError, match=r"no mm\.families\.Family"):
        register("mine")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "Two Words"}, "lower case"),
        ({"name": "x", "pipelines": {}}, "neither a pipeline nor a denoiser"),
        ({"name": "x", "steps": {"flow": 3}}, "steps for"),
        ({"name": "x", "no_preview": ""}, "latent preview or `no_preview`"),
    ],
)
def test_families_refuse_what_makes_no_sense(fields, message):
    good = {"name": "good", "pipelines": {"text_to_image": "GoodPipeline"}, "no_preview": "none"}
    with pytest.raises(ValueError, match=message):
        Family(**(good | fields))


def test_parts_of_a_family_refuse_bad_values():
    with pytest.raises(ValueError, match="no multiple of 16"):
        SizeRule(default=500)
    with pytest.raises(ValueError, match="three factors a channel"):
        LatentPreview(factors=((1.0, 2.0),), source="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names a group"):
        Rule(r"a\.b", "role", group="{1}.x")
    with pytest.raises(ValueError, match="no regular expression"):
        Rule("(", "role")
    with pytest.raises(ValueError, match="module:name"):
        resolve("math.pi")
    assert SizeRule(default=512, multiple=8).nearest(515) == 512
    assert LoraNames(components={"a": "unet"}, kohya={"lora_te_": "text_encoder"}).text == ("text_encoder",)


def test_every_family_is_complete():
    names = [known.name for known in families()]
    assert len(names) == len(set(names))
    for known in families():
        assert known.calibration_prompts(3) and len(known.calibration_prompts(3)) == 3
        assert known.steps_for() >= 1
        if known.preview:
            assert known.preview.source


def test_the_fit_of_a_preview_finds_a_linear_map():
    torch.manual_seed(0)
    latents, map_C3 = torch.randn(4, 3, 4, 4), torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.5, 0.1], [-0.2, 0.1, 0.0]])
    pictures = torch.einsum("bchw,cr->brhw", latents, map_C3) + 0.25
    found = fit(latents, pictures.repeat_interleave(8, 2).repeat_interleave(8, 3), "a known map")
    assert torch.allclose(torch.tensor(found.factors), map_C3, atol=1e-3)
    assert found.bias == pytest.approx((0.25, 0.25, 0.25), abs=1e-3)


class Unknown(nn.Module):
    """A transformer of no family: ends named as in diffusers' classes, cross-attention under a new name."""

    def __init__(self) -> None:
        super().__init__()
        ends = ("img_in", "txt_in", "time_in", "time_token", "vector_in")
        self.ends = nn.ModuleDict({name: nn.Linear(32, 32) for name in ends})
        for name, module in self.ends.items():
            setattr(self, name, module)
        del self.ends
        layer = {"to_q": nn.Linear(32, 32), "to_k": nn.Linear(32, 32), "to_v": nn.Linear(32, 32)}
        self.blocks = nn.ModuleList([nn.ModuleDict({"text_attention": nn.ModuleDict(layer), "mix": nn.Linear(32, 32)})])
        self.distilled_guidance_layer = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(32, 32)])})
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(32, 64)})
        self.final_layer = nn.ModuleDict({"linear": nn.Linear(32, 4)})
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x, text):
        x, text = self.img_in(x), self.txt_in(text)
        block = self.blocks[0]
        k, v = (block["text_attention"][n](text) for n in ("to_k", "to_v"))
        x = x + nn.functional.scaled_dot_product_attention(block["text_attention"]["to_q"](x), k, v)
        x = block["mix"](x) + self.attention(x, x, x)[0]
        return self.final_layer["linear"](x)


def test_an_unknown_model_keeps_its_ends_and_its_groups_are_careful():
    model = Unknown().eval()
    with pytest.warns(UserWarning, match="no rules for Unknown"):
        at = {site.path: site for site in find_sites(model)}
    low = {path for path, site in at.items() if site.precision == "low"}
    attention = "blocks.0.text_attention"
    assert low == {f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v", "blocks.0.mix"}
    assert at[f"{attention}.to_k"].group == at[f"{attention}.to_v"].group != at[f"{attention}.to_q"].group
    calls = [{"x": torch.randn(1, 9, 32), "text": torch.randn(1, 5, 32)}]
    with pytest.warns(UserWarning, match="no rules for Unknown"):
        mm.quantize(model, mm.SVDQuantConfig(**QUICK), calibration=calls, progress=False)
    assert {p for p, m in model.named_modules() if isinstance(m, BranchedLinear)} == low
    assert model(**calls[0]).isfinite().all()


class Pipe:
    """Something with components, as a pipeline has them."""

    def __init__(self, **components: nn.Module) -> None:
        self.components = components


def test_parts_that_draw_are_chosen_and_others_never():
    flux = TINY["FluxTransformer2DModel"]()[0]
    vae = nn.ModuleDict({"attn": nn.ModuleDict({"to_q": nn.Linear(4, 4)})})
    pipe = Pipe(transformer=flux, vae=vae, text_encoder=vae, controlnet=vae, transformer_2=Unknown())
    assert list(quantizable_parts(pipe)) == ["transformer", "transformer_2"]
    assert list(quantizable_parts(pipe, ["vae"])) == ["vae"]
    assert quantizable_parts(flux) == {"model": flux}
    with pytest.raises(UserError, match=r"no part that draws among vae \(ModuleDict\)"):
        quantizable_parts(Pipe(vae=vae))
    with pytest.raises(UserError, match="has no module unett"):
        quantizable_parts(pipe, ["unett"])
