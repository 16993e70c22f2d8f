"""LoRA calls of diffusers on mm's pipelines: names, weights, files, swaps, scales, fusing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import draw, seeded, tiny_pipeline
from trunk_loras import CONFIG, NEAR, lora_of

import mm
from mm import TextToImagePipeline
from mm.core.errors import UserError


def test_adapters_without_a_name_are_numbered() -> None:
    pipe = tiny_pipeline()
    pipe.load_lora_weights(lora_of(pipe, 1))
    pipe.load_lora_weights(lora_of(pipe, 2))
    assert pipe.get_list_adapters() == {"trunk": ["default_0", "default_1"]}
    assert pipe.get_active_adapters() == ["default_1"]
    with pytest.raises(UserError, match="unknown argument 'weightname'"):
        pipe.load_lora_weights(lora_of(pipe, 2), weightname="x")
    with pytest.raises(UserError, match="pickled"):
        pipe.load_lora_weights(lora_of(pipe, 2), use_safetensors=False)


def test_adapters_of_peft_are_seen_weighted_and_removed() -> None:
    pipe = tiny_pipeline()
    plain = draw(pipe)
    torch.manual_seed(0)
    pipe.trunk.add_adapter(CONFIG, "theirs")
    assert pipe.get_list_adapters() == {"trunk": ["theirs"]}
    assert pipe.get_active_adapters() == ["theirs"]
    theirs = draw(pipe)
    assert not torch.allclose(theirs, plain, atol=1e-3)
    with pytest.raises(UserError, match="added to the trunk by peft"):
        pipe.load_lora_weights(lora_of(pipe, 1), "theirs")
    pipe.load_lora_weights(lora_of(pipe, 1), "ours")
    assert pipe.get_active_adapters() == ["ours"]
    pipe.set_adapters(["theirs", "ours"], [1.0, 0.0])
    torch.testing.assert_close(draw(pipe), theirs, **NEAR)
    pipe.set_adapters(["ours"])
    ours = draw(pipe)
    pipe.set_adapters(["ours", "theirs"], [1.0, 0.5])
    assert not torch.allclose(draw(pipe), ours, atol=1e-3)
    assert set(pipe.get_active_adapters()) == {"ours", "theirs"}
    pipe.disable_lora()
    torch.testing.assert_close(draw(pipe), plain, **NEAR)
    pipe.enable_lora()
    pipe.delete_adapters("theirs")
    assert pipe.get_list_adapters() == {"trunk": ["ours"]}
    pipe.trunk.add_adapter(CONFIG, "again")
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {}
    assert torch.equal(draw(pipe), plain)


def test_saving_with_diffusers_arguments(tmp_path: Path) -> None:
    """As training scripts do: on the class, with what peft gives."""
    pipe, other = tiny_pipeline(), tiny_pipeline()
    torch.manual_seed(0)
    pipe.trunk.add_adapter(CONFIG, "theirs")
    want = draw(pipe)
    layers = get_peft_model_state_dict(pipe.trunk, adapter_name="theirs")
    TextToImagePipeline.save_lora_weights(save_directory=tmp_path, transformer_lora_layers=layers)
    assert len(load_file(tmp_path / "pytorch_lora_weights.safetensors")) == len(layers)
    tensors = TextToImagePipeline.lora_state_dict(tmp_path)
    assert {key.removeprefix("trunk.") for key in tensors} == set(layers)
    assert str(other.load_lora_weights(tmp_path)) == "8 of 8 tensors applied to 4 layers"
    torch.testing.assert_close(draw(other), want, **NEAR)
    other.unload_lora_weights()
    other.load_lora_weights({f"mine.{key}": t for key, t in layers.items()}, prefix="mine")
    torch.testing.assert_close(draw(other), want, **NEAR)
    other.save_lora_weights(tmp_path / "again", weight_name="a.safetensors")
    assert (tmp_path / "again" / "a.safetensors").is_file()
    with pytest.raises(UserError, match="begins with 'unet'"):
        other.load_lora_weights(layers, prefix="unet")
    with pytest.raises(UserError, match="pickle"):
        other.save_lora_weights(tmp_path, safe_serialization=False)
    with pytest.raises(UserError, match="nothing to save"):
        TextToImagePipeline.save_lora_weights(tmp_path)


def test_a_hot_swap_keeps_the_weight_and_puts_the_old_one_back_where_the_new_one_fails() -> None:
    pipe, twin = tiny_pipeline(), tiny_pipeline()
    pipe.load_lora_weights(lora_of(pipe, 1), "a")
    pipe.set_adapters("a", 0.5)
    first = draw(pipe)
    pipe.enable_lora_hotswap(target_rank=8)
    wrong = lora_of(pipe, 2) | {"trunk.no.such.lora_A.weight": torch.zeros(2, 32)}
    with pytest.raises(UserError, match=r"not: trunk\.no\.such"):
        pipe.load_lora_weights(wrong, "a", hotswap=True)
    assert torch.equal(draw(pipe), first)
    pipe.load_lora_weights(lora_of(pipe, 2), "a", hotswap=True)
    twin.load_lora_weights(lora_of(pipe, 2), "a")
    twin.set_adapters("a", 0.5)
    torch.testing.assert_close(draw(pipe), draw(twin), **NEAR)
    with pytest.raises(UserError, match="'b' is not loaded"):
        pipe.load_lora_weights(lora_of(pipe, 2), "b", hotswap=True)


def test_fused_adapters_are_counted_and_components_checked() -> None:
    pipe = tiny_pipeline()
    pipe.load_lora_weights(lora_of(pipe, 1), "a")
    pipe.fuse_lora(components=["trunk"])
    assert (pipe.num_fused_loras, pipe.fused_loras) == (1, {"a"})
    pipe.unfuse_lora(components=["trunk"])
    assert (pipe.num_fused_loras, pipe.fused_loras) == (0, set())
    with pytest.raises(UserError, match=r"\['text_encoder'\]; adapters of this pipeline act on \['trunk'\]"):
        pipe.fuse_lora(components=["text_encoder"])


def test_an_adapter_moved_away_does_not_act_and_comes_back() -> None:
    pipe = tiny_pipeline()
    plain = draw(pipe)
    pipe.load_lora_weights(lora_of(pipe, 1), "a")
    with_lora = draw(pipe)
    pipe.set_lora_device(["a"], "meta")  # any other device than the trunk's
    assert torch.equal(draw(pipe), plain)
    assert pipe.get_list_adapters() == {"trunk": ["a"]}
    with pytest.raises(UserError, match="put it back with set_lora_device"):
        pipe.set_adapters("a")
    pipe.delete_adapters("a")
    pipe.load_lora_weights(lora_of(pipe, 1), "a")
    pipe.set_lora_device("a", "cpu")  # where it is already
    assert torch.equal(draw(pipe), with_lora)


def test_calls_at_two_scales_in_two_threads_do_not_mix() -> None:
    pipe = tiny_pipeline()
    pipe.load_lora_weights(lora_of(pipe, 1), "a")
    scales = [1.0, 0.3, 1.0, 0.6]
    want = [draw(pipe, attention_kwargs={"scale": s}) for s in scales]
    got: dict[int, torch.Tensor] = {}

    def work(k: int) -> None:
        got[k] = draw(pipe, attention_kwargs={"scale": scales[k]})

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(4):
        torch.testing.assert_close(got[k], want[k], **NEAR)

    def nested(_pipe: Any, _step: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
        draw(pipe, attention_kwargs={"scale": 0.3})
        return {}

    with pytest.raises(UserError, match="began within one of another scale"):
        draw(pipe, callback_on_step_end=nested)
    torch.testing.assert_close(draw(pipe), want[0], **NEAR)


def test_a_quantized_trunk_takes_them_too() -> None:
    pipe = tiny_pipeline()
    mm.quantize(pipe, mm.SVDQuantConfig(rank=4, data_free=True, smooth=False), progress=False)
    plain = draw(pipe, ["a cat", "a dog"], negative_prompt=["a cup", "a hat"])
    alone = draw(pipe, "a dog", negative_prompt="a hat", generator=seeded(8)[0])
    assert torch.equal(plain[1:], alone)  # drawn one by one: the same bits
    embeds, negative = pipe.encode_prompt(["a cat", "a dog"])
    assert draw(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative).shape == (2, 3, 128, 128)
