"""Labels from the renderer's scenes for the tokens of conversations, for auxiliary losses (`mm.training.readouts`).

Design choices
- A noun of the user is labelled with the scene that its turn refers to: for a question the picture that is asked about,
  for a prompt the picture that will be drawn, for an edit its target (so that after "remove the cat" the count of cats
  is zero).
- The tokens before each noun of a description are labelled with that next noun.
- An understanding token is labelled with the objects and colours whose centres are in its part of the picture.
- A scene may be described with another count of one of its objects (`mm.training.conversations.with_other_count`). Then
  the counts of its understanding tokens are overridden by those of the described scene, so that replies learn to follow
  the counter rather than counts memorized per object.

Legend: B rows, T tokens, N nouns or understanding tokens, P pictures, S understanding tokens a picture, C cells a side,
R = 4 relations, O objects, K = 9 colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from mm.models.dialogue import IGNORED, PLACEHOLDER, Dialogue
from mm.world import vocabulary as v
from mm.world.scene import Scene, Sprite, group_relation, groups, members

CELLS = v.SIZE // v.CELL
UNKNOWN = [0] * len(v.RELATIONS)
# object, count, columns, rows, colour, relations
_Label = tuple[int, int, list[int], list[int], int, list[int] | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class NounLabels:
    """Labels of the nouns of a batch.

    Attributes:
        places_N: Indices into the flattened rows (B * T).
        objects_N: The object.
        counts_N: How many there are in the scene.
        columns_NC: The columns of cells that hold centres.
        rows_NC: The rows of cells that hold centres.
        colours_N: The colour, the last being natural; `IGNORED` where it is not unique or not visible.
        relations_NR: Which of `vocabulary.RELATIONS` hold to the other noun of the turn.
        paired_N: Whether there is another noun and both are in the scene.
    """

    places_N: torch.Tensor
    objects_N: torch.Tensor
    counts_N: torch.Tensor
    columns_NC: torch.Tensor
    rows_NC: torch.Tensor
    colours_N: torch.Tensor
    relations_NR: torch.Tensor
    paired_N: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class UnderstandingTokenLabels:
    """Labels of the understanding tokens of a batch.

    Attributes:
        places_N: Indices into the flattened rows (B * T).
        centres_NO: Which objects have a centre in the token's part of the picture.
        colours_NK: Which colours do; the last is natural.
        count_override_PS: Counts that replace the counter's, -1 where they do not.
    """

    places_N: torch.Tensor
    centres_NO: torch.Tensor
    colours_NK: torch.Tensor
    count_override_PS: torch.Tensor


def understanding_token_labels(
    dialogues: Sequence[Dialogue], width: int, described: Sequence[Scene | None] | None = None
) -> UnderstandingTokenLabels:
    """Labels of the understanding tokens of conversations about scenes.

    Args:
        dialogues: Conversations whose pictures are scenes.
        width: The length to which their rows will be padded.
        described: For each conversation, the scene that its words describe where that has other counts than its
            picture.
    """
    places: list[int] = []
    centres: list[torch.Tensor] = []
    colours: list[torch.Tensor] = []
    overrides: list[torch.Tensor] = []
    for row, (dialogue, other) in enumerate(zip(dialogues, described or [None] * len(dialogues), strict=True)):
        placeholder, count = dialogue.token(PLACEHOLDER), dialogue.tokens_per_picture
        places += [row * width + place for place, token in enumerate(dialogue.ids) if token == placeholder]
        for scene in dialogue.pictures:
            objects, tints = token_labels(scene, count)
            centres.append(objects)
            colours.append(tints)
            overrides.append(torch.full((count,), -1.0) if other is None else override_counts(scene, other, count))
    return UnderstandingTokenLabels(
        places_N=torch.tensor(places, dtype=torch.int64),
        centres_NO=torch.cat(centres) if centres else torch.zeros(0, len(v.ALL_OBJECTS)),
        colours_NK=torch.cat(colours) if colours else torch.zeros(0, len(v.COLOURS) + 1),
        count_override_PS=torch.stack(overrides) if overrides else torch.zeros(0, 1),
    )


def _part(sprite: Sprite, tokens: int) -> int:
    """Which of the picture's parts, row by row, holds the sprite's centre."""
    side = math.isqrt(tokens)
    size = v.SIZE // side
    return sprite.y // size * side + sprite.x // size


def same_kind_labels(scene: Scene, tokens: int) -> torch.Tensor:
    """Which understanding tokens (S, S) hold centres of sprites of one group."""
    same = torch.zeros(tokens, tokens)
    for group in groups(scene):
        here = [_part(s, tokens) for s in members(scene, group)]
        for token in here:
            same[token, here] = 1
    return same


def override_counts(scene: Scene, described: Scene, tokens: int) -> torch.Tensor:
    """Counts (S,) of the understanding tokens of `scene` by the groups of the `described` scene."""
    counts = {(g.object, g.colour): g.count for g in groups(described)}
    numbers = torch.zeros(tokens)
    for s in scene.sprites:
        numbers[_part(s, tokens)] = counts[s.object, s.colour]
    return numbers


def token_labels(scene: Scene, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which objects (S, O) and colours (S, K) have a centre in each understanding token's part of the picture.

    The last colour is natural; a style without hue shows none.
    """
    objects, colours = torch.zeros(tokens, len(v.ALL_OBJECTS)), torch.zeros(tokens, len(v.COLOURS) + 1)
    for s in scene.sprites:
        token = _part(s, tokens)
        objects[token, v.ALL_OBJECTS.index(s.object)] = 1
        if v.shows_colour(scene.style):
            colours[token, len(v.COLOURS) if s.colour is None else v.COLOURS.index(s.colour)] = 1
    return objects, colours


def noun_ids(number: Callable[[str], int]) -> dict[int, str]:
    """Token id -> object, for singulars, plurals and synonyms; `number` gives a word's token id."""
    words = {word: name for name in v.ALL_OBJECTS for word in (name, v.PLURALS[name], *v.SYNONYMS.get(name, ()))}
    return {number(word): name for word, name in words.items()}


def noun_labels(
    rows: Sequence[Sequence[int]], about: Sequence[Sequence[Scene | None]], width: int, nouns: dict[int, str]
) -> NounLabels:
    """Labels of the nouns of token rows.

    Args:
        rows: Token ids.
        about: The scene that each token refers to, None for none.
        width: The length to which the rows will be padded.
        nouns: Token id -> object (`noun_ids`).
    """
    places: list[int] = []
    labels: list[_Label] = []
    for row, (ids, scenes) in enumerate(zip(rows, about, strict=True)):
        for turn, scene in _turns(scenes):
            named = {place: nouns[ids[place]] for place in turn if ids[place] in nouns}
            places += [row * width + place for place in named]
            labels += [_label(name, scene, set(named.values()) - {name}) for name in named.values()]
    return _stacked(places, labels)


def next_noun_labels(
    rows: Sequence[Sequence[int]], describes: Sequence[Sequence[Scene | None]], width: int, nouns: dict[int, str]
) -> NounLabels:
    """Labels the tokens before each noun of a description with that noun.

    As `noun_labels`, but a noun labels all tokens since the noun before it, from the one before the reply on;
    `describes` is the scene that each token of a reply describes.
    """
    places: list[int] = []
    labels: list[_Label] = []
    for row, (ids, scenes) in enumerate(zip(rows, describes, strict=True)):
        for turn, scene in _turns(scenes):
            start = turn[0] - 1
            for place in turn:
                if ids[place] in nouns:
                    places += [row * width + before for before in range(start, place)]
                    labels += [_label(nouns[ids[place]], scene, set())] * (place - start)
                    start = place
    return _stacked(places, labels)


def _stacked(places: list[int], labels: list[_Label]) -> NounLabels:
    objects, counts, columns, lines, colours, relations = zip(*labels, strict=True) if labels else ((),) * 6
    return NounLabels(
        places_N=torch.tensor(places, dtype=torch.int64),
        objects_N=torch.tensor(objects, dtype=torch.int64),
        counts_N=torch.tensor(counts, dtype=torch.int64),
        columns_NC=torch.tensor(columns, dtype=torch.float32).view(-1, CELLS),
        rows_NC=torch.tensor(lines, dtype=torch.float32).view(-1, CELLS),
        colours_N=torch.tensor(colours, dtype=torch.int64),
        relations_NR=torch.tensor([r or UNKNOWN for r in relations], dtype=torch.float32).view(-1, len(UNKNOWN)),
        paired_N=torch.tensor([r is not None for r in relations], dtype=torch.bool),
    )


def _turns(scenes: Sequence[Scene | None]) -> Iterator[tuple[list[int], Scene]]:
    """The places of each run of tokens that refer to one scene."""
    for _, places in groupby(range(len(scenes)), lambda place: id(scenes[place])):
        scene = scenes[(turn := list(places))[0]]
        if scene is not None:
            yield turn, scene


def _label(name: str, scene: Scene, others: set[str]) -> _Label:
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
