"""What a method of customization is: it names what is trained, and may add to captions and losses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from mm.adapters.entry import Entry
from mm.core.errors import UserError
from mm.customization.data import Example, Kind
from mm.customization.objectives.protocol import Objective
from mm.customization.pieces import Branches, Piece
from mm.customization.rows import Rows
from mm.families.sites import find_sites
from mm.layers.sites import Site

_ATTENTION = re.compile(r"(?:attn|cross).*_(?:q|k|v|out|qkv)|attn_out|cross_kv")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a method works with.

    Attributes:
        objective: of the pipeline.
        examples: the pictures.
        name: of the subject.
        noun: its class; empty where it is not known.
        kind: subject, style, edit or slider.
        settings: of the method, defaults filled in.
        seed: of all starting values.
        steps: of training, at most.
    """

    objective: Objective
    examples: Sequence[Example]
    name: str
    noun: str
    kind: Kind
    settings: Mapping[str, Any]
    seed: int
    steps: int = 1

    @property
    def needs_word(self) -> bool:
        """Whether the name has to become a word of the tokenizer."""
        return not self.objective.open_vocabulary and self.kind != "slider"


@dataclass(kw_only=True)
class Learner:
    """What is trained together. Methods with losses or captions of their own extend it.

    Attributes:
        pieces: the trained values.
        settings: what the patch says of the run.
    """

    job: Job
    pieces: list[Piece]
    settings: dict[str, Any] = field(default_factory=dict)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All trained values by name."""
        return {name: value for piece in self.pieces for name, value in piece.parameters().items()}

    def rows(self) -> dict[str, float]:
        """The parameters that are rows of embeddings, which take a rate of their own, and their tables' deviation."""
        return {name: wide for piece in self.pieces if isinstance(piece, Rows) for name, wide in piece.spreads.items()}

    def captions(self, chosen: Sequence[int]) -> list[str]:
        """Prompts of the examples with these numbers."""
        return [self.job.examples[i].caption for i in chosen]

    def before_step(self, chosen: Sequence[int]) -> None:
        """Called before the prompts of a step are encoded."""

    def extra_loss(self) -> Tensor | None:
        """Added to a step's loss."""
        return None

    def after_step(self, number: int) -> None:
        """Called after the update of step `number`, counted from 0, while the gradients are still there."""

    def kept(self) -> dict[str, Tensor]:
        """What the state of a run holds of the method beside its parameters."""
        return {}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Takes back what `kept` gave."""

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the context the model is the frozen base."""
        with ExitStack() as stack:
            for piece in self.pieces:
                stack.enter_context(piece.off())
            yield

    def check_scales(self) -> None:
        """Raises UserError where something trained does not scale to both sides of zero."""
        other = next((piece for piece in self.pieces if not isinstance(piece, Branches)), None)
        if other is not None:
            raise UserError(
                f"a slider is scaled to both sides of zero, which {type(other).__name__} are not; choose the method "
                "dreambooth or orthogonal"
            )

    @contextmanager
    def at(self, scale: float) -> Iterator[None]:
        """Within the context the adapter acts `scale` times."""
        with ExitStack() as stack:
            for piece in self.pieces:
                if isinstance(piece, Branches):
                    stack.enter_context(piece.at(scale))
            yield

    def settle(self) -> None:
        """Lets the model draw with the values as they are now."""
        for piece in self.pieces:
            piece.settle()

    def entries(self) -> dict[str, Entry]:
        """What was learned, as entries of a patch."""
        return {path: entry for piece in self.pieces for path, entry in piece.entries().items()}

    def tokens(self) -> list[dict[str, Any]]:
        """The new words."""
        return [token for piece in self.pieces if isinstance(piece, Rows) for token in piece.tokens()]

    def remove(self) -> None:
        """Takes everything off the model."""
        for piece in reversed(self.pieces):
            piece.remove()


class Method(Protocol):
    """A method. `defaults`: its settings, with their usual values."""

    name: str
    defaults: Mapping[str, Any]

    def begin(self, job: Job) -> Learner:
        """Puts what is trained onto the model."""
        ...


def sites_of(objective: Objective, layers: str) -> list[Site]:
    """The layers that take an adapter, as sites whose paths begin with the component.

    Args:
        objective: of the pipeline.
        layers: "attention" (queries, keys, values, outputs), "all" (feed-forward too), "text" (those that read text).

    Raises:
        UserError: where there is no such layer.
    """
    from dataclasses import replace

    from mm.families import family_of

    if layers not in ("attention", "all", "text"):
        raise UserError(f"layers is {layers!r}; give attention, all or text")
    family = family_of(objective.pipe)
    texts = [re.compile(p) for p in (family.text_sites if family else ())]
    skipped = [re.compile(p) for p in objective.skipped]
    found = []
    for part, root in objective.modules().items():
        for site in find_sites(root):
            if any(p.fullmatch(site.path) for p in skipped):
                continue
            if layers == "text":
                wanted = any(p.fullmatch(site.path) for p in texts)
            else:
                wanted = bool(_ATTENTION.fullmatch(site.role)) or (layers == "all" and site.role.startswith("ff"))
            if wanted:
                found.append(replace(site, path=f"{part}.{site.path}"))
    if not found:
        raise UserError(f"{type(objective.pipe).__name__} has no layers of the kind {layers!r}")
    return found


def word_rows(job: Job, *, always: bool = False) -> list[Piece]:
    """The row of the subject's name, where the tokenizer needs one or the method always takes one."""
    if not (always or job.needs_word):
        return []
    return [Rows(job.objective, {job.name: job.noun}, seed=job.seed)]


def with_word(job: Job, make: Callable[[], Piece], *, always: bool = False) -> list[Piece]:
    """A piece, and behind it the row of the subject's name as `word_rows` says.

    The row is made first, since a name that is taken is found there. Where one of them cannot be made, nothing is left
    on the model.

    Args:
        job: whose name it is.
        make: makes the piece.
        always: whether the name gets a row with an open vocabulary too.
    """
    rows = word_rows(job, always=always)
    try:
        return [make(), *rows]
    except BaseException:
        for piece in rows:
            piece.remove()
        raise
