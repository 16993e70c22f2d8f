"""The pipelines of one model by task, all with the same modules."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

from mm.core.errors import UserError
from mm.engine.facts import FAMILY_TASKS
from mm.families.family import Family, resolve


class Pipelines:
    """The pipelines of one model by task; made at first use, all with the same modules."""

    def __init__(self, pipe: Any, family: Family | None, folder: Path | None, dtype: Any) -> None:
        self.pipe, self.family, self.folder, self.dtype = pipe, family, folder, dtype
        self.made: dict[str, Any] = {}

    def get(self, task: str) -> Any:
        """The pipeline for a task of `mm.engine.capabilities.TASKS`."""
        if task not in self.made:
            self.made[task] = self._make(task)
        return self.made[task]

    def _make(self, task: str) -> Any:
        name = self.family.pipelines.get(FAMILY_TASKS[task], "") if self.family is not None else ""
        if not name or name.rpartition(":")[2] == type(self.pipe).__name__:
            return self.pipe
        if ":" in name:
            return self._own(resolve(name))
        import diffusers

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(diffusers, name).from_pipe(self.pipe)

    def _own(self, kind: type) -> Any:
        """A pipeline of a family's own class: the modules that are loaded, and from the folder those that are not."""
        wanted = set(inspect.signature(kind.__init__).parameters) - {"self"}
        shared = {key: part for key, part in self.pipe.components.items() if key in wanted and part is not None}
        if wanted <= set(shared):
            return kind(**shared)
        if self.folder is None:
            raise UserError(f"{kind.__name__} needs {', '.join(sorted(wanted - set(shared)))}; load it from a folder")
        made = kind.from_pretrained(self.folder, torch_dtype=self.dtype, **shared)  # type: ignore[attr-defined]
        return made.to(self.pipe.device)
