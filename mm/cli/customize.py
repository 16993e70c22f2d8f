"""`mm customize`: an adapter for a new subject, style or edit from a folder of pictures, or a slider."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from mm.cli import options as shared
from mm.cli.progress_line import ProgressLine
from mm.core.checks import MAX_SEED
from mm.core.nouns import counted

app = typer.Typer(add_completion=False)


@app.command(epilog='Example: mm customize photos/ --name "<mug>" -o mug.safetensors')
def customize(
    out: Annotated[Path, typer.Option("-o", "--out", help="The adapter file to write.")],
    folder: Annotated[
        Path | None,
        typer.Argument(help="Pictures, or pairs of an edit, with captions in text files."),
    ] = None,
    name: Annotated[
        str, typer.Option(help='What the subject is called in prompts: "<mug>". A slider needs none.')
    ] = "",
    model: Annotated[str, typer.Option(help="An embedded model, a folder, or a hub name.")] = "mm-tiny",
    bits: Annotated[
        int | None, typer.Option(help="4 trains on the 4-bit copy of the model (default: the model as it is).")
    ] = None,
    kind: Annotated[str, typer.Option(help="subject, style, edit or slider.")] = "subject",
    noun: Annotated[str, typer.Option(help="The subject's class, where the model knows it: mug.")] = "",
    positive: Annotated[str, typer.Option(help='Of a slider: where a scale above 0 moves to: "a red {}".')] = "",
    negative: Annotated[str, typer.Option(help='Of a slider: where a scale below 0 moves to: "a blue {}".')] = "",
    neutral: Annotated[str, typer.Option(help="Of a slider: what is moved; default: the words that both share.")] = "",
    subject: Annotated[list[str] | None, typer.Option(help="Of a slider: what {} stands for; may be repeated.")] = None,
    strength: Annotated[float | None, typer.Option(help="Of a slider: how far a scale of 1 moves; default: 1.")] = None,
    regularization: Annotated[Path | None, typer.Option(help="Folder of pictures of the class, if any.")] = None,
    guard: Annotated[
        list[str] | None,
        typer.Option(help="A concept that stays as the model has it; may be repeated."),
    ] = None,
    method: Annotated[str, typer.Option(help="auto, or a method of docs/customization.md.")] = "auto",
    layout: Annotated[str, typer.Option(help="auto, mm, diffusers, kohya, comfyui or peft.")] = "auto",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps at most (default: the model's or method's).")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the branches (default: the method's).")] = None,
    rate: Annotated[
        float | None, typer.Option(min=1e-8, help="Learning rate of layers (default: the model's or method's).")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=8, help="Side of the training pictures in pixels (default: the model's own).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures a step (default: the model's or method's).")
    ] = None,
    companions: Annotated[
        int | None, typer.Option(min=0, help="Pictures beside something known, made of yours and the model's.")
    ] = None,
    recoloured: Annotated[
        int | None, typer.Option(min=0, help="Pictures of other things in a style's colours, made by the model.")
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option(help="Compute blocks again for the gradient: less memory, more time; default: large models."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of starting values, order and noise.")] = 0,
    sample: Annotated[list[str] | None, typer.Option(help="A prompt that is drawn at each preview.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder of state and previews; default: OUT.work.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the state when the run is done.")] = False,
    force: shared.ForceOption = False,
) -> None:
    """Learns a new subject, style, edit or slider; a run that was stopped goes on when the command is given again."""
    from mm.core.errors import UserError
    from mm.core.files import check_new

    check_new(out, force=force)
    if folder is not None and not folder.is_dir():
        raise UserError(f"{folder} is no folder; give a folder with a few pictures")
    from mm.customization.checks import check_call
    from mm.customization.customize import customize as make
    from mm.customization.learned import check_layout
    from mm.customization.methods.registry import method_of
    from mm.customization.objectives.protocol import objective_of
    from mm.customization.run_state import STATE
    from mm.customization.sliders import prompts_of

    asked = bool(positive or negative or neutral or subject or strength is not None)
    prompts = prompts_of(positive, negative, neutral, subject or (), strength) if asked else None
    place = work or out.with_name(f"{out.name}.work")
    check_call(kind, folder, name, prompts, regularization, work=place, samples=sample)
    wanted = method_of(method).name
    check_layout(layout, wanted)
    from mm.cli.running import quietly_loaded

    given = {"steps": steps, "rank": rank, "learning_rate": rate, "size": size, "batch_size": batch_size,
             "companions": companions, "recoloured": recoloured, "checkpointing": checkpointing}  # fmt: skip
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    engine = quietly_loaded(model, bits=bits)
    pipe = engine.pipeline_for("edit") if kind == "edit" else engine.pipeline
    check_layout(
        layout, wanted, word=kind != "slider" and not objective_of(pipe, size, edit=kind == "edit").open_vocabulary
    )
    with ProgressLine() as line, _going_on(place / STATE):
        learned = make(
            pipe, folder, name=name, kind=kind, method=method, noun=noun, prompts=prompts, work=place, samples=sample,  # type: ignore[arg-type]
            regularization=regularization, guard=guard or (), seed=seed,
            estimated=lambda found: print(found, file=sys.stderr), progress=line.show, **settings,
        )  # fmt: skip
    _write(learned, out, layout, pipe, place)
    if not keep:
        (place / STATE).unlink(missing_ok=True)
    _print(learned, out)


@contextmanager
def _going_on(state: Path) -> Iterator[None]:
    """Within the context, a run that is interrupted says how it goes on, once it has saved its state."""
    try:
        yield
    except KeyboardInterrupt:
        if state.is_file():
            print(f"stopped; the same command goes on from {state}", file=sys.stderr)
        raise


def _write(learned: Any, out: Path, layout: str, pipe: Any, work: Path) -> None:
    """Writes what was learned. Raises UserError where there is no space, with where it is kept."""
    from mm.core.errors import UserError

    try:
        learned.write(out, layout, target=pipe)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror or error}); what was learned is kept in {work}, and the same "
            "command writes it without learning again; free some space first, or choose another -o with --work "
            f"{work}"
        ) from error


def _print(learned: Any, out: Path) -> None:
    """Prints how well it was learned, and what was written."""
    report = learned.report
    print(f"error on the pictures: {report['error']:.3f} of the base's, drift {report['drift']:.3f}")
    stopped = f", stopped early; best at step {report['best_step']}" if report["stopped_early"] else ""
    print(
        f"{out}: {counted(len(learned.entries), 'entry', 'entries')}, {out.stat().st_size >> 10} "
        f"KiB, {counted(report['steps'], 'step')}{stopped}"
    )
