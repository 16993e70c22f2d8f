"""`mm.merge`: one patch of several, so that one file draws all their subjects.

Design choices
- "sum" adds products exactly. "orthogonal" does the same and asks that the adapters were trained in subspaces of their
  own (method "orthogonal", Po et al. 2023, arXiv 2312.02432), in which sums disturb each other less.
- "regmean" needs the model: it draws with each adapter, and fits the merged layers to what the adapters did there
  (`mm.customization.merging.regmean`).
- "distill" starts there, and trains the merged layers (`mm.customization.merging.distill`).
- New words are carried along, with rows of their own; two adapters that bring the same word are refused.
- Nothing is lost silently: the report has the overlap of each pair, and what a cut to a rank has lost.

Legend: N outputs, K inputs, r rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from mm.adapters.entry import Entry
from mm.adapters.patch import Patch
from mm.core.checks import MAX_SEED, number, whole
from mm.core.errors import UserError, shown
from mm.core.nouns import counted
from mm.customization.learned import Learned
from mm.customization.merging.combining import COMBINING, cut
from mm.customization.merging.distill import Distillation, distill
from mm.customization.merging.regmean import Moments, OnProgress

METHODS = ("sum", "ties", "dare", "do", "orthogonal", "regmean", "distill")
DRAWING = ("regmean", "distill")  # these need the model
CUTTING = ("ties", "dare", "do", *DRAWING)  # these cut layers to a rank; the others keep the sum of the ranks
THINNING = ("ties", "dare")  # these keep a share of the values
DENSITY = 0.5
MAX_WEIGHT = 1e6
MAX_RANK = 10**6
MAX_UPDATES = 10**6
_APART = 0.05  # the largest cosine between subspaces that count as orthogonal


@torch.no_grad()
def merge(
    patches: Sequence[Patch], *, method: str = "sum", weights: Sequence[float] | None = None,
    density: float | None = None, rank: int | None = None, seed: int = 0, name: str = "merged", pipe: Any = None,
    words: Sequence[str] | None = None, steps: int | None = None, updates: int | None = None,
    progress: OnProgress = lambda share, text: None,
) -> Learned:  # fmt: skip
    """Makes one patch of several.

    Args:
        patches: two or more, of one model; those of other programs through `mm.read_lora`.
        method: one of `METHODS`.
        weights: how strongly each acts, a finite number; 1 by default.
        density: share of the values that "ties" and "dare" keep, by default .5; the other methods take none.
        rank: of layers that were combined as whole changes; None takes the sum of the ranks. "sum" and "orthogonal"
            keep the sum of the ranks, and take none.
        seed: of DARE's choice, and of what "regmean" and "distill" draw.
        name: of the result.
        pipe: the model, which "regmean" and "distill" draw with; it is unchanged afterwards. The other methods take
            none.
        words: what each adapter's subject is called in prompts; None takes what the adapters say. For "regmean" and
            "distill" alone.
        steps: of sampling for these; None takes the pipeline's own.
        updates: of training for each adapter, for "distill" alone; None takes `Distillation`'s.
        progress: called by these with a share from 0 to 1 and a text.

    Returns:
        The merged patch; its report has the overlap and what was lost.

    Raises:
        UserError: for patches that cannot be merged, with the first layer or word that stands against it.
    """
    check_options(len(patches), method, weights, density, rank, words, pipe is not None, updates)
    whole("seed", seed, 0, MAX_SEED)
    _check_patches(patches, rank)
    for patch, weight in zip(patches, weights or (), strict=False):
        if weight != 1 and all(entry.kind == "rows" for entry in patch.entries.values()):
            raise UserError(
                f"{patch.name!r} brings words alone, which act in full, and its weight is {weight:g}; leave it out, or "
                "give 1"
            )
    each = [1.0] * len(patches) if weights is None else [float(weight) for weight in weights]
    share = DENSITY if density is None else density
    if method == "orthogonal":
        _check_orthogonal(patches)
    carried = _Words(patches)
    moments = None
    called = (words or words_of(patches)) if method in DRAWING else []
    if method in DRAWING:
        moments = Moments(pipe, patches, called, seed=seed, steps=steps, progress=progress)
    errors: dict[str, float] = {}
    paths = list(dict.fromkeys(path for patch in patches for path in patch.entries))
    entries, lost = {}, {}
    for path in paths:
        if moments is not None and path in moments.paths:
            entries[path], lost[path], errors[path] = _regressed(moments, path, patches, each, rank)
            continue
        here = [(carried.moved(k, path, p.entries[path]), each[k]) for k, p in enumerate(patches) if path in p.entries]
        entries[path], loss = _combined(path, here, method, share, rank, seed)
        if loss:
            lost[path] = round(loss, 4)
    report: dict[str, Any] = {
        "merged": [patch.name for patch in patches], "overlap": overlaps(patches),
        "largest_loss": max(lost.values(), default=0.0), "lost": lost,
    }  # fmt: skip
    if errors:
        report |= {"errors": errors, "mean_error": round(sum(errors.values()) / len(errors), 4)}
    settings: dict[str, Any] = {"weights": each, "density": share, "seed": seed}
    if carried.tokens:
        settings["tokens"] = carried.tokens
    if method == "distill" and moments is not None:
        trained = {path: entries[path] for path in moments.paths}
        untrained = {path: entry for path, entry in entries.items() if path not in trained}
        rest = Patch(entries=untrained, base=patches[0].base, settings=settings, name="rest") if untrained else None
        config = Distillation() if updates is None else Distillation(updates=updates)
        made = distill(
            pipe, patches, called, each, trained, rest, seed=seed, steps=steps, config=config, progress=progress
        )
        entries |= made.entries
        report |= {"error_before": made.first, "error": made.last, "pairs": made.pairs}
        report |= {"pairs_error_before": made.pairs_first, "pairs_error": made.pairs_last}
        settings["updates"] = config.updates
    family = next((p.family for p in patches if isinstance(p, Learned) and p.family), "")
    return Learned(
        entries=entries, method=f"merged-{method}", base=next((p.base for p in patches if p.base), ""), name=name,
        settings=settings, report=report, family=family,
    )  # fmt: skip


def overlaps(patches: Sequence[Patch]) -> dict[str, int]:
    """How many layers each pair of patches both changes."""
    return {
        f"{one.name} and {other.name}": len(
            {p for p, e in one.entries.items() if e.kind != "rows"} & set(other.entries)
        )
        for one, other in combinations(patches, 2)
    }  # fmt: skip


def words_of(patches: Sequence[Patch]) -> list[str]:
    """What each adapter's subject is called in prompts. Raises UserError for an adapter that does not say it."""
    found = [str(patch.settings.get("name") or "") for patch in patches]
    if not all(found):
        unnamed = next(patch.name for patch, word in zip(patches, found, strict=True) if not word)
        raise UserError(
            f"adapter {unnamed!r} does not say what its subject is called in prompts; give the words of all adapters "
            "(words=[...], --word)"
        )
    return found


def check_options(
    count: int, method: str, weights: Sequence[float] | None, density: float | None, rank: int | None,
    words: Sequence[str] | None = None, with_model: bool = True, updates: int | None = None,
) -> None:  # fmt: skip
    """Checks what can be checked before a file is read.

    Args:
        count: of adapters.
        method: and the others as in `merge`.
        with_model: whether there is a model to draw with.
        updates: as in `merge`.

    Raises:
        UserError: for a wrong value, and for one that has no effect.
    """
    if count < 2:
        raise UserError(f"{counted(count, 'adapter')} to merge; give two or more")
    if method not in METHODS:
        raise UserError(f"no way of merging {method!r}; there are {', '.join(METHODS)}")
    if weights is not None and len(weights) != count:
        raise UserError(f"{counted(len(weights), 'weight')} for {count} adapters; give one for each")
    for weight in weights or ():
        number("weight", weight, -MAX_WEIGHT, MAX_WEIGHT)
    if density is not None:
        if not isinstance(density, int | float) or not 0 < density <= 1:
            raise UserError(f"density is {density}; give a number above 0, at most 1")
        _check_effect("density", density, method, THINNING)
    if rank is not None:
        whole("rank", rank, 1, MAX_RANK)
        _check_effect("rank", rank, method, CUTTING)

    if updates is not None:
        whole("updates", updates, 1, MAX_UPDATES)
        _check_effect("updates", updates, method, ("distill",))
    if method in DRAWING and not with_model:
        raise UserError(f"{method} draws with each adapter; give the model (pipe=..., --model)")
    if words is not None:
        if method not in DRAWING:
            raise UserError(
                f"words are given, which {method} does not use; leave them out, or merge with {' or '.join(DRAWING)}"
            )
        if len(words) != count or not all(words):
            raise UserError(f"{counted(len(words), 'word')} for {count} adapters; give one for each")


def _check_effect(name: str, value: float, method: str, methods: Sequence[str]) -> None:
    """Raises UserError where a setting is given to a method that does not use it."""
    if method not in methods:
        raise UserError(
            f"{name} is {value}, which {method} does not use; leave it out, or give a method that does: "
            f"{', '.join(methods)}"
        )


def _check_patches(patches: Sequence[Patch], rank: int | None) -> None:
    """Raises UserError for patches of different models, the same patch twice, and a rank that no layer has."""
    low = [entry for patch in patches for entry in patch.entries.values() if entry.kind == "lowrank"]
    if rank is not None:
        most = max((min(len(e.tensors["up"]), e.tensors["down"].shape[1]) for e in low), default=0)
        if rank > most:
            raise UserError(f"rank is {rank}, and no layer of the adapters can have more than {most}; give less")
    for one, other in combinations(patches, 2):
        if one is other or _same(one.entries, other.entries):
            raise UserError(
                f"{one.name!r} and {other.name!r} are the same adapter; give each once, and a weight where it is to "
                "act more strongly (--weight)"
            )
    bases = {patch.base for patch in patches if patch.base}
    if len(bases) > 1:
        raise UserError(
            f"the adapters were made for {len(bases)} different models ({', '.join(b[:8] for b in sorted(bases))}); "
            "merge adapters of one model"
        )
    if any(not patch.base for patch in patches):
        unnamed = next(patch.name for patch in patches if not patch.base)
        warnings.warn(f"adapter {unnamed!r} does not say which model it was made for", stacklevel=3)


def _same(one: Mapping[str, Entry], other: Mapping[str, Entry]) -> bool:
    return one.keys() == other.keys() and all(
        entry.tensors.keys() == other[path].tensors.keys()
        and all(torch.equal(value, other[path].tensors[key]) for key, value in entry.tensors.items())
        for path, entry in one.items()
    )


def _regressed(
    moments: Moments, path: str, patches: Sequence[Patch], weights: Sequence[float], rank: int | None
) -> tuple[Entry, float, float]:  # fmt: skip
    """One entry by least squares, what its cut to a rank has lost, and its error on the adapters' own prompts."""
    here = [patch.entries.get(path) for patch in patches]
    shapes = {tuple(_delta(entry).shape) for entry in here if entry is not None}
    if len(shapes) > 1:
        raise UserError(f"{path} has changes of shapes {sorted(shapes)}; the adapters are for different models")
    deltas = [None if e is None else weight * _delta(e) for e, weight in zip(here, weights, strict=True)]
    low = [len(entry.tensors["down"]) for entry in here if entry is not None and entry.kind == "lowrank"]
    dense = any(entry is not None and entry.kind == "dense" for entry in here)
    made = moments.merged(path, deltas, rank or (None if dense else sum(low)))
    tensors = {"down": made.down.to(torch.float16), "up": made.up.to(torch.float16)}
    return Entry(kind="lowrank", tensors=tensors), round(made.lost, 4), round(made.error, 4)


def _combined(
    path: str, here: Sequence[tuple[Entry, float]], method: str, density: float, rank: int | None, seed: int
) -> tuple[Entry, float]:  # fmt: skip
    """One entry of several, and the share that a cut has lost."""
    first = here[0][0]
    kinds, scopes = {entry.kind for entry, _ in here}, {entry.scope for entry, _ in here}
    if "rotation" in kinds and len(here) > 1:
        raise UserError(f"{path} is a rotation, which no sum holds; truncate that patch first")
    if len(scopes) > 1:
        raise UserError(f"{path} is changed for all tokens by one adapter and for some by another; they do not add up")
    if kinds == {"rows"}:
        tensors = {key: torch.cat([entry.tensors[key] for entry, _ in here]) for key in ("ids", "rows")}
        ids, counts = torch.unique(tensors["ids"], return_counts=True)
        if bool((counts > 1).any()):
            raise UserError(
                f"{path}: two adapters change row {int(ids[counts > 1][0])}, and no row is the sum of two; leave one "
                "out"
            )
        return Entry(kind="rows", tensors=tensors), 0.0
    if kinds == {"rotation"}:
        return replace(first, scale=first.scale * here[0][1]), 0.0
    if kinds == {"lowrank"} and (method not in CUTTING or len(here) == 1):
        return _stacked([(e, w) for e, w in here]), 0.0
    deltas = [_delta(entry) for entry, _ in here]
    shapes = {tuple(delta.shape) for delta in deltas}
    if len(shapes) > 1:
        raise UserError(f"{path} has changes of shapes {sorted(shapes)}; the adapters are for different models")
    weights = [weight for _, weight in here]
    if method in COMBINING and first.kind != "bias" and len(here) > 1 and deltas[0].ndim > 1:
        flat = COMBINING[method]([delta.flatten(1) for delta in deltas], weights, density, seed)
        total = flat.view_as(deltas[0])
    else:
        total = sum((w * d for w, d in zip(weights, deltas, strict=True)), torch.zeros_like(deltas[0]))
    if kinds != {"lowrank"}:
        return Entry(kind="bias" if kinds == {"bias"} else "dense", tensors={"delta": total}), 0.0
    most = rank or sum(len(entry.tensors["down"]) for entry, _ in here)
    down, up, lost = cut(total, min(most, *total.shape))
    made = {"down": down.to(torch.float16), "up": up.to(torch.float16)}
    return Entry(kind="lowrank", tensors=made, scope=first.scope), lost


def _stacked(here: Sequence[tuple[Entry, float]]) -> Entry:
    """The exact sum of products."""
    down = torch.cat([entry.tensors["down"].float() for entry, _ in here])
    up = torch.cat([weight * entry.scale * entry.tensors["up"].float() for entry, weight in here], 1)
    kind = here[0][0].tensors["down"].dtype
    return Entry(kind="lowrank", tensors={"down": down.to(kind), "up": up.to(kind)}, scope=here[0][0].scope)


def _delta(entry: Entry) -> Tensor:
    if entry.kind == "lowrank":
        return entry.scale * entry.tensors["up"].float() @ entry.tensors["down"].float()
    return entry.scale * entry.tensors["delta"].float()


def _check_orthogonal(patches: Sequence[Patch]) -> None:
    for one, other in combinations(patches, 2):
        for path, entry in one.entries.items():
            second = other.entries.get(path)
            if second is None or entry.kind != "lowrank" or second.kind != "lowrank":
                continue
            angle = shared(entry.tensors["down"].float(), second.tensors["down"].float())
            if angle > _APART:
                raise UserError(
                    f"{one.name!r} and {other.name!r} share directions in {path} (cosine {angle:.2f}); train them "
                    "with method 'orthogonal' and different slots, or merge with method 'do'"
                )


def shared(one_rK: Tensor, other_rK: Tensor) -> float:
    """The largest cosine between the row spaces of two matrices: 0 where they are orthogonal."""
    bases = [torch.linalg.qr(m.T)[0] for m in (one_rK, other_rK)]
    return float(torch.linalg.matrix_norm(bases[0].T @ bases[1], 2))


class _Words:
    """The new words of all patches, each with a row of its own."""

    def __init__(self, patches: Sequence[Patch]) -> None:
        self.tokens: list[dict[str, Any]] = []
        self._rows: dict[tuple[int, str], dict[int, int]] = {}
        taken: dict[str, set[int]] = {}
        seen: dict[tuple[str, str], str] = {}
        for k, patch in enumerate(patches):
            for item in patch.settings.get("tokens", ()):
                key = (item["tokenizer"], item["token"])
                if key in seen:
                    raise UserError(
                        f"{seen[key]!r} and {patch.name!r} both bring the word {shown(item['token'])}; customize one "
                        "of them again under another name"
                    )
                seen[key] = patch.name
                used = taken.setdefault(item["embedding"], set())
                row = int(item["id"])
                while row in used:
                    row += 1
                used.add(row)
                self._rows.setdefault((k, item["embedding"]), {})[int(item["id"])] = row
                self.tokens.append(dict(item) | {"id": row})

    def moved(self, number: int, path: str, entry: Entry) -> Entry:
        """The entry of patch `number`, with rows that no other patch has."""
        rows = self._rows.get((number, path))
        if entry.kind != "rows" or rows is None:
            return entry
        ids = torch.tensor([rows.get(int(i), int(i)) for i in entry.tensors["ids"]])
        return replace(entry, tensors=entry.tensors | {"ids": ids})
