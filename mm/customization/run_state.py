"""Where a run is, and the file in which it goes on after a stop.

Design choices
- One safetensors file holds parameters, their best values, the optimizer and what the method keeps; beside them lies
  the progress as JSON, and what the state belongs to.
- A state of other pictures or settings is refused, and so is a damaged one: each error says what to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from mm.core.errors import UserError
from mm.core.run_files import State, read_state, write_state
from mm.core.safe_json import Fields
from mm.customization.methods.protocol import Learner

STATE = "state.safetensors"
_MANY = 10**9


@dataclass(kw_only=True)
class Progress:
    """Where a run is: what is saved beside the tensors.

    Attributes:
        step: steps done.
        losses: of the pictures, one a step.
        preserved: losses of the preservation.
        scores: (step, score, error as a share of the base's, drift) of each preview.
        best: number of the best preview.
        stopped: the run has ended early.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    preserved: list[float] = field(default_factory=list)
    scores: list[tuple[int, float, float, float]] = field(default_factory=list)
    best: int = -1
    stopped: bool = False

    @classmethod
    def of(cls, values: Fields) -> Progress:
        """The progress of a state. Raises UserError for a value that is none."""
        values.only([one.name for one in fields(cls)])
        rows = values.raw.get("scores")
        if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 4 for row in rows):
            values.wrong("scores", "a list of previews, four numbers each")
        scores = [tuple(Fields({"scores": row}, values.source).numbers("scores")) for row in rows]
        return cls(
            step=values.whole("step", 0, _MANY), losses=values.numbers("losses"),
            preserved=values.numbers("preserved"), scores=scores, best=values.whole("best", -1, len(rows) - 1),  # type: ignore[arg-type]
            stopped=values.flag("stopped"),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """What a run's state holds beside its progress: all of it is changed in place when the run goes on.

    Attributes:
        parameters: that are trained.
        best: their values at the best preview.
        optimizer: of the parameters.
        learner: with what its method keeps.
    """

    parameters: Mapping[str, nn.Parameter]
    best: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    learner: Learner

    def write(self, file: Path, progress: Progress, identity: str) -> None:
        """Writes the state, whole or not at all. One that is there is replaced."""
        tensors: dict[str, Tensor] = {}
        for name, value in self.parameters.items():
            tensors[f"now|{name}"] = value.detach()
            tensors[f"best|{name}"] = self.best[name]
            for key, tensor in self.optimizer.state.get(value, {}).items():
                tensors[f"optimizer.{key}|{name}"] = tensor
        tensors |= {f"kept|{name}": tensor for name, tensor in self.learner.kept().items()}
        write_state(file, tensors, {"progress": json.dumps(asdict(progress)), "identity": identity})

    def read(self, file: Path, identity: str) -> Progress:
        """Takes in a state.

        Args:
            file: that `write` wrote.
            identity: what it must belong to.

        Returns:
            Where the run was.

        Raises:
            UserError: for a state of another run, and for a damaged file.
        """
        state = read_state(file, "state of a run", f"delete {file}, and the run begins again")
        with state.taking():
            if "identity" not in state.metadata:
                raise UserError(f"{file} does not say which run it belongs to")
        if state.metadata["identity"] != identity:
            raise UserError(
                f"{file} is the state of a run with other pictures or settings; finish that one, or delete the file"
            )
        with state.taking():
            progress = Progress.of(state.fields("progress"))
            self._take(state)
        return progress

    @torch.no_grad()
    def _take(self, state: State) -> None:
        found = {name: self._optimized(state, name, value) for name, value in self.parameters.items()}
        now = {name: state.tensor(f"now|{name}", value) for name, value in self.parameters.items()}
        best = {name: state.tensor(f"best|{name}", value) for name, value in self.parameters.items()}
        self.learner.restore(
            {key.partition("|")[2]: tensor for key, tensor in state.tensors.items() if key.startswith("kept|")}
        )
        self.best.update(best)
        for name, value in self.parameters.items():
            value.copy_(now[name])
            if found[name]:
                self.optimizer.state[value] = found[name]

    def _optimized(self, state: State, name: str, value: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a parameter; empty for one that had no gradient yet."""
        step, ends = state.tensors.get(f"optimizer.step|{name}"), ("exp_avg", "exp_avg_sq")
        if step is None and not any(f"optimizer.{key}|{name}" in state.tensors for key in ends):
            return {}
        means = {key: state.tensor(f"optimizer.{key}|{name}", value) for key in ends}
        return {"step": state.tensor(f"optimizer.step|{name}", torch.zeros(())), **means}
