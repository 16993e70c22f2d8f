"""What is left of an erasure after rounding: margins by hand, 4-bit models, baking, rounded patches, stacks."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tiny import draw, tiny_pipeline

import mm
from mm.adapters import Patch, stack_of
from mm.erasure.erase import effective
from mm.erasure.margin import _warn_below, half_step, one_warning, rounded_patch, squares
from mm.erasure.sites import text_layers
from mm.evaluation.quantizers import nf4, nf4_rounded, quantizer
from mm.layers.linear import BranchedLinear
from mm.models.codes import CodeHead
from mm.models.trunk import Trunk
from mm.models.velocity import VelocityDecoder

OBJECTS = ("cat", "wolf", "car", "star")


def wide_pipeline():
    """A tiny pipeline that is wide enough for 4 bits."""
    pipe = tiny_pipeline()
    torch.manual_seed(1)
    order = list(range(16))
    pipe.register_modules(
        trunk=Trunk(width=64, depth=2, heads=2),
        velocity_decoder=VelocityDecoder(feature_width=64, width=64, depth=1, heads=2),
        code_head=CodeHead(order=order, feature_width=64, width=64, depth=1, heads=2),
    )
    for part in (pipe.trunk, pipe.velocity_decoder, pipe.code_head):
        for parameter in part.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
    return pipe


@pytest.fixture(scope="module")
def patches():
    """Erasures one after another, each made on top of those before it."""
    pipe, made = tiny_pipeline(), []
    for name in OBJECTS:
        made.append(mm.erase(pipe, [name], anchors="dog", method="uce"))
        made[-1].apply(pipe)
    return made


def test_the_margin_by_hand():
    """With white features the outputs' mean squares are those of the weights: the margin is their ratio."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 128, generator=g).double()
    step = weight.reshape(8, 2, 64).abs().amax(2) / 7
    assert torch.allclose(half_step(weight)[:, 70], step[:, 1] / 2)
    change = half_step(weight) * torch.randn(8, 128, generator=g).double().sign()
    for size in (1.0, 3.0):
        moved, rounded = squares(size * change, weight, torch.eye(128).double())
        assert (moved / rounded) ** 0.5 == pytest.approx(size)


def test_a_small_erasure_warns_and_says_what_to_do():
    pipe = wide_pipeline()
    with pytest.warns(UserWarning, match="of half a 4-bit step: apply the patch to the quantized model"):
        patch = mm.erase(pipe, ["cat"], anchors="dog", method="uce", strength=0.01)
    whole = mm.erase(pipe, ["cat"], anchors="dog", method="uce", strength=1.0)
    assert whole.report["margin"] == pytest.approx(100 * patch.report["margin"], rel=0.05)
    assert set(patch.report["margins"]) == set(patch.entries)
    assert patch.report["below_half_a_step"] > whole.report["below_half_a_step"]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_rounded_patch_moves_the_layers_almost_as_far(bits):
    pipe = wide_pipeline()
    patch = mm.erase(pipe, ["cat"], anchors="dog", method="uce")
    small = rounded_patch(patch.entries, bits)
    for path, entry in patch.entries.items():
        whole = entry.tensors["up"] @ entry.tensors["down"]
        rounded = small[path].tensors["up"] @ small[path].tensors["down"]
        assert (whole - rounded).norm() < {8: 0.02, 4: 0.3}[bits] * whole.norm()
        assert len(small[path].tensors["down"][0].unique()) <= 2**bits


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_patch_on_a_4_bit_model_and_off_again(bits):
    pipe = wide_pipeline()
    patch = mm.erase(pipe, ["cat"], anchors="dog", method="uce")
    mm.quantize(pipe, mm.SVDQuantConfig(rank=16, activation_bits=bits, data_free=True), progress=False)
    layers = {path: layer for path, layer in text_layers(pipe).items() if isinstance(layer, BranchedLinear)}
    assert sum(layer.bits == 4 for layer in layers.values()) == len(patch.entries) == 4
    before, picture = {p: effective(layer) for p, layer in layers.items()}, draw(pipe, "a cat")
    patch.apply(pipe)
    for path, layer in text_layers(pipe).items():
        added = patch.entries[path].tensors["up"] @ patch.entries[path].tensors["down"]
        assert torch.allclose(
            effective(layer) - before[path], added.double(), atol=2e-3 * float(before[path].abs().max())
        )
    assert not torch.equal(draw(pipe, "a cat"), picture)
    patch.undo(pipe)
    assert torch.equal(draw(pipe, "a cat"), picture)
    assert all(torch.equal(before[path], effective(layer)) for path, layer in text_layers(pipe).items())


def test_a_patch_that_is_baked_before_quantizing_stays():
    """The 4-bit weights are then near the patched ones, nearer than to the unpatched ones."""
    base, pipe = wide_pipeline(), wide_pipeline()
    patch = mm.erase(pipe, ["cat"], anchors="dog", method="uce", strength=2.0)
    patch.bake(pipe)
    quantizer("int4")(pipe)
    for path, layer in text_layers(pipe).items():
        plain = effective(text_layers(base)[path])
        baked = plain + (patch.entries[path].tensors["up"] @ patch.entries[path].tensors["down"]).double()
        assert (effective(layer) - baked).norm() < (effective(layer) - plain).norm()


def test_nf4_is_the_nearest_of_sixteen_levels():
    weight = torch.randn(3, 128, generator=torch.Generator().manual_seed(2))
    rounded = nf4_rounded(weight)
    blocks, made = weight.reshape(-1, 64), rounded.reshape(-1, 64)
    assert torch.equal(made.abs().amax(1), blocks.abs().amax(1))
    assert all(len(row.unique()) <= 16 for row in made)
    assert torch.equal(nf4_rounded(rounded), rounded)
    pipe = wide_pipeline()
    assert nf4(pipe) > 10


@pytest.mark.parametrize("gone", [0, 2, 3])
def test_stacked_patches_and_any_one_undone(patches, gone):
    """What is left equals, bit for bit, a stack that never had the patch."""
    pipe, other = tiny_pipeline(), tiny_pipeline()
    base = draw(pipe, "a cat and a car")
    for patch in patches:
        patch.apply(pipe)
    assert stack_of(pipe).names() == tuple(p.name for p in patches)
    patches[gone].undo(pipe)
    rest = [p for i, p in enumerate(patches) if i != gone]
    for patch in rest:
        patch.apply(other)
    assert torch.equal(draw(pipe, "a cat and a car"), draw(other, "a cat and a car"))
    for patch in rest:
        patch.undo(pipe)
    assert torch.equal(draw(pipe, "a cat and a car"), base)


def test_an_erasure_reads_what_is_on_the_model():
    """A second erasure counts with the first one: it starts from the effective weights."""
    pipe = tiny_pipeline()
    first = mm.erase(pipe, ["cat"], anchors="dog", method="uce")
    alone = mm.erase(pipe, ["fox"], anchors="dog", method="uce")
    first.apply(pipe)
    second = mm.erase(pipe, ["fox"], anchors="dog", method="uce")
    path = next(iter(second.entries))
    assert not torch.equal(second.entries[path].tensors["up"], alone.entries[path].tensors["up"])
    assert isinstance(copy.deepcopy(second), Patch)


def test_several_small_erasures_give_one_warning_with_a_count():
    assert [_warned([0.4]), _warned([1.5]), _warned([1.5, 2.0])] == [
        ["the erasure changes its layers by 0.40 of half a 4-bit step"], [], []
    ]  # fmt: skip
    assert _warned([0.4, 1.2, 0.91]) == [
        "2 of 3 erasures change their layers by less than half a 4-bit step (by 0.40 to 0.91 of it)"
    ]


def _warned(margins):
    """The beginnings of the warnings of erasures with these margins, that are made within one context."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with one_warning():
            for margin in margins:
                _warn_below(margin)
    return [str(warning.message).partition(": ")[0] for warning in caught]
