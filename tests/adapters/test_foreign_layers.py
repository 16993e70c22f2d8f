"""Layers of other libraries: a patch reaches those that peft wraps, and names the others before anything is changed."""

from __future__ import annotations

import pytest
import torch
from adapter_cases import (
    WIDTH,
    WORDS,
    five,
    run,
    state_of,
    text_encoder,
    unchanged,
)
from peft import LoraConfig, get_peft_model
from torch import nn

from mm.adapters.patch import Entry, Patch
from mm.core.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:patch .* does not say")


class Params4bit(nn.Parameter):
    """Stands for bitsandbytes' packed weights: uint8, flattened."""


class Linear4bit(nn.Linear):
    """Stands for bitsandbytes' layer."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.weight = Params4bit(torch.zeros(128, 1, dtype=torch.uint8), requires_grad=False)


class Packed(torch.Tensor):
    """Stands for torchao's tensor subclasses inside a plain nn.Linear."""


def torchao_like() -> nn.Linear:
    layer = nn.Linear(16, 16)
    layer.weight = nn.Parameter(torch.randn(16, 16).as_subclass(Packed))
    return layer


class GGUFParameter(nn.Parameter):
    """Stands for diffusers' GGUF weights: bytes of quantized blocks."""


class GGUFLinear(nn.Linear):
    """Stands for diffusers' GGUF layer."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.weight = GGUFParameter(torch.zeros(16, 18, dtype=torch.uint8), requires_grad=False)


def eight_bit_float() -> nn.Linear:
    layer = nn.Linear(16, 16)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def replaced() -> nn.Linear:
    layer = nn.Linear(16, 16)
    layer.forward = lambda x: x
    return layer


FOREIGN = {
    "bitsandbytes": (Linear4bit, "Linear4bit.* whose weight is a Params4bit"),
    "torchao": (torchao_like, "Linear whose weight is a Packed"),
    "gguf": (GGUFLinear, "GGUFLinear.* whose weight is a GGUFParameter"),
    "float8": (eight_bit_float, "Linear whose weight is float8_e4m3fn"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), "ParametrizedLinear"),
    "attention's own": (lambda: nn.MultiheadAttention(16, 2).out_proj, "NonDynamicallyQuantizableLinear"),
    "replaced": (replaced, "its forward was replaced by another program"),
    "not loaded": (lambda: nn.Linear(16, 16, device="meta"), "the weight of a Linear is on the meta device"),
    "convolution": (lambda: nn.Conv1d(16, 16, 1), "a Conv1d, not a linear layer"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_layers_of_other_libraries_are_named_before_anything_is_changed(kind):
    make, message = FOREIGN[kind]
    model = nn.ModuleDict({"plain": nn.Linear(16, 16), "odd": make()})
    before = state_of(model)
    halves = {"down": torch.ones(2, 16), "up": torch.ones(16, 2)}
    entry = Entry(kind="lowrank", tensors=halves)
    with pytest.raises(UserError, match=rf"1 of 2 layers .* not: odd \(.*{message}"):
        Patch(entries={"plain": entry, "odd": entry}).apply(model)
    assert unchanged(model, before)


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        ([-1], torch.ones(1, WIDTH), "ids -1 to -1"),
        ([2, 2], torch.ones(2, WIDTH), "the same id twice"),
        ([], torch.ones(0, WIDTH), "need shapes"),
        ([1], torch.ones(1, 9), "rows of width 9"),
        ([1], torch.full((1, WIDTH), torch.nan), "NaN or infinity"),
    ],
)
def test_rows_that_fit_nowhere_are_named(ids, rows, message):
    model = text_encoder()
    entry = Entry(kind="rows", tensors={"ids": torch.tensor(ids, dtype=torch.long), "rows": rows})
    with pytest.raises(UserError, match=message):
        Patch(entries={WORDS: entry}).apply(model)


def test_patches_reach_layers_that_peft_wraps():
    model = text_encoder()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    before = run(wrapped)
    for patch in five():
        patch.apply(wrapped)
    assert not torch.allclose(run(wrapped), before, atol=1e-3)
    for patch in five():
        patch.undo(wrapped)
    assert torch.equal(run(wrapped), before)
