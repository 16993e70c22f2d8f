"""`mm.erase`: a patch that keeps a model from drawing concepts.

Design choices
- The model is not changed: the patch is returned, and `patch.apply(pipe)` puts it on.
- Weights are read as they act (base plus branches), so an erasure on top of a LoRA erases what both of them draw.
- What was chosen (anchors, neighbours, prompts, layers) and what the solver found is in `patch.report`.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mm.adapters.patch import Patch
from mm.core.checks import texts
from mm.core.nouns import counted
from mm.erasure.alignment import matched, moved, shared_head
from mm.erasure.checks import Scope, check_call
from mm.erasure.concepts import Concept, Contexts, contexts_of
from mm.erasure.features import record
from mm.erasure.margin import margins
from mm.erasure.methods.protocol import Job
from mm.erasure.neighbours import Neighbours
from mm.erasure.reading import reading_rows
from mm.erasure.routes import edits_of, rows_of
from mm.erasure.sites import groups_of, text_layers
from mm.erasure.solver import Features
from mm.layers.base_hash import base_hash
from mm.layers.eager import eagerly
from mm.layers.linear import BranchedLinear
from mm.layers.surgery import check_pipeline, roots_of

DEFAULT = "uce"  # method
NEIGHBOURS = 8  # retained for each target with retain="auto"
FEWEST = 12  # pairs of prompts a target
PAIRS = 256  # pairs of prompts in all, shared by the targets
EDITS, FEW_EDITS = 48, 6  # pairs of instructions for editing in all, and of a target at least: else there are none


@torch.no_grad()
@eagerly()
def erase(
    pipe: Any,
    targets: str | Concept | Sequence[str | Concept],
    *,
    anchors: str | Sequence[str] | None = None,
    retain: str | Sequence[str] = "auto",
    method: str = DEFAULT,
    strength: float = 1.0,
    scope: Scope = "draw",
    sites: str | Sequence[str] = (),
    contexts: Contexts | None = None,
    progress: Callable[[float, str], None] = lambda share, text: None,
    **settings: Any,
) -> Patch:
    """Makes a patch after which a model draws the anchors where the targets are asked for.

    Args:
        pipe: any diffusers pipeline that reads text, of mm or of diffusers.
        targets: concepts, as texts ("wolf", "style: van gogh", "attribute: red of apple") or `Concept`s. A model with a
            vocabulary of its own reads them as it reads prompts: "kitty" is its cat.
        anchors: what is drawn instead, one for all targets or one each; None takes the nearest concept of the family's
            own choice, else the nearest super-category, else nothing (the empty prompt).
        retain: concepts that must stay as they are; "auto" takes each target's neighbours.
        method: one of `mm.erasure.methods.registry.METHODS`.
        strength: 1 erases; less leaves a share of the concept.
        scope: "draw", or "read" for a model that neither draws the targets nor names them in pictures.
        sites: regular expressions over layer paths, for models that mm does not know.
        contexts: prompts to erase and keep in; None takes the family's, or templates of plain English.
        progress: called with a share from 0 to 1 and a text.
        settings: of the method.

    Returns:
        The patch, not applied. Its report names anchors, neighbours, layers, errors and seconds.

    Raises:
        UserError: for an empty or unknown target, a kind that does not fit its word, a target that is retained, or a
            model without text-reading layers.
    """
    started = time.monotonic()
    check_pipeline(pipe, "erasing")
    contexts = contexts or contexts_of(pipe)
    call = check_call(
        targets, anchors=anchors, retain=retain, method=method, strength=strength, scope=scope, settings=settings,
        contexts=contexts,
    )  # fmt: skip
    maker, chosen, concepts = call.maker, call.settings, call.concepts
    layers = text_layers(pipe, texts("sites", sites))
    progress(0.0, "looking for neighbours")
    near = Neighbours(pipe, layers, [*contexts.candidates(), *[c.name for c in concepts]])
    placed = _anchors(concepts, contexts, near) if call.anchors is None else dict(call.anchors)
    kept = _neighbours(concepts, placed, near) if call.retained is None else list(call.retained)
    rows = reading_rows(pipe, concepts, placed, contexts) if scope == "read" else {}
    progress(0.1, f"reading {counted(len(kept), 'retained concept')} and {counted(len(concepts), 'target')}")
    each = max(FEWEST, PAIRS // len(concepts))
    pairs = [pair for c in concepts for pair in contexts.pairs(c, placed[str(c)], each)]
    others = list(contexts.retained(kept, concepts))
    features, groups, template = _features(pipe, layers, pairs, others)
    both, edits = _with_edits(pipe, layers, features, groups, contexts, concepts, placed, progress)
    weights = {path: effective(layer) for path, layer in layers.items()}
    job = Job(
        pipe=pipe, layers=layers, groups=groups, features=both, weights=weights, strength=strength, pairs=pairs,
        retained=others, template=template, base=_base(pipe, layers), targets=len(concepts),
        settings=chosen,
        progress=lambda share, text: progress(0.3 + 0.7 * share, text),
    )  # fmt: skip
    made = maker.make(job)
    report = {
        "targets": [str(c) for c in concepts], "concepts": [c.text for c in concepts],
        "anchors": placed, "retained": kept, "prompts": 2 * len(pairs) + len(others), "edits": edits,
        "layers": [*made.entries, *rows], "seconds": round(time.monotonic() - started, 2), **made.report,
        **margins(dataclasses.replace(job, features=features), made.entries),  # on the concept's own words
    }  # fmt: skip
    name = "no-" + "-".join(str(c).replace(" ", "-") for c in concepts[:3])
    return Patch(
        entries=made.entries | rows, method=method, base=job.base, name=name, report=report,
        settings={"strength": strength, "scope": scope, **chosen},
    )  # fmt: skip


def _with_edits(
    pipe: Any, layers: dict[str, nn.Linear], features: dict[str, Features], groups: list[list[str]],
    contexts: Contexts, concepts: Sequence[Concept], placed: dict[str, str], progress: Callable[[float, str], None],
) -> tuple[dict[str, Features], int]:  # fmt: skip
    """Features with those of instructions for editing, and the number of instructions that were read."""
    of_each = EDITS // len(concepts)  # a few of each of many targets cost the erasure more than they bring
    instructions = edits_of(contexts, concepts, placed, of_each) if of_each >= FEW_EDITS else []
    progress(0.2, f"reading {counted(len(instructions), 'instruction')} for editing")
    both, read = dict(features), rows_of(pipe, layers, groups, instructions)
    for path, found in read.items():
        both[path] = features[path].joined(found.target_TD, found.anchor_TD, found.retained_RD)
    return both, len(instructions) if read else 0


def effective(layer: nn.Linear) -> torch.Tensor:
    """A layer's weight as it acts: base plus branches, (N, D) in float64 on the CPU."""
    weight = layer.effective_weight() if isinstance(layer, BranchedLinear) else layer.weight
    return weight.detach().double().cpu()


def _anchors(concepts: Sequence[Concept], contexts: Contexts, near: Neighbours) -> dict[str, str]:
    """The anchor of each target, where none is given."""
    names = [c.name for c in concepts]
    own = getattr(contexts, "anchor", None)
    return {str(c): own(c, near, names) if own else _super_category(c, near) for c in concepts}


def _super_category(concept: Concept, near: Neighbours) -> str:
    """The nearest super-category where one is near, else the empty prompt."""
    if concept.kind != "object":
        return ""
    best = max(_SUPER, key=lambda name: near.similarity(concept.name, name) if name in near.names else -1.0)
    return best if best in near.names and near.similarity(concept.name, best) > 0.2 else ""


_SUPER = ("animal", "vehicle", "fruit", "food", "building", "plant", "tool", "person", "furniture", "instrument", "toy")


def _neighbours(concepts: Sequence[Concept], anchors: dict[str, str], near: Neighbours) -> list[str]:
    """The concepts nearest to the targets, and the anchors: what stays where nothing is named."""
    names = [c.name for c in concepts]
    found = [n for c in concepts for n in near.nearest(c.name, NEIGHBOURS, names)]
    return list(dict.fromkeys([*found, *[a for a in anchors.values() if a]]))


def _features(
    pipe: Any, layers: dict[str, nn.Linear], pairs: Sequence[tuple[str, str]], others: Sequence[str]
) -> tuple[dict[str, Features], list[list[str]], int]:
    """Features of each group of layers, from pairs of prompts and from prompts that stay."""
    read = record(pipe, layers, [*[p for p, _ in pairs], *[a for _, a in pairs], *others])
    groups, n = groups_of(layers, read), len(pairs)
    length = max(len(x) for x in read[groups[0][0]])  # pipelines that pad to the longest prompt pad each call apart
    match = [matched(pipe, t, a, length) for t, a in pairs]
    own = [matched(pipe, p, p, length)[0] for p in others]
    shift = _template(pipe, pairs, read[groups[0][0]], length)
    out = {}
    for group in groups:
        x = read[group[0]]
        wanted = torch.cat([x[n + i][moved(new, shift, len(x[n + i]))] for i, (_, new) in enumerate(match)]).double()
        out[group[0]] = Features(
            target_TD=torch.cat([x[i][moved(old, shift, len(x[i]))] for i, (old, _) in enumerate(match)]).double(),
            anchor_TD=wanted,
            retained_RD=torch.cat(
                [*[x[2 * n + i][moved(p, shift, len(x[2 * n + i]))] for i, p in enumerate(own)], wanted]
            ).double(),
        )
    return out, groups, shift


def _template(pipe: Any, pairs: Sequence[tuple[str, str]], features: Sequence[torch.Tensor], length: int) -> int:
    """How many features a pipeline's template puts before the prompt's own (Lumina's system prompt, chat templates).

    A causal encoder gives target and anchor the same features until their tokens differ. Where that happens later than
    in the prompts themselves, the difference is the template. In an encoder that reads in both directions all features
    differ, and there is none to find.
    """
    found = []
    for i, (target, anchor) in enumerate(pairs):
        old, new = features[i], features[len(pairs) + i]
        both = min(len(old), len(new))
        gap = (old[:both] - new[:both]).abs().amax(1) > 1e-4 * old.abs().max()
        if bool(gap.any()):
            found.append(max(0, int(gap.nonzero()[0]) - shared_head(pipe, target, anchor, length)))
    return statistics.median_low(found) if found else 0


def _base(pipe: Any, layers: Any) -> str:
    """The hash of the component that holds the layers."""
    first = next(iter(layers)).partition(".")[0]
    roots = roots_of(pipe)
    return base_hash(roots[first] if first in roots else next(iter(roots.values())))
