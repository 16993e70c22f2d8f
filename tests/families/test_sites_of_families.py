"""Every family on a tiny random model of its real class: sites as a table, checked against what a traced call reads."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_families import TINY, WORDS
from torch import nn

import mm
from mm.families import family_of, find_sites, known_denoisers, rules_of
from mm.layers.linear import BranchedLinear
from mm.layers.tracing import regroup, trace

# class: family, layers at 4 bits, at 4 bits with 16-bit inputs, kept
TABLE: dict[str, tuple[str, int, int, int]] = {
    "FluxTransformer2DModel": ("flux", 17, 3, 8),
    "ChromaTransformer2DModel": ("chroma", 17, 0, 9),
    "BriaTransformer2DModel": ("bria", 17, 3, 6),
    "BriaFiboTransformer2DModel": ("bria-fibo", 17, 3, 8),
    "LongCatImageTransformer2DModel": ("longcat-image", 17, 3, 6),
    "OvisImageTransformer2DModel": ("ovis-image", 17, 3, 6),
    "Flux2Transformer2DModel": ("flux-2", 14, 3, 8),
    "Flux3Transformer2DModel": ("flux-3", 24, 6, 7),
    "SD3Transformer2DModel": ("stable-diffusion-3", 25, 4, 7),
    "QwenImageTransformer2DModel": ("qwen-image", 12, 2, 6),
    "PixArtTransformer2DModel": ("pixart-sigma", 8, 1, 7),
    "SanaTransformer2DModel": ("sana", 12, 1, 9),
    "SanaVideoTransformer3DModel": ("sana-video", 6, 1, 7),
    "ZImageTransformer2DModel": ("z-image", 21, 2, 6),
    "UNet2DConditionModel": ("stable-diffusion", 40, 0, 20),
    "HiDreamImageTransformer2DModel": ("hidream", 33, 2, 10),
    "Lumina2Transformer2DModel": ("lumina-2", 21, 2, 6),
    "LuminaNextDiT2DModel": ("lumina-next", 10, 1, 6),
    "OmniGenTransformer2DModel": ("omnigen", 6, 0, 6),
    "Kandinsky3UNet": ("kandinsky-3", 36, 82, 7),
    "Kandinsky5Transformer3DModel": ("kandinsky-5", 16, 2, 7),
    "HunyuanImageTransformer2DModel": ("hunyuan-image", 23, 4, 9),
    "HunyuanVideoTransformer3DModel": ("hunyuan-video", 23, 4, 13),
    "HunyuanDiT2DModel": ("hunyuan-dit", 20, 2, 12),
    "AuraFlowTransformer2DModel": ("aura-flow", 21, 3, 6),
    "CogView3PlusTransformer2DModel": ("cogview-3-plus", 6, 1, 8),
    "CogView4Transformer2DModel": ("cogview-4", 6, 1, 8),
    "GlmImageTransformer2DModel": ("glm-image", 6, 1, 11),
    "CogVideoXTransformer3DModel": ("cogvideox", 6, 2, 5),
    "Krea2Transformer2DModel": ("krea-2", 24, 1, 7),
    "ErnieImageTransformer2DModel": ("ernie-image", 7, 1, 5),
    "PRXTransformer2DModel": ("prx", 6, 1, 6),
    "NucleusMoEImageTransformer2DModel": ("nucleus-image", 16, 2, 8),
    "QwenImage21Transformer2DModel": ("qwen-image-2.1", 7, 1, 7),
    "DiTTransformer2DModel": ("dit", 6, 1, 4),
    "WanTransformer3DModel": ("wan", 12, 0, 8),
    "WanVACETransformer3DModel": ("wan", 30, 0, 8),
    "LTXVideoTransformer3DModel": ("ltx", 10, 1, 6),
    "MochiTransformer3DModel": ("mochi", 21, 4, 8),
    "AllegroTransformer3DModel": ("allegro", 8, 1, 7),
    "LatteTransformer3DModel": ("latte", 14, 1, 7),
    "CosmosTransformer3DModel": ("cosmos", 10, 6, 6),
    "EasyAnimateTransformer3DModel": ("easyanimate", 12, 2, 5),
    "UVit2DModel": ("amused", 30, 5, 5),
    "StableCascadeUNet": ("stable-cascade", 24, 12, 6),
    "UNetSpatioTemporalConditionModel": ("video-unet", 88, 0, 36),
    "UNetMotionModel": ("video-unet", 110, 0, 24),
}
# Text reaches these layers with more tokens than it has words: padded, behind registers, or joined with other tokens.
MORE_THAN_WORDS = {
    "ZImageTransformer2DModel", "AuraFlowTransformer2DModel", "HiDreamImageTransformer2DModel",
    "OmniGenTransformer2DModel", "Krea2Transformer2DModel", "WanTransformer3DModel", "HunyuanDiT2DModel",
    "StableCascadeUNet", "BriaFibo2Transformer2DModel",
}  # fmt: skip
TOKENS_FIRST = ("ErnieImageTransformer2DModel",)  # tokens are the first axis, before the batch
CALIBRATED = (
    "FluxTransformer2DModel", "Flux2Transformer2DModel", "SD3Transformer2DModel", "QwenImageTransformer2DModel",
    "PixArtTransformer2DModel", "SanaTransformer2DModel", "ZImageTransformer2DModel", "ChromaTransformer2DModel",
    "Lumina2Transformer2DModel", "Kandinsky3UNet", "HiDreamImageTransformer2DModel", "WanTransformer3DModel",
)  # fmt: skip
QUICK = {"rank": 1, "iterations": 1, "smooth": False, "gptq": False, "rows": 64, "calls": 1}


@pytest.mark.filterwarnings("error:mm.families")
@pytest.mark.parametrize("name", TINY)
def test_layers_have_the_precision_of_the_table_and_of_what_they_read(name):
    model, inputs = TINY[name]()
    sites = find_sites(model)
    precisions = [site.precision for site in sites]
    counts = [precisions.count(kind) for kind in ("low", "weight_only", "keep")]
    assert (family_of(name).name, *counts) == TABLE[name]
    assert [s.path for s in sites] == [p for p, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert all(site.role != "linear" for site in sites)
    lowest: dict[str, float] = {}
    for site in (s for s in sites if s.after):

        def least(_module, args, path=site.path):
            lowest[path] = min(lowest.get(path, 0.0), float(args[0].min()))

        model.get_submodule(site.path).register_forward_pre_hook(least)
    seen = trace(model, [lambda: model(**inputs)])
    groups: dict[str, list[str]] = {}
    places: dict[tuple[str, object], set[str]] = {}
    for site in sites:
        groups.setdefault(site.group, []).append(site.path)
        if site.parent and site.precision == "low":
            places.setdefault((site.parent, seen.inputs.get(site.path)), set()).add(site.group)
        if seen.tokens.get(site.path) == {1} and name not in TOKENS_FIRST:
            assert site.precision != "low", site.path  # one vector for all: time, sizes, pooled text, modulation
    assert all(seen.shared(*paths) for paths in groups.values() if len(paths) > 1)
    assert all(len(shared) == 1 for shared in places.values())  # no group is missed
    assert all(value >= -0.29 for value in lowest.values())  # below, shifted inputs would lose their sign


@pytest.mark.parametrize("name", TINY)
def test_text_sites_read_text(name):
    model, inputs = TINY[name]()
    found = family_of(model)
    seen = trace(model, [lambda: model(**inputs)])
    paths = [site.path for site in find_sites(model)]
    chosen = {path for path in paths if any(re.fullmatch(p, path) for p in (*found.text_sites, *found.edit_sites))}
    assert chosen or name == "DiTTransformer2DModel"  # drawn from classes, without text
    if name not in MORE_THAN_WORDS:
        pooled = {path for path, tokens in seen.tokens.items() if tokens == {1}}
        assert chosen & set(seen.inputs) <= seen.reading(WORDS) | pooled


def _same_after_saving(model: nn.Module, inputs: dict, folder) -> None:
    """The saved folder loads, and draws bit for bit what the quantized model draws."""
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    again.requires_grad_(False)  # torch multiplies in another order where a weight takes gradients
    with torch.no_grad():
        first, second = (_first(m(**inputs)) for m in (model, again))
    assert torch.equal(first, second)


def _first(value):
    """The first tensor of an output."""
    while not torch.is_tensor(value):
        value = value[0]
    return value


@pytest.mark.parametrize("name", TINY)
def test_quantized_without_data_saved_and_loaded(name, tmp_path):
    model, inputs = TINY[name]()
    low = {site.path for site in find_sites(model) if site.precision != "keep"}
    report = mm.quantize(model, mm.SVDQuantConfig(**QUICK, data_free=True), progress=False)
    quantized = {layer.path.removeprefix("model.") for layer in report.layers if layer.bits < 16}
    stays = {layer.path.removeprefix("model.") for layer in report.layers if layer.bits == 16}
    assert quantized == {path for path, m in model.named_modules() if isinstance(m, BranchedLinear)}
    assert quantized | stays == low
    assert all(min(model.get_submodule(path).weight.shape) < 32 for path in stays)  # they would be no smaller
    _same_after_saving(model, inputs, tmp_path)


@pytest.mark.parametrize("name", CALIBRATED)
def test_quantized_with_one_call_saved_and_loaded(name, tmp_path):
    model, inputs = TINY[name]()
    report = mm.quantize(model, mm.SVDQuantConfig(**QUICK), calibration=[inputs], progress=False)
    assert len(report.layers) == sum(TABLE[name][1:3])
    _same_after_saving(model, inputs, tmp_path)


def test_every_denoiser_of_diffusers_has_rules_or_takes_the_generic_ones():
    """The classes of TINY are all known; what is known beside them is video or needs inputs that are long to make."""
    assert set(TINY) <= set(known_denoisers())
    assert len(set(known_denoisers()) - set(TINY)) <= 30


def test_groups_of_cross_attention_by_another_name_are_split_by_the_trace():
    """Rules that join q with k and v, as for self-attention, are put right by what a call reads."""
    model, inputs = TINY["Kandinsky3UNet"]()
    sites = [
        type(site)(path=site.path, role=site.role, group=f"{site.parent}.qkv" if site.parent else site.path,
                   parent=site.parent)
        for site in find_sites(model) if re.search(r"attentions\.\d\.attention\.to_[qkv]$", site.path)
    ]  # fmt: skip
    seen = trace(model, [lambda: model(**inputs)])
    mended = {site.path: site.group for site in regroup(sites, seen)}
    crossed = "down_blocks.1.attentions.1.attention"
    assert mended[f"{crossed}.to_k"] == mended[f"{crossed}.to_v"] != mended[f"{crossed}.to_q"]
    for site in sites:
        assert seen.shared(*(s.path for s in sites if mended[s.path] == mended[site.path]))


def test_rules_are_found_through_a_subclass():
    kind = type("MyFlux", (type(TINY["FluxTransformer2DModel"]()[0]),), {})
    assert rules_of(kind) is rules_of(TINY["FluxTransformer2DModel"]()[0])
