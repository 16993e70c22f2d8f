"""LoRA on the pipeline: the sum it stands for, there and back, and never in part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import draw, seeded, tiny_pipeline

import mm
from mm import TextToImagePipeline
from mm.core.errors import UserError
from mm.quantization.config import SVDQuantConfig


def lora_of(pipe: TextToImagePipeline, rank: int = 2) -> dict[str, torch.Tensor]:
    generator = seeded(3)[0]
    tensors = {}
    for name, module in pipe.trunk.named_modules():
        if name.endswith(("to_k_pic", "to_v_pic")):
            tensors[f"trunk.{name}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator)
            tensors[f"trunk.{name}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator)
    return tensors


def test_lora_is_the_sum_it_stands_for(tmp_path: Path) -> None:
    pipe, baked = tiny_pipeline(), tiny_pipeline()
    plain, tensors = draw(pipe), lora_of(pipe)
    for name, module in baked.trunk.named_modules():
        if f"trunk.{name}.lora_A.weight" in tensors:
            module.weight.data += 0.5 * tensors[f"trunk.{name}.lora_B.weight"] @ tensors[f"trunk.{name}.lora_A.weight"]
    pipe.load_lora_weights(tensors)
    assert torch.allclose(draw(pipe, attention_kwargs={"scale": 0.5}), draw(baked), atol=1e-4)
    with_lora = draw(pipe)
    assert not torch.allclose(with_lora, plain, atol=1e-3)
    pipe.save_lora_weights(tmp_path)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)
    pipe.load_lora_weights(tmp_path, adapter_name="again")
    assert torch.allclose(draw(pipe), with_lora, atol=1e-5)
    assert pipe.get_active_adapters() == ["again"]
    pipe.set_adapters("again", 0.5)
    assert torch.allclose(draw(pipe), draw(baked), atol=1e-4)


def test_a_lora_that_does_not_match_raises_and_changes_nothing(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    plain, tensors = draw(pipe), lora_of(pipe)
    wrong = dict(tensors) | {"trunk.no.such.lora_A.weight": torch.zeros(2, 32)}
    with pytest.raises(UserError, match=r"4 of 5 LoRA layers are in this model; not: trunk\.no\.such"):
        pipe.load_lora_weights(wrong)
    first = next(iter(tensors))
    with pytest.raises(UserError, match=r"made for"):
        pipe.load_lora_weights(tensors | {first: torch.zeros(2, 7)})
    with pytest.raises(UserError, match=r"to_k_pic\.lora_A\.weight.* make no product"):
        pipe.load_lora_weights(tensors | {first: torch.zeros_like(torch.cat([tensors[first]] * 2))})
    (tmp_path / "a.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(UserError, match="safetensors"):
        pipe.load_lora_weights(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no adapter"):
        pipe.set_adapters("ghost")
    assert torch.equal(draw(pipe), plain)
    with pytest.raises(UserError, match="without dots"):
        pipe.load_lora_weights(tensors, adapter_name="a.b")


@pytest.mark.parametrize("rooted", [False, True])
def test_pefts_own_folder_acts_as_in_peft_and_its_strength_survives_our_file(tmp_path: Path, rooted: bool) -> None:
    pipe, twin, again = tiny_pipeline(), tiny_pipeline(), tiny_pipeline()
    torch.manual_seed(1)
    settings = LoraConfig(
        r=2,
        lora_alpha=7,
        use_rslora=rooted,
        alpha_pattern={"text_layers.1.to_k_pic": 1},
        target_modules=["to_k_pic", "to_v_pic"],
        init_lora_weights=False,
    )
    model = get_peft_model(twin.trunk, settings)
    model.save_pretrained(tmp_path / "peft")
    want = draw(twin)  # peft changed the trunk in place
    applied = pipe.load_lora_weights(tmp_path / "peft", "mine", weight_name="adapter_model.safetensors")
    assert str(applied) == "8 of 8 tensors applied to 4 layers"
    assert torch.allclose(draw(pipe), want, atol=1e-4)
    pipe.save_lora_weights(tmp_path, "mine", weight_name="mine.safetensors")
    again.load_lora_weights(tmp_path, weight_name="mine.safetensors")
    assert torch.allclose(draw(again), want, atol=1e-4)
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors"):
        tiny_pipeline().load_lora_weights(tmp_path)


def test_kohyas_and_other_names_for_the_part_are_read() -> None:
    pipe, other, kohya = tiny_pipeline(), tiny_pipeline(), tiny_pipeline()
    tensors = lora_of(pipe)
    pipe.load_lora_weights(tensors)
    other.load_lora_weights({f"transformer.{n.removeprefix('trunk.')}": t for n, t in tensors.items()})
    flat = {}
    for name, tensor in tensors.items():
        stem, half = name.removeprefix("trunk.").split(".lora_")
        flat[f"lora_unet_{stem.replace('.', '_')}.lora_{'down' if half[0] == 'A' else 'up'}.weight"] = tensor
        flat[f"lora_unet_{stem.replace('.', '_')}.alpha"] = torch.tensor(2.0)  # = rank: full strength
    kohya.load_lora_weights(flat)
    assert torch.equal(draw(other), draw(pipe))
    assert torch.equal(draw(kohya), draw(pipe))


def test_a_4_bit_trunk_takes_adapters_and_no_fusing() -> None:
    pipe = tiny_pipeline()
    mm.quantize(pipe, SVDQuantConfig(rank=4, data_free=True), progress=False)
    plain = draw(pipe)
    pipe.load_lora_weights(lora_of(pipe))
    assert not torch.allclose(draw(pipe), plain, atol=1e-3)
    with pytest.raises(UserError, match="4-bit weights, which take no fusing"):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)


def test_several_adapters_add_up_switch_off_and_come_off() -> None:
    pipe = tiny_pipeline()
    plain, one, two = draw(pipe), lora_of(pipe), {n: t.flip(0) for n, t in lora_of(pipe, 3).items()}
    pipe.load_lora_weights(one, "one")
    with_one = draw(pipe)
    pipe.load_lora_weights(two, "two")
    pipe.set_adapters(["one", "two"], adapter_weights=[1.0, 0.5])
    both = draw(pipe)
    assert pipe.get_list_adapters() == {"trunk": ["one", "two"]}
    assert not torch.allclose(both, with_one, atol=1e-3)
    assert torch.allclose(draw(pipe, attention_kwargs={"scale": 0.0}), plain, atol=1e-5)
    assert torch.equal(draw(pipe), both)  # a call's scale leaves the adapters' own weights as they were
    pipe.fuse_lora()
    assert torch.allclose(draw(pipe), both, atol=1e-4)
    with pytest.raises(UserError, match="'one' is fused already"):
        pipe.fuse_lora()
    pipe.unfuse_lora()
    assert torch.equal(draw(pipe), both)
    pipe.disable_lora()
    assert torch.allclose(draw(pipe), plain, atol=1e-5)
    pipe.enable_lora()
    pipe.fuse_lora()
    pipe.delete_adapters("two")  # takes its part out of the weights too
    assert torch.allclose(draw(pipe), with_one, atol=1e-4)
    pipe.unfuse_lora()
    pipe.set_adapters("one")
    assert torch.allclose(draw(pipe), with_one, atol=1e-5)
    with pytest.raises(UserError, match="2 adapter_weights for 1"):
        pipe.set_adapters("one", adapter_weights=[1.0, 2.0])


def test_a_compiled_trunk_keeps_its_adapters() -> None:
    pipe = tiny_pipeline()
    plain = draw(pipe)
    pipe.load_lora_weights(lora_of(pipe), "one")
    pipe.set_adapters("one", 0.5)
    half = draw(pipe)
    pipe.trunk.compile(backend="eager")
    pipe.set_adapters("one", 0.0)
    assert torch.allclose(draw(pipe), plain, atol=1e-5)
    pipe.trunk._compiled_call_impl = None
    pipe.register_modules(trunk=torch.compile(pipe.trunk, backend="eager"))
    assert pipe.get_active_adapters() == ["one"]
    pipe.set_adapters("one", 0.5)
    pipe.fuse_lora()
    assert torch.allclose(draw(pipe), half, atol=1e-4)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)
