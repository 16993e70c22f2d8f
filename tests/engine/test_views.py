"""A run's view of a pipeline: other schedulers."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_pipelines import tiny_pipeline_of

from mm.core.errors import UserError
from mm.engine.views import view_of


def test_a_scheduler_of_a_package_that_is_not_here_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers lists such schedulers among the compatible ones."""
    pipe = tiny_pipeline_of("stable-diffusion")
    kind = next(each for each in pipe.scheduler.compatibles if each.__name__ == "DPMSolverMultistepScheduler")

    def absent(*_: Any, **__: Any) -> None:
        raise ImportError("\nDPMSolver requires the nosuch library. You can install it with pip\n")

    monkeypatch.setattr(kind, "from_config", absent)
    with pytest.raises(UserError, match=r"^DPMSolver requires the nosuch library\. .* pip; or take another scheduler$"):
        view_of(pipe, "DPMSolverMultistepScheduler")
    assert type(view_of(pipe, "EulerDiscreteScheduler").scheduler).__name__ == "EulerDiscreteScheduler"
