"""Training on 4-bit weights: the base stays 4-bit, the gradient is that of the dequantized weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from subject_pictures import subject_folder
from tiny_pipelines import SIDE, draw_with, tiny_pipeline_of

import mm
from mm.core.errors import UserError
from mm.customization.customize import customize
from mm.layers.checkpointing import size_of
from mm.layers.linear import BranchedLinear

FAST: dict[str, Any] = {
    "steps": 10, "batch_size": 2, "size": SIDE, "preview_every": 10, "preserved": (), "learning_rate": 2e-2, "rank": 4,
}  # fmt: skip


def _wide() -> Any:
    """A FLUX pipeline wide enough that its layers become smaller at 4 bits."""
    pipe = tiny_pipeline_of("flux")
    torch.manual_seed(1)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=pipe.transformer.config.joint_attention_dim, axes_dims_rope=(8, 12, 12),
        pooled_projection_dim=pipe.transformer.config.pooled_projection_dim, guidance_embeds=True,
    )  # fmt: skip
    for parameter in transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    pipe.register_modules(transformer=transformer.eval().requires_grad_(False))
    return pipe


def test_four_bits_leave_the_size_by_which_blocks_are_computed_again() -> None:
    """Packed weights are buffers, so that FLUX at 4 bits would not count as large by its parameters."""
    transformer = _wide().transformer
    before, linear = size_of(transformer), [m for m in transformer.modules() if isinstance(m, torch.nn.Linear)]
    biases = sum(m.bias.numel() for m in linear if m.bias is not None)
    assert before == sum(p.numel() for p in transformer.parameters()) - biases
    mm.quantize(transformer, mm.SVDQuantConfig(rank=8, data_free=True), progress=False)
    assert sum(p.numel() for p in transformer.parameters()) < before / 2
    assert size_of(transformer) == before


def test_training_on_four_bits(tmp_path: Path) -> None:
    folder = subject_folder(tmp_path / "data")
    pipe = _wide()
    sixteen = customize(pipe, folder, name="sks thing", **FAST)
    config = mm.SVDQuantConfig(rank=8, data_free=True)
    mm.quantize(pipe, config, progress=False)
    low = [m for m in pipe.transformer.modules() if isinstance(m, BranchedLinear) and m.bits == 4]
    assert len(low) >= 10
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    plain = draw_with("flux", pipe, prompt="sks thing")
    four = customize(pipe, folder, name="sks thing", **FAST)
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(plain, draw_with("flux", pipe, prompt="sks thing"))
    assert four.base == sixteen.base  # both are for the 16-bit model's tensors
    assert four.report["error"] < 0.97
    assert abs(four.report["error"] - sixteen.report["error"]) < 0.05
    for learned in (four, sixteen):  # each goes onto the 4-bit model without quantizing again
        learned.apply(pipe)
        assert not torch.equal(plain, draw_with("flux", pipe, prompt="sks thing"))
        learned.undo(pipe)
    same = {key: value for key, value in FAST.items() if key != "rank"}
    for method in ("dora", "oft", "lokr", "loha", "shira"):  # what they learn would not go onto this model
        with pytest.raises(UserError, match="has 4-bit weights, which whole changes do not go onto"):
            customize(pipe, folder, name="sks thing", method=method, **same)
    assert not any(type(m).__module__.startswith("peft") for m in pipe.transformer.modules())


def test_the_gradient_is_that_of_the_dequantized_weight() -> None:
    """Compared with autograd through a plain layer that holds the dequantized weight."""
    from mm.layers.linear import Branch

    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 64)
    layer = BranchedLinear.from_linear(plain)
    holder = torch.nn.ModuleDict({"a": layer})
    mm.quantize(holder, mm.SVDQuantConfig(rank=8, data_free=True), progress=False)
    layer = holder["a"]
    assert isinstance(layer, BranchedLinear)
    assert layer.bits == 4
    down, up = torch.randn(3, 64, requires_grad=True), torch.randn(64, 3, requires_grad=True)
    layer.attach(Branch(name="t", down=down, up=up, scale=0.5))
    x = torch.randn(5, 64, requires_grad=True)
    layer(x).square().sum().backward()
    found = [t.grad.clone() for t in (x, down, up) if t.grad is not None]
    for tensor in (x, down, up):
        tensor.grad = None
    assert layer.bias is not None
    weight = layer.base_weight(torch.float32).detach() + 0.5 * up @ down
    torch.nn.functional.linear(x, weight, layer.bias).square().sum().backward()
    for one, other in zip(found, (x.grad, down.grad, up.grad), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
