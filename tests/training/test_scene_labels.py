"""Labels of nouns and understanding tokens, and readouts that learn them."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from mm.models.dialogue import IGNORED, PLACEHOLDER, Dialogue, stack
from mm.models.text import build_text_tokenizer
from mm.training import conversations
from mm.training.readouts import SIZES, NounReadout, RelationReadout, TokenReadout, captured_outputs
from mm.training.scene_labels import (
    next_noun_labels,
    noun_ids,
    noun_labels,
    override_counts,
    understanding_token_labels,
)
from mm.world.edits import sample_edit
from mm.world.scene import Scene, Sprite
from mm.world.vocabulary import ALL_OBJECTS, RELATIONS

TOKENIZER = build_text_tokenizer()
NOUNS = noun_ids(TOKENIZER.convert_tokens_to_ids)
SCENE = Scene(
    sprites=(
        Sprite(object="cat", colour="red", x=24, y=40, size=28),
        Sprite(object="cat", colour="red", x=104, y=40, size=28),
        Sprite(object="dog", x=64, y=104, size=28),
    )
)


def nouns_of(dialogue: Dialogue):
    return noun_labels([dialogue.ids], [dialogue.about], len(dialogue), NOUNS)


def test_a_noun_is_labelled_with_count_position_and_colour():
    found = nouns_of(Dialogue(TOKENIZER).user("two red kittens above a dog and an owl", about=SCENE))
    assert found.counts_N.tolist() == [2, 1, 0]  # a synonym in the plural, a singular, something absent
    assert found.columns_NC.nonzero().tolist() == [[0, 1], [0, 6], [1, 4]]
    assert found.rows_NC.nonzero().tolist() == [[0, 2], [1, 6]]
    assert found.colours_N.tolist() == [0, 8, IGNORED]


def test_only_words_that_refer_to_a_scene_are_labelled():
    dialogue = Dialogue(TOKENIZER).user("is there a cat?", about=SCENE).says("a dog").user("a fox")
    assert nouns_of(dialogue).counts_N.tolist() == [2]


def test_places_are_those_of_padded_rows():
    rows = [Dialogue(TOKENIZER).user("a dog", about=SCENE), Dialogue(TOKENIZER).user("is there a cat?", about=SCENE)]
    ids, _, _ = stack(rows)
    found = noun_labels([d.ids for d in rows], [d.about for d in rows], ids.shape[1], NOUNS)
    words = [TOKENIZER.convert_ids_to_tokens(int(i)) for i in ids.flatten()[found.places_N]]
    assert words == ["dog", "cat"]


def test_an_edit_refers_to_its_target():
    edit = sample_edit(random.Random(3), "remove")
    dialogue = conversations.edit_prompt(lambda: Dialogue(TOKENIZER), edit, random.Random(0))
    gone = {s.object for s in edit.source.sprites} - {s.object for s in edit.target.sprites}
    found = nouns_of(dialogue)
    ids = torch.tensor(dialogue.ids)[found.places_N].tolist()
    absent = {NOUNS[i] for i, n in zip(ids, found.counts_N.tolist(), strict=True) if n == 0}
    assert gone <= absent


def test_without_nouns_the_loss_is_zero_and_still_has_a_gradient_path():
    states = torch.randn(1, 4, 16, requires_grad=True)
    loss = NounReadout(16)(states, nouns_of(Dialogue(TOKENIZER).user("hello")))
    loss.backward()
    assert float(loss.detach()) == 0
    assert states.grad is not None


def test_the_readout_learns_what_is_there():
    torch.manual_seed(0)
    found = nouns_of(Dialogue(TOKENIZER).user("two red kittens above a dog and an owl", about=SCENE))
    states, module = torch.randn(1, 40, 16), NounReadout(16)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    first = float(module(states, found).detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss = module(states, found)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1 * first
    out = module.readout(module.norm(states[0, found.places_N]))
    assert out[:, : SIZES[0]].argmax(-1).tolist() == [2, 1, 0]


def test_outputs_are_captured_within_the_context():
    class Layer(torch.nn.Module):
        def forward(self, x):
            return x + 1, None

    layer = Layer()
    with captured_outputs(layer) as states:
        layer(torch.zeros(2))
    layer(torch.zeros(2))
    assert [s.tolist() for s in states] == [[1.0, 1.0]]


def relations_of(text: str) -> list[list[str] | None]:
    """The relations of each noun of a turn about SCENE, in words."""
    found = nouns_of(Dialogue(TOKENIZER).user(text, about=SCENE))
    return [
        [name for name, holds in zip(RELATIONS, row, strict=True) if holds] if paired else None
        for row, paired in zip(found.relations_NR.tolist(), found.paired_N.tolist(), strict=True)
    ]


def test_two_nouns_of_a_turn_are_labelled_with_their_relations():
    assert relations_of("is the dog below the cats?") == [["below"], ["above"]]  # whatever the words described
    assert relations_of("is the cat left of the dog?") == [["above"], ["below"]]


def test_only_a_pair_that_is_there_is_related():
    assert relations_of("is there a dog?") == [None]
    assert relations_of("is the cat left of the owl?") == [None, None]
    assert relations_of("a cat, a dog and an owl") == [None, None, None]


def test_turns_are_not_mixed():
    dialogue = Dialogue(TOKENIZER).user("is there a dog?", about=SCENE).says("yes").user("is there a cat?", about=SCENE)
    assert not nouns_of(dialogue).paired_N.any()


def test_the_readout_learns_relations():
    torch.manual_seed(0)
    found = nouns_of(Dialogue(TOKENIZER).user("is the dog below the cats?", about=SCENE))
    states, module = torch.randn(1, 40, 16), RelationReadout(16)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        loss = module(states, found)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    assert (module.readout(module.norm(states[0, found.places_N])) > 0).tolist() == found.relations_NR.bool().tolist()
    alone = nouns_of(Dialogue(TOKENIZER).user("is there a dog?", about=SCENE))
    assert float(module(states.requires_grad_(), alone).detach()) == 0


def next_of(dialogue: Dialogue):
    return next_noun_labels([dialogue.ids], [dialogue.describes], len(dialogue), NOUNS)


def test_the_words_before_a_noun_of_a_description_are_labelled_with_it():
    dialogue = Dialogue(TOKENIZER).user("what do you see?", about=SCENE).says("a dog and two red cats", describes=SCENE)
    found = next_of(dialogue)
    words = TOKENIZER.convert_ids_to_tokens([dialogue.ids[place] for place in found.places_N.tolist()])
    assert words == ["<mm>", "a", "dog", "and", "two", "red"]
    assert [ALL_OBJECTS[i] for i in found.objects_N.tolist()] == ["dog"] * 2 + ["cat"] * 4
    assert found.counts_N.tolist() == [1, 1, 2, 2, 2, 2]
    assert not len(next_of(Dialogue(TOKENIZER).user("a dog", about=SCENE).says("two cats")).places_N)


def test_the_readout_predicts_the_next_noun():
    torch.manual_seed(0)
    found = next_of(Dialogue(TOKENIZER).user("what do you see?").says("a dog and two red cats", describes=SCENE))
    states, module = torch.randn(1, 40, 16), NounReadout(16, names=True)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        module(states, found).backward()
        optimizer.step()
    out = module.readout(module.norm(states[0, found.places_N]))[:, sum(SIZES) :]
    assert [ALL_OBJECTS[i] for i in out.argmax(-1).tolist()] == ["dog"] * 2 + ["cat"] * 4


def test_understanding_tokens_are_labelled_with_centres():
    sepia = Scene(sprites=SCENE.sprites[2:], style="sepia")
    rows = [Dialogue(TOKENIZER).user("hello"), Dialogue(TOKENIZER).user("what is it?", SCENE, sepia)]
    ids, _, _ = stack(rows)
    found = understanding_token_labels(rows, ids.shape[1])
    words = TOKENIZER.convert_ids_to_tokens([int(i) for i in ids.flatten()[found.places_N]])
    assert words == [PLACEHOLDER] * 32
    cat, dog = ALL_OBJECTS.index("cat"), ALL_OBJECTS.index("dog")
    # 4 x 4 tokens of 32 pixels: the cats in the second row, the dog in the last; the second picture shows no colours
    assert found.centres_NO.nonzero().tolist() == [[4, cat], [7, cat], [14, dog], [30, dog]]
    assert found.colours_NK.nonzero().tolist() == [[4, 0], [7, 0], [14, 8]]


def test_counts_are_overridden_by_the_described_scene():
    described = replace(SCENE, sprites=(SCENE.sprites[0], SCENE.sprites[2]))  # one cat, where two are shown
    rows = [Dialogue(TOKENIZER).user("what is it?", SCENE) for _ in range(2)]
    found = understanding_token_labels(rows, len(rows[0]), [None, described])
    assert (found.count_override_PS[0] == -1).all()
    assert {i: n for i, n in enumerate(found.count_override_PS[1].tolist()) if n} == {4: 1, 7: 1, 14: 1}
    assert override_counts(SCENE, SCENE, 16)[[4, 7, 14]].tolist() == [2, 2, 1]


def test_the_readout_of_understanding_tokens_learns_their_contents():
    torch.manual_seed(0)
    rows = [Dialogue(TOKENIZER).user("what is it?", SCENE)]
    found = understanding_token_labels(rows, len(rows[0]))
    states, module = torch.randn(1, 40, 16), TokenReadout(16)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(80):
        optimizer.zero_grad()
        loss = module(states, found)
        loss.backward()
        optimizer.step()
    out = module.readout(module.norm(states[0, found.places_N])) > 0
    assert torch.equal(out[:, : len(ALL_OBJECTS)], found.centres_NO > 0)
    nothing = understanding_token_labels([Dialogue(TOKENIZER).user("hello")], 4)
    assert float(module(states.requires_grad_(), nothing).detach()) == 0
