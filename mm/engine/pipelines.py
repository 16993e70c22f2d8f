"""The pipelines of one model by task, all with the same modules."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from mm.core.errors import UserError
from mm.engine.facts import FAMILY_TASKS, class_of
from mm.families.family import Family


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
        kind = class_of(name)
        return self._own(kind) if ":" in name else related(kind, self.pipe)

    def _own(self, kind: Any) -> Any:
        """A pipeline of a family's own class: the modules that are loaded, and from the folder those that are not."""
        wanted = set(inspect.signature(kind.__init__).parameters) - {"self"}
        shared = {key: part for key, part in self.pipe.components.items() if key in wanted and part is not None}
        if wanted <= set(shared):
            return kind(**shared)
        if self.folder is None:
            raise UserError(f"{kind.__name__} needs {', '.join(sorted(wanted - set(shared)))}; load it from a folder")
        made = kind.from_pretrained(self.folder, dtype=self.dtype, **shared)
        return made.to(self.pipe.device)


def related(kind: Any, pipe: Any) -> Any:
    """A pipeline of another diffusers class with the same modules.

    diffusers' `from_pipe` is not used: it casts the shared modules to float32 where no type is given.
    """
    found = set(inspect.signature(kind.__init__).parameters) - {"self"}
    settings = {
        key: value for key, value in pipe.config.items() if key in found and not isinstance(value, list | tuple)
    }
    made = kind(**(settings | {key: part for key, part in pipe.components.items() if key in found}))
    for state in ("_progress_bar_config", "_all_hooks", "_offload_device", "_offload_gpu_id"):
        if state in pipe.__dict__:
            setattr(made, state, pipe.__dict__[state])
    return made
