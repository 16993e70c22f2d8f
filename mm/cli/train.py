"""`mm train`: the stages of a published model, one after the other or one by one."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mm.core.checks import MAX_SEED

app = typer.Typer(add_completion=False)


class Stage(StrEnum):
    """The stages in their order."""

    autoencoder = "autoencoder"
    bridge = "bridge"
    judge = "judge"
    latents = "latents"
    drawing = "drawing"
    understanding = "understanding"
    stem = "stem"
    counter = "counter"
    joint = "joint"
    crisp = "crisp"
    enlarger = "enlarger"
    fingerprint = "fingerprint"


@app.command(
    no_args_is_help=True, epilog="Example: mm train mm-tiny --stage drawing --init-from weights/mm-tiny --minutes 60"
)
def train(
    model: Annotated[str, typer.Argument(help="A published model's name, or a YAML file.")],
    stage: Annotated[Stage | None, typer.Option(help="One stage alone; all of them by default.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Minutes of training, earlier runs included.")] = None,
    state: Annotated[Path | None, typer.Option(help="Folder of everything unfinished (default: the YAML's).")] = None,
    init_from: Annotated[Path | None, typer.Option(help="Published weights to start from.")] = None,
    publish: Annotated[Path | None, typer.Option(help="Where averaged weights go (default: STATE/model).")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples a step and device.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=1e-9, help="AdamW's rate.")] = None,
    codes_share: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of the drawing steps in codes mode.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that make batches ahead of time, for a GPU that would wait.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=MAX_SEED, help="Seed of scenes, wording and noise.")] = None,
) -> None:
    """Trains a published model, or resumes a stopped run."""
    from mm.training.run import run_stages

    flags = {"minutes": minutes, "batch_size": batch_size, "learning_rate": learning_rate}
    run_stages(
        model,
        stages=[s.value for s in ([stage] if stage else Stage)],
        state=state,
        init_from=init_from,
        publish_to=publish,
        **flags,
        codes_share=codes_share,
        workers=workers,
        seed=seed,
    )
