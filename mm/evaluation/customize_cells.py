"""The measurements behind the claims of docs/customization.md, as cells that are each kept in a file of their own.

Design choices
- Cells share adapters: each is trained once, kept in the folder, and used by every cell that needs it.
- Cells hold plain verdicts, one a picture, so that tables can pool them over subjects with their intervals.
- Cells are in the order of what matters most. A run that was stopped goes on with the first that is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mm.evaluation.customize_bench import ORTHOGONAL, SUBJECTS, Bench
from mm.evaluation.customize_measures import (
    PLAIN,
    alone,
    beside,
    beside_base,
    class_base,
    class_kept,
    erased,
    four_applied,
    four_trained,
    ground,
    merged,
    pairs,
    pairs_apart,
    pairs_base,
    style_learned,
    unrelated,
)
from mm.evaluation.customize_styles import UNSEEN

MERGING: tuple[str, ...] = ("distill", "regmean", "sum")
APART = "apart"  # not merged: `mm.draw_apart`

Named = tuple[str, Callable[[Bench], dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement: its name "table/row/part", and what makes it."""

    name: str
    make: Callable[[Bench], dict[str, Any]]

    @property
    def file(self) -> str:
        """The name of the cell's file."""
        return self.name.replace("/", "--") + ".json"


def plan() -> list[Cell]:
    """All cells, the most telling first."""
    return [Cell(name=name, make=make) for name, make in _cells()]


def _cells() -> Iterator[Named]:
    first = SUBJECTS[0]
    yield from _by_method(PLAIN, SUBJECTS)
    yield from _four(SUBJECTS[:4])
    yield from _grounds(first)
    for adapter in ("", "unrelated", "on"):
        yield f"erased/{adapter or 'alone'}", partial(erased, adapter=adapter)
    for subject in SUBJECTS[:4]:
        yield f"alone/{ORTHOGONAL}/{subject}", partial(alone, method=ORTHOGONAL, subject=subject)
    for method in (ORTHOGONAL, PLAIN):
        for how in MERGING:
            yield f"merged/{method}/four/{how}", partial(merged, method=method, subjects=SUBJECTS[:4], how=how)
            yield f"pairs/{method}/four/{how}", partial(pairs, method=method, subjects=SUBJECTS[:4], how=how)
    yield f"four/trained/{first}", partial(four_trained, subject=first)
    yield from _classes(first)
    yield "erased/on, guarded", partial(erased, adapter="on, guarded")
    yield from _by_method(ORTHOGONAL, SUBJECTS[4:])
    for method in (PLAIN, "stydeco"):
        for style in UNSEEN:
            yield f"style/{method}/{style}", partial(style_learned, method=method, style=style)
    yield from _four(SUBJECTS[4:])
    for subject in ("tulip", "gift"):
        yield from _grounds(subject)
        yield from _classes(subject)
    for subject in SUBJECTS[1:]:
        yield f"four/trained/{subject}", partial(four_trained, subject=subject)


def _by_method(method: str, subjects: Sequence[str]) -> Iterator[Named]:
    for subject in subjects:
        yield f"alone/{method}/{subject}", partial(alone, method=method, subject=subject)
    for subject in subjects:
        yield f"beside/{method}/{subject}", partial(beside, method=method, subject=subject)
    if method == PLAIN:
        yield "compose/base/none", unrelated
        for subject in subjects:
            yield f"compose/{method}/{subject}", partial(unrelated, method=method, subject=subject)
        yield "beside/base/known", beside_base
        yield "pairs/base/known", pairs_base
    for how in MERGING:
        yield f"merged/{method}/eight/{how}", partial(merged, method=method, subjects=SUBJECTS, how=how)
        yield f"pairs/{method}/eight/{how}", partial(pairs, method=method, subjects=SUBJECTS, how=how)
    yield f"pairs/{method}/eight/{APART}", partial(pairs_apart, method=method, subjects=SUBJECTS)


def _four(subjects: Sequence[str]) -> Iterator[Named]:
    for subject in subjects:
        yield f"four/applied/{subject}", partial(four_applied, subject=subject)


def _grounds(subject: str) -> Iterator[Named]:
    for method in ("textual-inversion", "detex"):
        yield f"ground/{method}/{subject}", partial(ground, method=method, subject=subject)


def _classes(subject: str) -> Iterator[Named]:
    if subject == SUBJECTS[0]:
        yield "class/base/known", class_base
    for method in ("class-diffusion", PLAIN):
        yield f"class/{method}/{subject}", partial(class_kept, method=method, subject=subject)
