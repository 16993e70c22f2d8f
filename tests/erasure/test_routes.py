"""Erasure reads instructions for editing as well: matched tokens, features of the editor, the world's instructions."""

from __future__ import annotations

import inspect

import pytest
import torch
from tiny import tiny_reader

import mm
from mm import ImageEditPipeline, TextToImagePipeline
from mm.erasure import routes
from mm.erasure.concepts import parse
from mm.erasure.routes import editor_of, edits_of, rows_of
from mm.erasure.sites import text_layers
from mm.world.concept_edits import with_name, world_edits
from mm.world.concept_words import holds
from mm.world.concepts import WorldContexts


def of_kind(kind, parts):
    takes = inspect.signature(kind.__init__).parameters
    made = kind(**{name: part for name, part in parts.items() if name in takes})
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    of_kind(ImageEditPipeline, tiny_reader()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("text", "old", "new", "wanted"),
    [
        ("turn the fox into a wolf", "wolf", "owl", "turn the fox into an owl"),
        ("replace the owls with cats", "cats", "cats", "replace the owls with cats"),
        ("add three cats", "cat", "wolf", "add three wolves"),
        ("add a kitten", "cat", "wolf", "add a wolf"),
        ("add a fish", "fish", "wolf", "add a wolf"),
        ("make it neon style", "neon", "sepia", "make it sepia style"),
    ],
)
def test_one_concept_stands_in_the_place_of_another(text, old, new, wanted):
    assert with_name(text, old, new) == wanted


@pytest.mark.parametrize(("target", "anchor"), [("wolf", "fox"), ("style: neon", "cartoon")])
def test_instructions_bring_the_target_and_others_do_not(target, anchor):
    concept = parse(target)
    made = world_edits([concept], {str(concept): anchor}, 6)
    asked, kept = [e for e in made if e.instead], [e for e in made if not e.instead]
    assert (len(asked), len(kept)) == (6, 48)
    assert all(holds(e.text, concept.name) and not holds(e.instead or "", concept.name) for e in asked)
    assert not any(holds(e.text, concept.name) for e in kept)
    assert all(e.picture.size == (128, 128) for e in made)


def test_concepts_without_instructions_have_none():
    concept = parse("attribute: red")
    assert edits_of(WorldContexts(), [concept], {"red": ""}, 4) == []
    assert edits_of(object(), [concept], {"red": ""}, 4) == []  # a family that edits nothing


def test_features_are_those_of_the_editor(model):
    pipe = TextToImagePipeline.from_pretrained(model)
    editor = editor_of(pipe)
    assert editor is not None
    assert editor.trunk is pipe.trunk
    layers, concept = text_layers(pipe), parse("cat")
    groups = [[path] for path in layers]
    edits = world_edits([concept], {"cat": "dog"}, 2)
    rows = rows_of(pipe, layers, groups, edits)
    assert set(rows) == set(layers)
    path, layer = next(iter(layers.items()))
    read = []
    handle = layer.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    e = edits[0]
    for text in (e.text, e.instead):
        editor(e.picture, text, num_inference_steps=1, output_type="latent", image_guidance_scale=1.0, strict=False)
    handle.remove()
    first = [x for x in read if x.shape[0] == 1]
    length = len(first[0][0])
    assert torch.allclose(rows[path].target_TD[:length].float(), first[0][0], atol=1e-5)
    anchor = rows[path].anchor_TD[:length].float()
    same = [x for x in first if len(x[0]) == length and torch.allclose(anchor, x[0], atol=1e-5)]
    assert same  # the same instruction with the anchor: as many tokens, one by one


def test_an_erasure_reads_instructions_where_the_model_edits(model, monkeypatch):
    for name, few in (("EDITS", 2), ("FEW_EDITS", 2), ("FEWEST", 2), ("PAIRS", 2)):
        monkeypatch.setattr(f"mm.erasure.erase.{name}", few)
    monkeypatch.setattr("mm.world.concept_edits.OTHERS", 3)
    monkeypatch.setattr("mm.world.concepts.KEPT", 2)
    pipe = TextToImagePipeline.from_pretrained(model)
    report = mm.erase(pipe, ["cat"], anchors="dog").report
    assert report["edits"] == 2 + 4
    monkeypatch.setattr(routes, "sharing", None)  # nothing is loaded for a model whose place is not known
    pipe.register_to_config(_name_or_path="")
    assert mm.erase(pipe, ["cat"], anchors="dog").report["edits"] == 0
