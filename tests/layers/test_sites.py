"""Sites on tiny random models of the real classes: every linear has one, groups share an input, parents hold them."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_public import CODES, LANGUAGE, T5, TEXT, VISION, flux, pixart, qwen, sana, sd3, unet, zimage
from torch import nn

from mm.families import find_sites
from mm.models.codes import CodeHead
from mm.models.trunk import Trunk
from mm.models.velocity import VelocityDecoder


def janus() -> nn.Module:
    sight = transformers.JanusVisionConfig(**VISION, projection_dim=16, num_image_tokens=4)
    codes = transformers.JanusVQVAEConfig(**CODES, latent_channels=32, projection_dim=16, image_token_embed_dim=16)
    words = transformers.LlamaConfig(**LANGUAGE).to_dict()
    return transformers.JanusForConditionalGeneration(
        transformers.JanusConfig(text_config=words, vision_config=sight, vq_config=codes, image_token_id=3)
    )


def emu3() -> nn.Module:
    names = ["<image>", "<|extra_200|>", "<|visual token 000000|>", "<|visual token 000001|>"]
    words = transformers.Emu3TextConfig(**LANGUAGE, bos_token_id=1, eos_token_id=2).to_dict()
    codes = transformers.Emu3VQVAEConfig(**CODES, codebook_size=2, hidden_size=32, attn_resolutions=[1]).to_dict()
    return transformers.Emu3ForConditionalGeneration(
        transformers.Emu3Config(text_config=words, vq_config=codes, vocabulary_map={n: i for i, n in enumerate(names)})
    )


MODELS = {
    "trunk": lambda: Trunk(vocabulary_size=40, width=32, depth=2, heads=2, reads=True),
    "velocity": lambda: VelocityDecoder(feature_width=16, width=16, heads=2),
    "codes": lambda: CodeHead(feature_width=16, width=16, heads=2, depth=1, order=list(range(16))),
    "flux": flux,
    "sd3": sd3,
    "pixart": pixart,
    "unet": unet,
    "qwen": qwen,
    "sana": sana,
    "zimage": zimage,
    "janus": janus,
    "emu3": emu3,
    "clip": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),
    "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5, feed_forward_proj="gated-gelu")),
}


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]()


@pytest.mark.filterwarnings("error")
def test_every_linear_is_one_site_and_none_is_told_by_a_guess(model):
    sites = find_sites(model)
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [site.path for site in sites] == paths
    assert all(site.role != "linear" for site in sites)
    assert any(site.precision == "low" for site in sites)


def test_groups_read_one_width_and_parents_hold_them(model):
    sites = find_sites(model)
    for group in {site.group for site in sites}:
        members = [site for site in sites if site.group == group]
        layers = [model.get_submodule(site.path) for site in members]
        assert len({layer.in_features for layer in layers}) == 1
        assert len({(site.parent, site.precision, site.after) for site in members}) == 1
        for site in members:
            if site.parent:
                model.get_submodule(site.parent)
                assert site.path.startswith(f"{site.parent}.")


GROUPED = {
    "trunk": [("text_layers.1.in", 5), ("picture_layers.0.attn.qkv", 3)],
    "flux": [("single_transformer_blocks.0.in", 4), ("transformer_blocks.0.attn.add_qkv", 3)],
    "unet": [("mid_block.attentions.0.transformer_blocks.0.attn2.kv", 2)],
    "zimage": [("layers.0.feed_forward.up", 2), ("layers.0.attention.qkv", 3)],
    "janus": [("model.language_model.layers.0.self_attn.qkv", 3), ("model.language_model.layers.0.mlp.up", 2)],
    "emu3": [("model.text_model.layers.0.mlp.up", 2)],
    "t5": [("encoder.block.0.layer.1.DenseReluDense.up", 2)],
}


@pytest.mark.parametrize("name", GROUPED)
def test_what_reads_the_same_input_is_one_group(name):
    """Seen by running the model: the members of a group are called with the very same tensor."""
    sites = find_sites(MODELS[name]())
    for group, size in GROUPED[name]:
        assert sum(site.group == group for site in sites) == size


def test_groups_get_the_very_same_tensor():
    model = unet().eval()
    seen: dict[str, set[int]] = {}
    kept = []
    for site in find_sites(model):

        def hook(_module, args, group=site.group):
            kept.append(args[0])
            seen.setdefault(group, set()).add(id(args[0]))

        model.get_submodule(site.path).register_forward_pre_hook(hook)
    added = {"text_embeds": torch.randn(1, 8), "time_ids": torch.randn(1, 6)}
    model(torch.randn(1, 4, 16, 16), 3, torch.randn(1, 5, 32), added_cond_kwargs=added)
    assert seen
    assert all(len(tensors) == 1 for tensors in seen.values())


def test_practice_of_the_families():
    at = {site.path: site for site in find_sites(pixart())}
    assert at["transformer_blocks.0.attn2.to_k"].precision == "keep"
    assert at["transformer_blocks.0.attn2.to_k"].reads == "text"
    assert at["transformer_blocks.0.attn1.to_k"].precision == "low"
    assert at["transformer_blocks.0.ff.net.2"].after == "gelu"
    assert at["adaln_single.linear"].precision == "weight_only"
    assert at["adaln_single.emb.timestep_embedder.linear_1"].precision == "keep"
    at = {site.path: site for site in find_sites(janus())}
    assert at["model.vision_model.encoder.layers.0.self_attn.q_proj"].precision == "keep"
    assert at["model.generation_head.proj_out"].precision == "keep"
    assert at["model.language_model.layers.0.self_attn.q_proj"].parent == ""  # attention's cache grows at each call
    at = {site.path: site for site in find_sites(unet())}
    place = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert at[f"{place}.ff.net.2"].after is None  # a gated product has no lower bound
    assert (at[f"{place}.attn2.to_v"].role, at[f"{place}.attn2.to_v"].reads) == ("cross_v", "text")


def test_unknown_models_are_told_apart_by_names_and_say_so():
    model = nn.ModuleDict({"attn": nn.ModuleDict({"to_q": nn.Linear(4, 4)}), "lm_head": nn.Linear(4, 9)})
    with pytest.warns(UserWarning, match="no rules for ModuleDict"):
        sites = find_sites(model)
    assert [(site.role, site.precision) for site in sites] == [("attn_q", "low"), ("embed", "keep")]
