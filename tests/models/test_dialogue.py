"""Conversations as tokens: what is learned, where pictures are, and that every word is known."""

from __future__ import annotations

import random

import pytest
import torch

from mm.models.dialogue import IGNORED, Dialogue, WordKinds, detokenize, stack, word_loss
from mm.models.text import build_text_tokenizer
from mm.training import conversations
from mm.world.edits import sample_edit
from mm.world.scene import group_relation, groups, is_held_out, sample_scene
from mm.world.vocabulary import MAX_SPRITES
from mm.world.words import WORDS, split


@pytest.fixture(scope="module")
def tokenizer():
    return build_text_tokenizer()


def text_of(tokenizer, ids) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(ids)))


def test_a_conversation_reads_as_it_was_written(tokenizer):
    dialogue = Dialogue(tokenizer, tokens_per_picture=2).user("draw a cat").starts_drawing().has_drawn("first")
    dialogue.user("what is it?", "second").says("a cat")
    want = "<bos> <user> draw a cat <mm> <image> <look> <look> <end> <user> <look> <look> what is it ? <mm> a cat <end>"
    assert text_of(tokenizer, dialogue.ids) == want
    assert dialogue.pictures == ["first", "second"]
    said = [token for token, learned in zip(want.split(), dialogue.learned, strict=True) if learned]
    assert said == ["<image>", "<end>", "a", "cat", "<end>"]


def test_two_pictures_of_one_turn_stay_apart(tokenizer):
    ids = Dialogue(tokenizer, tokens_per_picture=2).user("describe", "a", "b").ids
    assert text_of(tokenizer, ids) == "<bos> <user> <look> <look> , <look> <look> , describe <mm>"


def test_targets_are_the_next_tokens_where_the_model_speaks(tokenizer):
    rows = [
        Dialogue(tokenizer).user("hello").says("hi"),
        Dialogue(tokenizer).user("draw a cat").starts_drawing(),
    ]
    ids, mask, targets = stack(rows)
    assert ids.shape == mask.shape == targets.shape == (2, 7)
    assert mask.sum(1).tolist() == [6, 7]
    for row in range(2):
        for place in range(6):
            wanted = targets[row, place]
            assert wanted in (IGNORED, ids[row, place + 1])
    assert text_of(tokenizer, targets[0][targets[0] != IGNORED]) == "hi <end>"
    assert text_of(tokenizer, targets[1][targets[1] != IGNORED]) == "<image>"


def test_conversations_use_known_words_only_and_show_what_they_ask_about(tokenizer):
    rng = random.Random(3)
    unknown = tokenizer.convert_tokens_to_ids("<unk>")

    def new() -> Dialogue:
        return Dialogue(tokenizer)

    for _ in range(60):
        scene, edit = sample_scene(rng), sample_edit(rng)
        asked = conversations.reading(new, scene, rng)
        assert asked.pictures == [scene]
        changed = conversations.changing(new, edit, rng)
        assert changed.pictures == [edit.source, edit.target]
        prompt = conversations.edit_prompt(new, edit, rng)
        assert prompt.pictures == [edit.source]
        assert prompt.ids[-1] == tokenizer.convert_tokens_to_ids("<image>")
        for dialogue in (asked, changed, prompt):
            assert unknown not in dialogue.ids
            assert dialogue.ids.count(tokenizer.convert_tokens_to_ids("<look>")) == 16 * len(dialogue.pictures)
            assert len(dialogue) <= 256
    for pair in conversations.SMALL_TALK:
        assert all(word in WORDS for text in pair for word in split(text))


def test_a_scene_with_another_count_changes_nothing_else_that_can_be_said():
    rng, changed, up = random.Random(5), 0, 0
    for _ in range(300):
        scene = sample_scene(rng, **conversations.READ)
        now = conversations.with_other_count(scene, rng)
        before, after = groups(scene), groups(now)
        if now is scene:
            continue
        changed += 1
        numbers = [{(g.object, g.colour): g.count for g in parts} for parts in (before, after)]
        assert numbers[0].keys() == numbers[1].keys()
        assert sum(numbers[0][key] != numbers[1][key] for key in numbers[0]) == 1
        up += len(now.sprites) > len(scene.sprites)
        assert not is_held_out(after)
        assert len(now.sprites) <= MAX_SPRITES
        assert (now.style, now.background) == (scene.style, scene.background)
        assert {s for s in now.sprites if s in scene.sprites} in (set(now.sprites), set(scene.sprites))
        for a in before:
            for b in before:
                assert a == b or group_relation(scene, a, b) == group_relation(now, a, b)
    assert changed > 200
    assert 0.3 < up / changed < 0.9


def test_only_what_stands_alone_is_called_it(tokenizer):
    rng = random.Random(0)
    seen = set()
    for _ in range(300):
        edit = sample_edit(rng)
        words = conversations.with_pronoun(edit, rng)
        if words != edit.instruction:
            assert len({s.object for s in edit.source.sprites}) == 1
            seen.add("it" if " it" in words else "them")
    assert seen == {"it", "them"}


def test_a_line_of_speech_sets_marks_tight():
    assert detokenize(["hello", "!", "what", "can", "i", "draw", "?"]) == "hello! what can i draw?"


def test_stacking_pads_with_what_is_not_seen(tokenizer):
    ids, mask, targets = stack([Dialogue(tokenizer), Dialogue(tokenizer).user("hello")])
    assert torch.equal(mask[0], torch.tensor([True, False, False, False]))
    assert ids[0, 1:].eq(0).all()
    assert targets.eq(IGNORED).all()


def test_a_words_share_of_smoothing_goes_to_its_kind_alone():
    """Against torch's own label smoothing over a vocabulary that is one kind; words of no kind are not smoothed."""
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 4, 6), torch.tensor([[0, 1, IGNORED, 5], [2, 4, 3, 0]])
    everything = WordKinds(of_V=torch.zeros(6, dtype=torch.int64), spread_KV=torch.full((1, 6), 1 / 6))
    want = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, label_smoothing=0.1
    )
    torch.testing.assert_close(word_loss(logits, targets, everything), want)
    nothing = WordKinds(of_V=torch.full((6,), -1), spread_KV=torch.zeros(1, 6))
    torch.testing.assert_close(word_loss(logits, targets, nothing), word_loss(logits, targets))


def test_the_best_answer_under_smoothing_gives_every_other_number_the_same():
    """So that a number never seen of a thing is no less likely than any other wrong one."""
    kinds = WordKinds(of_V=torch.tensor([0, 0, 0, 0, -1]), spread_KV=torch.tensor([[0.25, 0.25, 0.25, 0.25, 0.0]]))
    logits = torch.zeros(1, 2, 5, requires_grad=True)
    learner = torch.optim.Adam([logits], 0.1)
    for _ in range(400):
        learner.zero_grad()
        word_loss(logits, torch.tensor([[0, 1]]), kinds).backward()
        learner.step()
    shares = logits.detach().softmax(-1)[0]
    torch.testing.assert_close(shares[0], torch.tensor([0.925, 0.025, 0.025, 0.025, 0.0]), atol=5e-3, rtol=0)


def test_kinds_are_numbers_colours_and_things(tokenizer):
    kinds = conversations.word_kinds(lambda word: int(tokenizer.convert_tokens_to_ids(word)), 1024)
    kind = {
        w: int(kinds.of_V[tokenizer.convert_tokens_to_ids(w)]) for w in ("a", "three", "red", "cat", "cats", "left")
    }
    assert kind["a"] == kind["three"]
    assert len({kind["a"], kind["red"], kind["cat"], kind["cats"], kind["left"]}) == 5
    assert kind["left"] == -1
    assert tokenizer.unk_token_id not in kinds.spread_KV.nonzero()[:, 1]
    torch.testing.assert_close(kinds.spread_KV.sum(1), torch.ones(len(kinds.spread_KV)))
