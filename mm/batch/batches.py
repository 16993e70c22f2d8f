"""Which pictures share a call, in which order, and the model that draws them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from mm.batch.plan import Adapters, Planned

if TYPE_CHECKING:
    from mm.engine.engine import Engine


def batches(missing: Iterable[Planned], size: int) -> Iterator[list[Planned]]:
    """Pictures that can share a call together, whichever rows they come from; those of a model stand together.

    A picture that is drawn until it is right has a call of its own, so that its record says what it lacks.
    """
    models: dict[tuple[str, Adapters], dict[tuple[Any, ...], list[Planned]]] = {}
    for one in missing:
        groups = models.setdefault((one.model, one.adapters), defaultdict(list))
        groups[one.key].append(one)
    for _, groups in sorted(models.items(), key=lambda entry: entry[0][0]):  # stable: one model after the other
        for group in groups.values():
            most = 1 if _drawn_again(group[0]) else size
            for start in range(0, len(group), most):
                yield group[start : start + most]


def _drawn_again(one: Planned) -> bool:
    """Whether a picture may be drawn more than once."""
    can = one.plan.about(one.model).can
    return one.draft.best_of > 1 if can is None else can.tries_of(one.draft) > 1


class Models:
    """Loads a model when its first picture is drawn; adapters go on and come off without loading it again."""

    def __init__(self, load: Callable[[str], Engine]) -> None:
        self.load, self.name = load, ""
        self.adapters: Adapters = ()
        self.engine: Any = None

    def get(self, one: Planned) -> Engine:
        """The engine of a picture's model, with the picture's adapters on it.

        Raises:
            UserError: where the model cannot be loaded (then `engine` is None), or an adapter does not fit.
        """
        if self.engine is None or self.name != one.model:
            self.engine = None  # the model before is let go first
            self.engine, self.name, self.adapters = self.load(one.model), one.model, ()
        if self.adapters != one.adapters:
            self.adapters = ()
            self.engine.set_adapters(one.adapters)
            self.adapters = one.adapters
        return self.engine
