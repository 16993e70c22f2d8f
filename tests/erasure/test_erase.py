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
from mm.erasure.erase import _template, effective
from mm.erasure.features import record
from mm.erasure.gradients import outputs, predict
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


QUICK = {
    "robust": {"rounds": 1, "attacked": 4, "iterations": 3, "picture_steps": 2},
    **{name: {"steps": 3, "batch": 2} for name in ("hirm", "esd", "salun")},
    **{name: {"steps": 2, "prompts": 4} for name in ("dve", "prune")},
}


def sites_of(pipe, method: str) -> set[str]:
    """The layers that a method may change, named one by one."""
    pictures = [f"trunk.text_layers.{i}.to_{x}_pic" for i in range(2) for x in "kv"]
    first = [
        f"trunk.text_layers.0.{x}" for x in (*(f"attn.to_{y}" for y in ("q", "k", "v", "out")), "ff.up", "ff.down")
    ]
    drawing = [
        f"{block}.{x}"
        for block in ("trunk.picture_layers.0", "trunk.picture_layers.1", "velocity_decoder.layers.0")
        for x in (*(f"attn.to_{y}" for y in ("q", "k", "v", "out")), "ff.up", "ff.down")
    ]
    return set({
        "robust": [*pictures, *drawing],
        "speed": [p for p in pictures if "to_v" in p],
        "hirm": first,
        "dve": ["velocity_decoder.feature_in"],
        "prune": [f"{x}.ff.down" for x in (
            "trunk.picture_layers.0", "trunk.picture_layers.1", "velocity_decoder.layers.0"
        )],
    }.get(method, pictures))  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_only_the_named_layers_change_and_undo_is_exact(pipe, method, tmp_path):
    parts = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    before = {f"{n}.{k}": t.clone() for n, m in parts.items() for k, t in m.state_dict().items()}
    picture = draw(pipe, "a cat on grass")
    patch = mm.erase(pipe, ["cat"], anchors="dog", method=method, **QUICK.get(method, {}))
    now = {f"{n}.{k}": t for n, m in parts.items() for k, t in m.state_dict().items()}
    assert all(torch.equal(before[name], tensor) for name, tensor in now.items())
    assert set(patch.entries) == sites_of(pipe, method)
    patch.save(tmp_path / "p.safetensors")
    loaded = Patch.load(tmp_path / "p.safetensors")
    loaded.apply(pipe)
    modules = {f"{n}.{p}": m for n, part in parts.items() for p, m in part.named_modules()}
    changed = {p for p, layer in modules.items() if isinstance(layer, BranchedLinear)}
    changed |= {
        f"{n}.{k}".removesuffix(".weight")
        for n, m in parts.items() for k, t in m.state_dict().items()
        if f"{n}.{k}" in before and not torch.equal(before[f"{n}.{k}"], t)
    }  # fmt: skip
    assert changed == set(patch.entries)
    assert not torch.equal(draw(pipe, "a cat on grass"), picture)
    loaded.undo(pipe)
    assert torch.equal(draw(pipe, "a cat on grass"), picture)


@pytest.mark.parametrize(("method", "more"), [("esd", {"eta": 0.0}), ("salun", {}), ("hirm", {})])
def test_training_brings_the_target_to_the_anchor(pipe, method, more):
    """Measured apart from the training: predictions of the target's prompt, or what the text-reading layers read."""
    prompts, layers = (
        ["two cats on grass", "a cat at night"],
        {p: m for p, m in text_layers(pipe).items() if ".1." in p},
    )
    anchors = [p.replace("cat", "dog") for p in prompts]

    def seen(texts):
        if method == "hirm":
            return torch.cat([x.flatten() for x in outputs(pipe, layers, texts, grad=False, reads=True).values()])
        return torch.cat([predict(pipe, texts, seed=90, step=s).flatten() for s in (0, 2)])

    target, anchor = seen(prompts), seen(anchors)
    patch = mm.erase(pipe, ["cat"], anchors="dog", method=method, steps=30, preserve=0.0, rate=2e-3, **more)
    patch.apply(pipe)
    after = seen(prompts)
    patch.undo(pipe)
    assert (after - anchor).norm() < 0.95 * (target - anchor).norm()


def test_salun_changes_the_salient_half_alone(pipe):
    patch = mm.erase(pipe, ["cat"], anchors="dog", method="salun", steps=2, batch=2, share=0.25)
    changed = sum(int((e.tensors["delta"] != 0).sum()) for e in patch.entries.values())
    assert changed == pytest.approx(0.25 * sum(e.tensors["delta"].numel() for e in patch.entries.values()), rel=0.02)


def test_pruned_weights_are_filled(pipe):
    """Few weights change, towards zero, and none of them becomes zero."""
    patch = mm.erase(pipe, ["cat"], anchors="dog", method="prune", share=0.05, prompts=4, steps=2)
    assert 0 < patch.report["share_changed"] <= 0.1
    layers = dict(pipe.trunk.named_modules())
    entry = patch.entries["trunk.picture_layers.0.ff.down"].tensors["delta"]
    old = layers["picture_layers.0.ff.down"].weight.detach()
    new = old + entry
    chosen = entry != 0
    assert ((new[chosen] * old[chosen]) > 0).all()
    assert (new[chosen].abs() < old[chosen].abs()).all()


def test_the_adversary_of_the_robust_preset_gains_less_each_round(pipe):
    """Embeddings that attack the last round's patch end further from the target than those that attack plain UCE."""
    given = {"anchors": "dog", "method": "robust", "attacked": 6, "iterations": 10, "picture_steps": 0}
    plain, rounds = (mm.erase(pipe, ["cat"], rounds=n, **given).report for n in (1, 3))
    assert len(rounds["attack_distances"]) == 3
    assert rounds["attack_distances"][0] == plain["attack_distances"][0]
    assert all(after < before for before, after in rounds["attack_distances"])
    assert rounds["attack_distances"][-1][1] > 0.8 * rounds["attack_distances"][0][1]


def test_velocity_projection_maps_picture_features(pipe):
    """At its site, features of the target come nearer to those that the anchor has from the same noise."""
    patch = mm.erase(pipe, ["cat"], anchors="dog", method="dve", steps=2, prompts=12)
    facts = patch.report["groups"]["velocity_decoder.feature_in"]
    assert facts["target_error"] < 0.9  # a random model: pictures of the two differ at random, too
    assert facts["retained_error"] < 0.05


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


def test_a_repeated_prompt_is_read_once(pipe):
    """Many targets share anchors and neighbours: the text encoder runs on different prompts only."""
    layers = text_layers(pipe)
    rows: list[int] = []
    handle = next(iter(layers.values())).register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        once = record(pipe, layers, ["a cat", "two dogs"])
        read = rows.copy()
        rows.clear()
        again = record(pipe, layers, ["a cat", "two dogs", "a cat", "a cat"])
    finally:
        handle.remove()
    assert rows == read
    for path in layers:
        assert len(again[path]) == 4
        assert all(torch.equal(again[path][i], once[path][j]) for i, j in enumerate((0, 1, 0, 0)))


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


def test_features_behind_a_template_are_found():
    """A causal encoder with five tokens before the prompt: target and anchor differ from the sixth on."""
    torch.manual_seed(0)
    pipe = tiny_pipeline()
    pairs = [("cat on grass", "dog on grass")]
    head = torch.randn(5 + 1, 8)  # the template, and the start token
    one, other = (torch.cat([head, torch.randn(4, 8)]) for _ in range(2))
    assert _template(pipe, pairs, [one, other], 10) == 5
    assert _template(pipe, pairs, [one[5:], other[5:]], 5) == 0
    assert _template(pipe, pairs, [torch.randn(10, 8), torch.randn(10, 8)], 10) == 0
