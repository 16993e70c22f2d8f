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
from mm.adapters.factors import FACTORED, OF_WEIGHT, WHOLE, shape_of, whole_change
from mm.adapters.patch import Patch
from mm.adapters.stack import stack_of
from mm.core.checks import check_kind, given
from mm.core.errors import UserError
from mm.customization.learned import Learned
from mm.customization.merging.combining import COMBINING, cut
from mm.customization.merging.config import CUTTING, DRAWING, MergeConfig
from mm.customization.merging.distill import Distillation, Distilled, distill
from mm.customization.merging.regmean import Moments, OnProgress
from mm.customization.merging.words import Words, names_of, words_of

_APART = 0.05  # the largest cosine between subspaces that count as orthogonal


@torch.no_grad()
def merge(
    patches: Sequence[Patch], *, method: str = "sum", weights: Sequence[float] | None = None,
    density: float | None = None, rank: int | None = None, seed: int = 0, name: str = "merged", pipe: Any = None,
    words: str | Sequence[str] | None = None, steps: int | None = None, updates: int | None = None,
    progress: OnProgress = lambda share, text: None,
) -> Learned:  # fmt: skip
    """Makes one patch of several.

    Args:
        patches: two or more, of one model; those of other programs through `mm.read_lora`.
        method: one of `METHODS`.
        weights: how strongly each acts, a finite number; 1 by default.
        density: share of the values that "ties" and "dare" keep, by default .5; the other methods take none.
        rank: of layers that were combined as whole changes; None takes the sum of the ranks, and leaves layers whole
            that an adapter changes otherwise than by a product. "sum" and "orthogonal" take none.
        seed: of DARE's choice, and of what "regmean" and "distill" draw.
        name: of the result.
        pipe: the model, which "regmean" and "distill" draw with; it is unchanged afterwards. The other methods need it
            only where two adapters change a layer and one is a DoRA or OFT, whose change depends on the weights.
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
    _check_kinds(patches)
    config = MergeConfig(
        count=len(patches), method=method, weights=weights, density=density, rank=rank, seed=seed, words=words,
        with_model=pipe is not None, updates=updates,
    )  # fmt: skip
    _check_patches(patches, config)
    if pipe is not None:
        patches = [patch.expanded(pipe) for patch in patches]
    if method == "orthogonal":
        _check_orthogonal(patches)
    called: Sequence[str] = ()
    carried, moments = Words(patches), None
    if method in DRAWING:
        _check_off(patches, pipe)
        called = config.words or words_of(patches)
        moments = Moments(pipe, patches, called, seed=seed, steps=steps, progress=progress)
    entries, report = _merged(patches, config, carried, moments)
    settings: dict[str, Any] = {"weights": list(config.each), "density": config.share, "seed": seed}
    if carried.tokens:
        settings["tokens"] = carried.tokens
    if names := names_of(patches):
        settings["names"] = names
    if method == "distill" and moments is not None:
        training = Distillation() if updates is None else Distillation(updates=updates)
        made = _distilled(pipe, patches, called, config, entries, moments.paths, settings, training, steps, progress)
        entries, report = entries | made.entries, report | made.report()
        settings["updates"] = training.updates
    family = next((p.family for p in patches if isinstance(p, Learned) and p.family), "")
    return Learned(
        entries=entries, method=f"merged-{method}", base=next((p.base for p in patches if p.base), ""), name=name,
        settings=settings, report=report, family=family,
    )  # fmt: skip


def _merged(
    patches: Sequence[Patch], config: MergeConfig, carried: Words, moments: Moments | None
) -> tuple[dict[str, Entry], dict[str, Any]]:  # fmt: skip
    """The entries of all patches, each combined by the method, and what the report says of them."""
    entries: dict[str, Entry] = {}
    lost: dict[str, float] = {}
    errors: dict[str, float] = {}
    for path in dict.fromkeys(path for patch in patches for path in patch.entries):
        if moments is not None and path in moments.paths:
            entries[path], lost[path], errors[path] = _regressed(moments, path, patches, config)
            continue
        here = [
            (carried.moved(k, path, p.entries[path]), config.each[k])
            for k, p in enumerate(patches)
            if path in p.entries
        ]
        entries[path], loss = _combined(path, here, config)
        if loss:
            lost[path] = round(loss, 4)
    report: dict[str, Any] = {
        "merged": [patch.name for patch in patches], "overlap": overlaps(patches),
        "largest_loss": max(lost.values(), default=0.0), "lost": lost,
    }  # fmt: skip
    if errors:
        report |= {"errors": errors, "mean_error": round(sum(errors.values()) / len(errors), 4)}
    return entries, report


def overlaps(patches: Sequence[Patch]) -> dict[str, int]:
    """How many layers each pair of patches both changes."""
    return {
        f"{one.name} and {other.name}": len(
            {p for p, e in one.entries.items() if e.kind != "rows"} & set(other.entries)
        )
        for one, other in combinations(patches, 2)
    }  # fmt: skip


def _check_kinds(patches: object) -> None:
    """Raises UserError for what is no list of patches."""
    if not isinstance(patches, Sequence) or isinstance(patches, str):
        raise UserError(f"patches is {given(patches)}; give a list of two patches or more")
    for patch in patches:
        check_kind("a patch", patch, Patch, "patches, such as Patch.load and mm.read_lora give")


def _check_patches(patches: Sequence[Patch], config: MergeConfig) -> None:
    """Raises UserError for patches of different models, the same patch twice, and what would have no effect."""
    rank = config.rank
    idle = next((patch.name for patch in patches if not any(map(_changes, patch.entries.values()))), None)
    if idle is not None:
        raise UserError(f"{idle!r} changes nothing, perhaps since its training learned nothing; leave it out")
    for patch, weight in zip(patches, config.each, strict=True):
        if weight != 1 and all(entry.kind == "rows" for entry in patch.entries.values()):
            raise UserError(
                f"{patch.name!r} brings words alone, which act in full, and its weight is {weight:g}; leave it out, or "
                "give 1"
            )
    if rank is not None:
        most = max((_most(entry) for patch in patches for entry in patch.entries.values()), default=0)
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


def _distilled(
    pipe: Any, patches: Sequence[Patch], words: Sequence[str], config: MergeConfig, entries: Mapping[str, Entry],
    paths: Sequence[str], settings: dict[str, Any], training: Distillation, steps: int | None, progress: OnProgress,
) -> Distilled:  # fmt: skip
    """Trains the entries of some paths, with all others, such as the words' rows, on the model."""
    trained = {path: entries[path] for path in paths}
    others = {path: entry for path, entry in entries.items() if path not in trained}
    rest = Patch(entries=others, base=patches[0].base, settings=settings, name="rest") if others else None
    return distill(
        pipe, patches, words, config.each, trained, rest, seed=config.seed, steps=steps, config=training,
        progress=progress,
    )  # fmt: skip


def _check_off(patches: Sequence[Patch], pipe: Any) -> None:
    """Raises UserError where one of the patches is on the model, which is to be drawn with without them, too."""
    taken = set(stack_of(pipe).names())
    found = next((patch.name for patch in patches if patch.name in taken), None)
    if found is not None:
        raise UserError(f"the patch {found!r} is on the model; take it off first: patch.undo(pipe)")


def _most(entry: Entry) -> int:
    """The largest rank that the change of a matrix can have; 0 for other entries."""
    if entry.kind == "lowrank":
        return min(len(entry.tensors["up"]), entry.tensors["down"].shape[1])
    shape = shape_of(entry) if entry.kind in WHOLE else ()
    return min(side for side in shape if side is not None) if len(shape) == 2 else 0


def _changes(entry: Entry) -> bool:
    """Whether an entry changes its layer at all."""
    if entry.kind in ("rows", "dora"):  # of a DoRA the magnitude alone does
        return True
    if entry.kind == "rotation":
        rotation = entry.tensors["rotation"]
        return not torch.equal(rotation, torch.eye(len(rotation)).to(rotation))
    return all(bool(tensor.any()) for tensor in entry.tensors.values() if tensor.is_floating_point())


def _same(one: Mapping[str, Entry], other: Mapping[str, Entry]) -> bool:
    return one.keys() == other.keys() and all(
        entry.tensors.keys() == other[path].tensors.keys()
        and all(torch.equal(value, other[path].tensors[key]) for key, value in entry.tensors.items())
        for path, entry in one.items()
    )


def _regressed(
    moments: Moments, path: str, patches: Sequence[Patch], config: MergeConfig
) -> tuple[Entry, float, float]:  # fmt: skip
    """One entry by least squares, what its cut to a rank has lost, and its error on the adapters' own prompts."""
    here = [patch.entries.get(path) for patch in patches]
    shapes = {tuple(_delta(entry).shape) for entry in here if entry is not None}
    if len(shapes) > 1:
        raise UserError(f"{path} has changes of shapes {sorted(shapes)}; the adapters are for different models")
    deltas = [None if e is None else weight * _delta(e) for e, weight in zip(here, config.each, strict=True)]
    low = [len(entry.tensors["down"]) for entry in here if entry is not None and entry.kind == "lowrank"]
    dense = any(entry is not None and entry.kind in WHOLE for entry in here)
    made = moments.merged(path, deltas, config.rank or (None if dense else sum(low)))
    tensors = {"down": made.down.to(torch.float16), "up": made.up.to(torch.float16)}
    return Entry(kind="lowrank", tensors=tensors), round(made.lost, 4), round(made.error, 4)


def _combined(path: str, here: Sequence[tuple[Entry, float]], config: MergeConfig) -> tuple[Entry, float]:
    """One entry of several, and the share that a cut has lost."""
    first = here[0][0]
    kinds, scopes = {entry.kind for entry, _ in here}, {entry.scope for entry, _ in here}
    if "rotation" in kinds and len(here) > 1:
        raise UserError(f"{path} is a rotation, which no sum holds; truncate that patch first")
    if len(here) > 1 and (found := kinds & set(OF_WEIGHT)):
        raise UserError(
            f"{path} is changed by several adapters, and one is of a kind ({min(found)}) whose change depends on the "
            "model's weights; give the model (pipe=..., --model)"
        )
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
    if len(here) == 1 and first.kind in ("rotation", *FACTORED):
        return replace(first, scale=first.scale * here[0][1]), 0.0
    if kinds == {"lowrank"} and (config.method not in CUTTING or len(here) == 1):
        return _stacked([(e, w) for e, w in here]), 0.0
    deltas = [_delta(entry) for entry, _ in here]
    shapes = {tuple(delta.shape) for delta in deltas}
    if len(shapes) > 1:
        raise UserError(f"{path} has changes of shapes {sorted(shapes)}; the adapters are for different models")
    weights = [weight for _, weight in here]
    if config.method in COMBINING and first.kind != "bias" and len(here) > 1 and deltas[0].ndim > 1:
        flat = COMBINING[config.method]([d.flatten(1) for d in deltas], weights, config.share, config.seed)
        total = flat.view_as(deltas[0])
    else:
        total = sum((w * d for w, d in zip(weights, deltas, strict=True)), torch.zeros_like(deltas[0]))
    cutting = config.rank is not None and len(here) > 1 and total.ndim == 2
    if kinds != {"lowrank"} and not cutting:
        return Entry(kind="bias" if kinds == {"bias"} else "dense", tensors={"delta": total}), 0.0
    most = config.rank or sum(len(entry.tensors["down"]) for entry, _ in here)  # here all are products
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
    if entry.kind == "bias":
        return entry.scale * entry.tensors["delta"].float()
    return entry.scale * whole_change(entry).float()


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
