"""`mm.erase` on a tiny random pipeline of ours: what changes, what does not, files, undo, and wrong input."""

from __future__ import annotations

import pytest
import torch
from tiny import draw, tiny_pipeline

import mm
import mm.erasure.concepts
from mm.adapters import Patch
from mm.core.errors import UserError
from mm.erasure.alignment import align
from mm.erasure.erase import effective
from mm.erasure.features import record
from mm.erasure.methods.registry import METHODS
from mm.erasure.sites import text_layers
from mm.layers.linear import BranchedLinear
from mm.world.concepts import WorldContexts


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.mark.parametrize(
    ("target", "anchor", "places"),
    [
        ([1, 5, 6, 9], [1, 7, 6, 9], [0, 1, 2, 3]),
        ([1, 5, 9], [1, 7, 8, 9], [0, 2, 3]),  # the last word of the anchor stands for the target
        ([1, 5, 6, 7, 9], [1, 8, 9], [0, 1, 1, 1, 2]),
        ([1, 5, 9], [1, 9], [0, 0, 1]),  # nothing in its place: the word before
    ],
)
def test_tokens_are_matched(target, anchor, places):
    assert align(target, anchor) == places


@pytest.mark.parametrize("method", METHODS)
def test_only_the_named_layers_change_and_undo_is_exact(pipe, method, tmp_path):
    before = {name: tensor.clone() for name, tensor in pipe.trunk.state_dict().items()}
    picture = draw(pipe, "a cat on grass")
    patch = mm.erase(pipe, ["cat"], anchors="dog", method=method)
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.trunk.state_dict().items())
    wanted = {path for path in text_layers(pipe) if method != "speed" or "to_k_" not in path}
    assert set(patch.entries) == wanted
    patch.save(tmp_path / "p.safetensors")
    loaded = Patch.load(tmp_path / "p.safetensors")
    loaded.apply(pipe)
    changed = {p for p, layer in pipe.trunk.named_modules() if isinstance(layer, BranchedLinear)} | {
        name.removesuffix(".weight") for name, t in pipe.trunk.state_dict().items() if not torch.equal(before[name], t)
    }
    assert changed == {path.removeprefix("trunk.") for path in wanted}
    assert not torch.equal(draw(pipe, "a cat on grass"), picture)
    loaded.undo(pipe)
    assert torch.equal(draw(pipe, "a cat on grass"), picture)


def test_targets_move_to_the_anchor_and_retained_prompts_stay(pipe):
    """At every edited layer, outputs for prompts that no method saw."""
    layers = text_layers(pipe)
    prompts = ["three cats right of a tree", "three dogs right of a tree", "a blue car at night"]
    features = record(pipe, layers, prompts)
    patch = mm.erase(pipe, ["cat"], anchors="dog", method="uce", rank=32)
    for path, layer in layers.items():
        cat, dog, car = (x.double()[:8] for x in features[path])  # beyond the prompts' tokens there is padding
        entry = patch.entries[path].tensors
        new = effective(layer) + entry["up"].double() @ entry["down"].double()
        old = effective(layer)
        gap = (cat @ old.T - dog @ old.T).norm()
        assert (cat @ new.T - dog @ old.T).norm() < gap
        assert (car @ new.T - car @ old.T).norm() < 0.3 * (car @ old.T).norm()
    assert all(facts["target_error"] < 0.9 for facts in patch.report["groups"].values())


def test_strength_leaves_a_share(pipe):
    whole, half = (mm.erase(pipe, ["cat"], anchors="dog", method="uce", strength=s) for s in (1.0, 0.5))
    for path, entry in whole.entries.items():
        full = entry.tensors["up"] @ entry.tensors["down"]
        part = half.entries[path].tensors["up"] @ half.entries[path].tensors["down"]
        assert torch.allclose(part, 0.5 * full, atol=1e-5)


def test_anchors_and_neighbours_are_reported(pipe):
    report = mm.erase(pipe, ["cat", "style: neon"], method="uce").report
    assert report["anchors"]["cat"] not in ("cat", "")
    assert report["anchors"]["neon"] == "cartoon"
    assert report["anchors"]["cat"] in report["retained"]
    assert "cat" not in report["retained"]


def test_contexts_hold_the_target_on_one_side_only():
    pairs = WorldContexts().pairs(mm.erasure.concepts.Concept(name="fish"), "dolphin", 40)
    assert len(pairs) == 40
    for old, new in pairs:
        assert "fish" in old.split() or "fish," in old.split()
        assert "fish" not in new
        assert "dolphin" in new
    assert any(("an " in old and "a dolphin" in new) or "dolphins" in new for old, new in pairs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": []}, "there is no target"),
        ({"targets": [" "]}, "name the concept"),
        ({"targets": ["dragon"]}, "does not know 'dragon'"),
        ({"targets": ["catt"]}, "did you mean cat"),
        ({"targets": ["cat", "cat"]}, "given twice"),
        ({"targets": ["cat"], "retain": ["cat"]}, "a target and retained"),
        ({"targets": ["cat"], "anchors": "cat"}, "target and anchor"),
        ({"targets": ["cat", "dog"], "anchors": ["fox"] * 3}, "2 targets and 3 anchors"),
        ({"targets": ["cat"], "method": "magic"}, "no erasure method 'magic'; there are uce"),
        ({"targets": ["cat"], "strength": 0}, "strength is 0"),
        ({"targets": ["cat"], "rounds": 2, "method": "uce"}, "uce has no setting 'rounds'"),
        ({"targets": ["cat"], "sites": ["nothing"]}, "no layer that is known to read text"),
    ],
)
def test_wrong_input_is_one_clear_error(pipe, arguments, message):
    with pytest.raises(UserError, match=message):
        mm.erase(pipe, **arguments)
