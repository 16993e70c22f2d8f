"""The settings beside a LoRA file mean what they mean in peft, or are named."""

from __future__ import annotations

import json
import time

import pytest
from lora_cases import TO_Q, pair
from lora_families import fresh
from safetensors.torch import save_file

import mm
from mm.adapters.formats.settings import matches
from mm.core.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def model():
    return fresh("FLUX")


def read_with(tmp_path, model, **settings):
    save_file(pair(TO_Q), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    return mm.read_lora(tmp_path, model).entries[TO_Q].scale


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "lycoris_", "transformer.", "lora_unet_"])
def test_settings_of_another_adapter_in_the_folder(model, tmp_path, prefix):
    """A folder of downloads: peft's settings belong to peft's file, and give no other one a strength."""
    stem = prefix + (TO_Q.replace(".", "_") if prefix.endswith("_") else TO_Q)
    save_file(pair(stem), tmp_path / "style.safetensors")
    save_file(pair(f"base_model.model.{TO_Q}"), tmp_path / "renamed.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 32, "r": 2}))
    assert mm.read_lora(tmp_path / "style.safetensors", model).entries[TO_Q].scale == 1
    assert mm.read_lora(tmp_path / "renamed.safetensors", model).entries[TO_Q].scale == 16


def test_a_file_of_peft_without_its_settings_warns(model, tmp_path):
    save_file(pair(TO_Q), tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match=r"has no adapter_config\.json beside it, .* it acts in full"):
        assert mm.read_lora(tmp_path, model).entries[TO_Q].scale == 1


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
