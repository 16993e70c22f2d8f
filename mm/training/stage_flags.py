"""Which fields of the configs each stage has, so that a flag without an effect is refused."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from mm.core.errors import UserError
from mm.training.trainer import TrainerConfig

# Stages that the trainer runs: the module and the class of the config that each has beside the trainer's.
CONFIGS: dict[str, tuple[str, str]] = {
    "autoencoder": ("tokenizer_stage", "TokenizerConfig"),
    "judge": ("judge_stage", "JudgeStageConfig"),
    "drawing": ("drawing_stage", "DrawingConfig"),
    "understanding": ("understanding_stage", "UnderstandingConfig"),
    "stem": ("stem_stage", "StemConfig"),
    "counter": ("counter_stage", "CounterConfig"),
    "joint": ("joint_stage", "JointConfig"),
    "crisp": ("crisp_stage", "CrispConfig"),
    "enlarger": ("enlarger_stage", "EnlargerConfig"),
}
PUBLISHING = ("drawing", "joint", "crisp", "enlarger", "fingerprint")  # the others write into the state folder


def fields_of(stage: str) -> frozenset[str]:
    """The names of a stage's fields that a flag can replace."""
    if stage == "bridge":
        return frozenset()
    if stage == "latents":
        return frozenset({"workers"})
    if stage == "fingerprint":
        from mm.provenance.training import FingerprintTraining

        return _names(FingerprintTraining) | {"publish"}
    module, name = CONFIGS[stage]
    own = _names(getattr(importlib.import_module(f"mm.training.{module}"), name))
    return own | _names(TrainerConfig) | ({"publish"} if stage in PUBLISHING else frozenset())


def check_flags(stages: Sequence[str], flags: Mapping[str, Any], known: Sequence[str]) -> None:
    """Checks that each flag acts on a stage that is run.

    Args:
        stages: that are run.
        flags: names and values; None is not given.
        known: all stages, in their order.

    Raises:
        UserError: for a flag that no stage in `stages` has, with the stages that have it.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    used = frozenset().union(*(fields_of(stage) for stage in stages)) if given else frozenset()
    for name, value in given.items():
        if name not in used:
            others = ", ".join(stage for stage in known if name in fields_of(stage))
            those = f"stage {stages[0]} does" if len(stages) == 1 else f"stages {', '.join(stages)} do"
            raise UserError(
                f"{name} is {value}, which the {those} not use; leave it out"
                + (f"; stages that use it: {others}" if others else "")
            )


def _names(config: Any) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(config))
