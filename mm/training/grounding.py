"""Grounding: a noun's state halfway through the text stream must know where, how many and of what colour its object is.

Design choices
- An answer teaches one word; the renderer knows everything about every noun that is said. So a linear readout of a
  middle text layer names, for each noun of the user's: the object's number, the columns and rows of the picture that
  hold its centres, and its colour. This is drawing's alignment of cells (`mm.training.drawing`) for words.
- "Is the cat left of the dog?" is an exclusive or of a word, an order and two places, which no gradient of the answer
  alone finds. So a later layer's readout names, for each of two nouns of a turn, how its object stands to the other.
- The scene is the one the words speak of: for a question the picture that was looked at, for a prompt the picture that
  will be drawn (so "left of" must reach both nouns before pictures read them), for an edit the target (so that
  "remove the cat" makes cat's number zero).
- A description names group after group, and what it must find next shows in no word of it yet. So a readout at the
  words before each noun of a reply names the coming noun, its number, places and colour.
- Counting needs what stands in a picture to lie in the looks in a form that can be added up. So a readout of the looks
  themselves names the objects, and the colours, whose centres lie in each look's part of the picture.
- Which looks show things of one kind is what the connector's counter learns (`mm.training.counter_stage`). Words learn
  to believe it where it is told another number than the picture shows, the one that the words say: what could be
  counted by heart, a number of a thing that was never seen so often, is then read off the counter.
- The readouts are training state and are not published.

This module does not know models, looks or losses other than its own.
Legend: B rows, T tokens, N nouns or looks, P pictures, S their looks, D width, R = 4 relations, O objects,
K = 9 colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn

from mm.models import layers
from mm.models.dialogue import IGNORED, Dialogue
from mm.world import vocabulary as v
from mm.world.scene import Scene, group_relation, groups, members

CELLS = v.SIZE // v.CELL
SIZES = (v.MAX_COUNT + 1, CELLS, CELLS, len(v.COLOURS) + 1)  # number, columns, rows, colour (the last is natural)
UNKNOWN = [0] * len(v.RELATIONS)
_Truth = tuple[
    int, int, list[int], list[int], int, list[int] | None
]  # object, number, columns, rows, colour, relations


@dataclass(frozen=True, kw_only=True, slots=True)
class Nouns:
    """Where nouns stand in a batch of rows, flattened (N,), and the truth of each; `IGNORED` where nothing shows it."""

    places_N: torch.Tensor
    objects_N: torch.Tensor
    numbers_N: torch.Tensor
    columns_NC: torch.Tensor
    rows_NC: torch.Tensor
    colours_N: torch.Tensor
    relations_NR: torch.Tensor  # of `v.RELATIONS`, which hold to the turn's other noun
    paired_N: torch.Tensor  # whether there is another noun, and both are in the scene


@dataclass(frozen=True, kw_only=True, slots=True)
class Looks:
    """Where looks stand in a batch of rows, flattened (N,), and whose centres, and which colours, each holds.

    `told_PS` are the numbers that a picture's looks are told in the counter's place, -1 where it says them itself.
    """

    places_N: torch.Tensor
    centres_NO: torch.Tensor
    colours_NK: torch.Tensor
    told_PS: torch.Tensor


def find_looks(dialogues: Sequence[Dialogue], width: int, claims: Sequence[Scene | None] | None = None) -> Looks:
    """The looks of conversations about scenes, whose rows will be padded to `width`.

    `claims` name, for a conversation whose words count otherwise than its pictures show, the scene that they speak of.
    """
    places: list[int] = []
    centres: list[torch.Tensor] = []
    colours: list[torch.Tensor] = []
    told: list[torch.Tensor] = []
    for row, (dialogue, claim) in enumerate(zip(dialogues, claims or [None] * len(dialogues), strict=True)):
        look = dialogue.token("<look>")
        places += [row * width + place for place, word in enumerate(dialogue.ids) if word == look]
        for scene in dialogue.pictures:
            objects, tints = look_truth(scene, dialogue.looks)
            centres.append(objects)
            colours.append(tints)
            silent = torch.full((dialogue.looks,), -1.0)
            told.append(silent if claim is None else told_numbers(scene, claim, dialogue.looks))
    return Looks(
        places_N=torch.tensor(places, dtype=torch.int64),
        centres_NO=torch.cat(centres) if centres else torch.zeros(0, len(v.ALL_OBJECTS)),
        colours_NK=torch.cat(colours) if colours else torch.zeros(0, len(v.COLOURS) + 1),
        told_PS=torch.stack(told) if told else torch.zeros(0, 1),
    )


def kin_truth(scene: Scene, looks: int) -> torch.Tensor:
    """Which looks (looks, looks) hold centres of sprites of one group; parts go row by row."""
    side = math.isqrt(looks)
    part = v.SIZE // side
    kin = torch.zeros(looks, looks)
    for group in groups(scene):
        here = [s.y // part * side + s.x // part for s in members(scene, group)]
        for look in here:
            kin[look, here] = 1
    return kin


def told_numbers(scene: Scene, claim: Scene, looks: int) -> torch.Tensor:
    """How many are like what each look (looks,) of `scene` shows, by the groups of `claim`; parts go row by row."""
    side = math.isqrt(looks)
    part = v.SIZE // side
    counts = {(g.object, g.colour): g.count for g in groups(claim)}
    numbers = torch.zeros(looks)
    for s in scene.sprites:
        numbers[s.y // part * side + s.x // part] = counts[s.object, s.colour]
    return numbers


def kin_loss(kin_PSS: torch.Tensor, truth_PSS: torch.Tensor) -> torch.Tensor:
    """The mean loss over looks of saying which others are of their kind."""
    kin = kin_PSS.float().clamp(1e-4, 1 - 1e-4)
    return -(truth_PSS * kin.log() + (1 - truth_PSS) * (1 - kin).log()).sum(-1).mean()


def look_truth(scene: Scene, looks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether a centre of each object (looks, O) and colour (looks, K) lies in each look's part of the picture.

    Parts go row by row. The last colour is natural; a style without hue shows none.
    """
    side = math.isqrt(looks)
    part = v.SIZE // side
    objects, colours = torch.zeros(looks, len(v.ALL_OBJECTS)), torch.zeros(looks, len(v.COLOURS) + 1)
    for s in scene.sprites:
        look = s.y // part * side + s.x // part
        objects[look, v.ALL_OBJECTS.index(s.object)] = 1
        if v.shows_colour(scene.style):
            colours[look, len(v.COLOURS) if s.colour is None else v.COLOURS.index(s.colour)] = 1
    return objects, colours


def noun_ids(number: Callable[[str], int]) -> dict[int, str]:
    """Token id -> object, for singulars, plurals and synonyms; `number` gives a word's token id."""
    words = {word: name for name in v.ALL_OBJECTS for word in (name, v.PLURALS[name], *v.SYNONYMS.get(name, ()))}
    return {number(word): name for word, name in words.items()}


def find_nouns(
    rows: Sequence[Sequence[int]], about: Sequence[Sequence[Scene | None]], width: int, nouns: dict[int, str]
) -> Nouns:
    """The nouns of token rows that will be padded to `width`; `about` names the scene of each token."""
    places: list[int] = []
    truths: list[_Truth] = []
    for row, (ids, scenes) in enumerate(zip(rows, about, strict=True)):
        for turn, scene in _turns(scenes):
            named = {place: nouns[ids[place]] for place in turn if ids[place] in nouns}
            places += [row * width + place for place in named]
            truths += [_truth(name, scene, set(named.values()) - {name}) for name in named.values()]
    return _stacked(places, truths)


def coming_nouns(
    rows: Sequence[Sequence[int]], told: Sequence[Sequence[Scene | None]], width: int, nouns: dict[int, str]
) -> Nouns:
    """What the tokens before each noun of a reply lead up to, from the one before the reply on.

    As `find_nouns`, but a noun stands at the places of all tokens since the noun before it; `told` names the scene that
    each token of a reply describes.
    """
    places: list[int] = []
    truths: list[_Truth] = []
    for row, (ids, scenes) in enumerate(zip(rows, told, strict=True)):
        for turn, scene in _turns(scenes):
            start = turn[0] - 1
            for place in turn:
                if ids[place] in nouns:
                    places += [row * width + before for before in range(start, place)]
                    truths += [_truth(nouns[ids[place]], scene, set())] * (place - start)
                    start = place
    return _stacked(places, truths)


def _stacked(places: list[int], truths: list[_Truth]) -> Nouns:
    objects, numbers, columns, lines, colours, relations = zip(*truths, strict=True) if truths else ((),) * 6
    return Nouns(
        places_N=torch.tensor(places, dtype=torch.int64),
        objects_N=torch.tensor(objects, dtype=torch.int64),
        numbers_N=torch.tensor(numbers, dtype=torch.int64),
        columns_NC=torch.tensor(columns, dtype=torch.float32).view(-1, CELLS),
        rows_NC=torch.tensor(lines, dtype=torch.float32).view(-1, CELLS),
        colours_N=torch.tensor(colours, dtype=torch.int64),
        relations_NR=torch.tensor([r or UNKNOWN for r in relations], dtype=torch.float32).view(-1, len(UNKNOWN)),
        paired_N=torch.tensor([r is not None for r in relations], dtype=torch.bool),
    )


def _turns(scenes: Sequence[Scene | None]) -> Iterator[tuple[list[int], Scene]]:
    """The places of each run of tokens that speak of one scene."""
    for _, places in groupby(range(len(scenes)), lambda place: id(scenes[place])):
        scene = scenes[(turn := list(places))[0]]
        if scene is not None:
            yield turn, scene


def _truth(name: str, scene: Scene, others: set[str]) -> _Truth:
    found = [s for s in scene.sprites if s.object == name]
    columns, rows = [0] * CELLS, [0] * CELLS
    for sprite in found:
        columns[sprite.x // v.CELL] = rows[sprite.y // v.CELL] = 1
    colours = {s.colour for s in found}
    colour = IGNORED
    if len(colours) == 1 and v.shows_colour(scene.style):
        only = colours.pop()
        colour = len(v.COLOURS) if only is None else v.COLOURS.index(only)
    number = min(len(found), v.MAX_COUNT)
    return v.ALL_OBJECTS.index(name), number, columns, rows, colour, _relations(name, scene, others)


def _relations(name: str, scene: Scene, others: set[str]) -> list[int] | None:
    """Which relations hold to the one other noun of the turn; None where there is no such pair in the scene."""
    if len(others) != 1:
        return None
    (other,), parts = others, groups(scene)
    held = [group_relation(scene, a, b) for a in parts for b in parts if a.object == name and b.object == other]
    return [int(all(relation in h for h in held)) for relation in v.RELATIONS] if held else None


class Relations(nn.Module):
    """The readout of how two nouns stand to each other, with its loss."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = layers.Norm(width)
        self.readout = nn.Linear(width, len(v.RELATIONS))

    def forward(self, states_BTD: torch.Tensor, nouns: Nouns) -> torch.Tensor:
        """The mean loss over paired nouns; zero, with a gradient path, where there are none."""
        if not bool(nouns.paired_N.any()):
            return states_BTD.sum() * 0
        states = states_BTD.flatten(0, 1)[nouns.places_N[nouns.paired_N]]
        logits = self.readout(self.norm(states)).float()
        return F.binary_cross_entropy_with_logits(logits, nouns.relations_NR[nouns.paired_N])


class LookGrounding(nn.Module):
    """The readout of looks, with its loss."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = layers.Norm(width)
        self.readout = nn.Linear(width, len(v.ALL_OBJECTS) + len(v.COLOURS) + 1)

    def forward(self, states_BTD: torch.Tensor, looks: Looks) -> torch.Tensor:
        """The mean loss over looks; zero, with a gradient path, where there are none."""
        if not len(looks.places_N):
            return states_BTD.sum() * 0
        out = self.readout(self.norm(states_BTD.flatten(0, 1)[looks.places_N])).float()
        truth = torch.cat([looks.centres_NO, looks.colours_NK], 1)
        return F.binary_cross_entropy_with_logits(out, truth, reduction="none").sum(-1).mean()


class Grounding(nn.Module):
    """The readout of nouns, with its loss; with `names` it also says which object, for words that are still to come."""

    def __init__(self, width: int, *, names: bool = False) -> None:
        super().__init__()
        self.sizes = (*SIZES, len(v.ALL_OBJECTS)) if names else SIZES
        self.norm = layers.Norm(width)  # token states have no scale of their own
        self.readout = nn.Linear(width, sum(self.sizes))

    def forward(self, states_BTD: torch.Tensor, nouns: Nouns) -> torch.Tensor:
        """The mean loss over nouns; zero, with a gradient path, where there are none."""
        if not len(nouns.places_N):
            return states_BTD.sum() * 0
        out = self.readout(self.norm(states_BTD.flatten(0, 1)[nouns.places_N])).float()
        numbers, columns, rows, colours, *objects = out.split(list(self.sizes), -1)
        here = (nouns.numbers_N > 0).float()  # an absent object stands nowhere: nothing to learn from it
        grid = F.binary_cross_entropy_with_logits(columns, nouns.columns_NC, reduction="none")
        grid = grid + F.binary_cross_entropy_with_logits(rows, nouns.rows_NC, reduction="none")
        loss = F.cross_entropy(numbers, nouns.numbers_N) + (grid.sum(-1) * here).mean()
        if bool((nouns.colours_N != IGNORED).any()):
            loss = loss + F.cross_entropy(colours, nouns.colours_N, ignore_index=IGNORED)
        for logits in objects:
            loss = loss + F.cross_entropy(logits, nouns.objects_N)
        return loss


@contextmanager
def tapped(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """While it lasts, the token states that a text layer gives out are collected."""
    states: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _args, out: states.append(out[0]))
    try:
        yield states
    finally:
        handle.remove()
