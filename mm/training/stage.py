"""What a training stage is, and what it is made from.

Adding a stage: one file `NAME_stage.py` with `def stage(context: StageContext) -> Stage`, its section in the YAML, and
a line in `mm.training.run.STAGES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mm.core.errors import UserError
from mm.training.trainer import Batches, Evaluate, Trainer, TrainerConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Batches, losses and evaluation of one stage.

    Attributes:
        name: Its section of the YAML, and its folder of the state.
        module: Its forward takes a batch and returns named losses.
        batches: The batch of a step, for a process.
        evaluate: Publishes averaged weights and returns scores to log.
        config: How long and how fast to train.
        optimizers: Makes the optimizers, where they are not the trainer's own.
        start_from: State of another stage that a fresh run starts from.
    """

    name: str
    module: nn.Module
    batches: Batches
    evaluate: Evaluate
    config: TrainerConfig
    optimizers: Callable[[nn.Module], Sequence[Optimizer]] | None = None
    start_from: Path | None = None

    def train(self, state: Path) -> Trainer:
        """Runs the stage, or resumes it, in its folder of `state`."""
        optimizers = None if self.optimizers is None else self.optimizers(self.module)
        out = state / self.name
        trainer = Trainer(self.module, out, self.config, optimizers=optimizers, start_from=self.start_from)
        trainer.run(self.batches, self.evaluate)
        return trainer


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """What stages are made from.

    Attributes:
        config: The YAML of the model.
        state: Folder of everything unfinished; finished parts are in its `model`.
        init_from: Published weights to start from.
        publish_to: Where averaged weights go; by default `state/model`.
        flags: Fields of the trainer's and the stage's config that replace the YAML's; None changes nothing.
    """

    config: dict[str, Any]
    state: Path
    init_from: Path | None = None
    publish_to: Path | None = None
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def published(self) -> Path:
        """Where averaged weights go."""
        return self.publish_to or self.state / "model"

    @property
    def workers(self) -> int:
        """Processes that write shards and make batches; 0 is this one."""
        return self.flags.get("workers") or 0

    def trainer_config(self, name: str) -> TrainerConfig:
        """The trainer's config of a stage."""
        return override(TrainerConfig(**self.config[name]["trainer"]), self.flags)

    def settings(self, kind: Any, *names: str) -> Any:
        """A stage's config of class `kind`, from one section or several (the last wins)."""
        merged: dict[str, Any] = {}
        for name in names:
            merged |= self.config[name].get("stage", {})
        return override(kind(**merged), self.flags)

    def load(self, kind: Any, name: str) -> Any:
        """A finished part. Raises UserError where its stage has not run."""
        folder = self.state / "model" / name
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} holds no trained {kind.__name__}; run its stage first or use --init-from")
        return kind.from_pretrained(folder).eval()

    def fresh_or_published(self, kind: Any, name: str, **more: Any) -> Any:
        """A part to train: published weights where there are any, else a fresh one of the YAML's size."""
        if self.init_from is not None and (self.init_from / name / "config.json").is_file():
            return kind.from_pretrained(self.init_from / name).eval()
        return kind(**self.config["models"].get(name, {}), **more)


def override(settings: Any, flags: dict[str, Any]) -> Any:
    """A frozen config with the flags that it has and that are not None."""
    names = {f.name for f in dataclasses.fields(settings)}
    return dataclasses.replace(settings, **{k: x for k, x in flags.items() if x is not None and k in names})


def device() -> str:
    """The device of work outside of the trainer, such as encoding."""
    return "cuda" if torch.cuda.is_available() else "cpu"
