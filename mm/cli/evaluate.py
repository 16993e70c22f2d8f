"""`mm eval`: measures a model and prints the judge's ceiling beside every score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mm.cli import eval_tables as tables
from mm.cli import options as shared
from mm.cli.eval_erase import EXAMPLE as ERASE_EXAMPLE
from mm.cli.eval_erase import erase
from mm.cli.options import DrawingMode
from mm.cli.progress_line import ProgressLine
from mm.core.checks import MAX_SEED
from mm.families.mm_tiny import GUIDANCE

app = typer.Typer(add_completion=False, no_args_is_help=True)

Json = shared.ReportOption
BestOf = Annotated[
    int, typer.Option(min=1, help="Draw again, so often at most, what the model itself does not see in its picture.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only this many prompts a task, or pictures a style.")]


@app.callback(epilog="Example: mm eval compose --limit 10 --json runs/compose.json")
def _group() -> None:
    """Measures a model: how well it follows prompts, what its tokenizers lose."""


@app.command(epilog="Example: mm eval compose --mode codes --limit 10 --json runs/compose-codes.json")
def compose(
    model: shared.ModelOption = "mm-tiny",
    bits: shared.BitsOption = None,
    lora: shared.AdapterOption = None,
    mode: Annotated[DrawingMode, typer.Option(help="By flow matching, or in codes.")] = DrawingMode.flow,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the run.")] = 0,
    limit: Limit = None,
    pictures: Annotated[int, typer.Option(min=1, max=1000, help="Pictures a prompt.")] = 4,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps (flow 12, codes 32).")] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 = off.")] = GUIDANCE,
    best_of: BestOf = 1,
    wording: Annotated[bool, typer.Option(help="200 prompts in other words, beside the same in plain ones.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that are drawn at a time.")] = 16,
    prompts: Annotated[Path | None, typer.Option(help="Other prompts, in the shape of our own file.")] = None,
    judge: Annotated[Path | None, typer.Option(help="Folder of another judge.")] = None,
    json: Json = None,
    force: shared.ForceOption = False,
) -> None:
    """Six compositional tasks (GenEval's protocol), read by the judge."""
    from tqdm import tqdm

    from mm.evaluation.compose import ComposeConfig, evaluate_compose
    from mm.evaluation.prompts import COMPOSE
    from mm.evaluation.wording import OTHER_WORDS, evaluate_wording
    from mm.world.judge import Judge

    config = ComposeConfig(
        mode=mode.value, seed=seed, limit=limit, pictures=pictures, steps=steps, guidance=guidance, best_of=best_of,
        batch_size=batch_size,
    )  # fmt: skip
    pipe, loaded = _pipeline("draw", model, bits, lora)
    with tqdm(unit="picture", desc="drawing") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        evaluate = evaluate_wording if wording else evaluate_compose
        report = evaluate(
            pipe,
            Judge.from_pretrained(judge).to(pipe.device),
            config,
            prompts=prompts or (OTHER_WORDS if wording else COMPOSE),
            json_file=json,
            settings=loaded,
            progress=progress,
        )
    tables.show(tables.wording(report) if wording else tables.compose(report))


@app.command(epilog="Example: mm eval fidelity --limit 10 --json runs/fidelity.json")
def fidelity(
    model: shared.ModelOption = "mm-tiny",
    bits: shared.BitsOption = None,
    lora: shared.AdapterOption = None,
    mode: Annotated[DrawingMode, typer.Option(help="By flow matching, or in codes.")] = DrawingMode.flow,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the run.")] = 0,
    limit: Limit = None,
    pictures: Annotated[int, typer.Option(min=1, max=1000, help="Pictures a prompt.")] = 4,
    prompts: Annotated[Path | None, typer.Option(help="Other prompts, in the shape of our own file.")] = None,
    json: Json = None,
    force: shared.ForceOption = False,
) -> None:
    """Sharpness of drawn pictures beside renders, and the Frechet distance between the two on the judge's features."""
    from mm.evaluation.compose import ComposeConfig
    from mm.evaluation.fidelity import evaluate_fidelity
    from mm.evaluation.prompts import COMPOSE
    from mm.world.judge import Judge

    config = ComposeConfig(mode=mode.value, seed=seed, limit=limit, pictures=pictures)
    pipe, loaded = _pipeline("draw", model, bits, lora)
    judge, settings = Judge.from_pretrained(), loaded
    report = evaluate_fidelity(pipe, judge, config, prompts=prompts or COMPOSE, json_file=json, settings=settings)
    tables.fidelity(report)


@app.command(epilog="Example: mm eval understand --limit 100 --json runs/understand.json")
def understand(
    context: typer.Context,
    model: shared.ModelOption = "mm-tiny",
    bits: shared.BitsOption = None,
    lora: shared.AdapterOption = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the run.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Scenes, with about seven questions each.")] = 300,
    wide: Annotated[bool, typer.Option(help="Questions in wordings that training never saw.")] = False,
    wordings: Annotated[
        Path | None, typer.Option(help="Other wordings for --wide, in the shape of our own file.")
    ] = None,
    each: Annotated[int, typer.Option(min=1, help="With --wide: scenes that each wording is asked about.")] = 6,
    json: Json = None,
    force: shared.ForceOption = False,
) -> None:
    """Questions about pictures by kind, yes/no balance, and the facts of descriptions."""
    from mm.core.errors import UserError
    from mm.evaluation.understand import UnderstandConfig, evaluate_understand
    from mm.evaluation.wide import evaluate_wide

    if wordings is not None and not wide:
        raise UserError(f"--wordings {wordings} is given without --wide, which asks in other wordings; add --wide")
    if not wide and shared.given(context, "each"):
        raise UserError(f"--each {each} is given without --wide, which asks each wording so often; add --wide")
    pipe, loaded = _pipeline("describe", model, bits, lora)
    config = UnderstandConfig(seed=seed, limit=limit)
    if wide:
        report = evaluate_wide(pipe, config, wordings=wordings, each=each, json_file=json, settings=loaded)
        tables.shares(report, f"{report['n']} questions in {report['wordings']} wordings")
        return
    report = evaluate_understand(pipe, config, json_file=json, settings=loaded)
    tables.shares(report, f"{report['n']} questions")
    tables.captions(report)


@app.command(epilog="Example: mm eval edit --limit 10 --json runs/edit.json")
def edit(
    model: shared.ModelOption = "mm-tiny",
    bits: shared.BitsOption = None,
    lora: shared.AdapterOption = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the run.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Edits of each kind.")] = 40,
    guidance: Annotated[float, typer.Option(help="How strictly words are followed.")] = GUIDANCE,
    image_guidance: Annotated[float, typer.Option(help="How closely the source is followed.")] = 1.5,
    best_of: BestOf = 1,
    tuning: Annotated[bool, typer.Option(help="Seen compositions, for choosing settings.")] = False,
    json: Json = None,
    force: shared.ForceOption = False,
) -> None:
    """Edits by kind: whether the change was made, and whether the rest stayed."""
    from mm.evaluation.edit import EditConfig, evaluate_edit
    from mm.world.judge import Judge

    pipe, loaded = _pipeline("edit", model, bits, lora)
    pipe.default_guidance = (guidance, image_guidance)
    config = EditConfig(seed=seed, limit=limit, tuning=tuning, best_of=best_of)
    settings = loaded | {"guidance": guidance, "image_guidance": image_guidance}
    report = evaluate_edit(pipe, Judge.from_pretrained(), config, json_file=json, settings=settings)
    tables.edit(report)


@app.command("customize", epilog="Example: mm eval customize --subject panda --json runs/customize.json")
def customize_(
    model: shared.ModelOption = "mm-tiny",
    method: Annotated[str, typer.Option(help="A method of customization, or zero-shot.")] = "auto",
    subject: Annotated[list[str] | None, typer.Option(help="Held-out objects; default: all eight.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the pictures.")] = 0,
    limit: Annotated[int, typer.Option(min=0, help="Compose prompts a task for the drift; 0 = none.")] = 4,
    pictures: Annotated[int, typer.Option(min=1, max=1000, help="Pictures a prompt.")] = 2,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    companions: Annotated[
        int | None, typer.Option(min=0, help="Training pictures beside something known; default: the model's.")
    ] = None,
    one_ground: Annotated[str | None, typer.Option(help="All training pictures have this background.")] = None,
    bits: Annotated[int | None, typer.Option(help="4 trains and draws on the 4-bit copy.")] = None,
    tuning: Annotated[bool, typer.Option(help="Other prompts and seeds, for choosing settings.")] = False,
    work: Annotated[Path, typer.Option(help="Folder of pictures, adapters and results so far.")] = Path("customize"),
    json: Json = None,
    force: shared.ForceOption = False,
) -> None:
    """Learns objects that the model was never shown, and measures fidelity, prompt following, leakage and drift."""
    from mm.cli.running import quietly_loaded
    from mm.core.errors import UserError
    from mm.core.files import check_folder
    from mm.customization.methods.registry import method_of
    from mm.evaluation.customize import CustomizeConfig, evaluate_customize
    from mm.world import vocabulary as v
    from mm.world.judge import Judge

    check_folder(work)
    if method != "zero-shot":
        try:
            method_of(method)
        except UserError as error:
            raise UserError(f"{error}, zero-shot") from error
    given = {"steps": steps, "companions": companions}
    config = CustomizeConfig(
        subjects=tuple(subject or v.HELD_OUT_OBJECTS), method=method, seed=seed, limit=limit, pictures=pictures,
        tuning=tuning, one_ground=one_ground,
        settings={key: value for key, value in given.items() if value is not None},
    )  # fmt: skip
    engine = quietly_loaded(model, bits=bits)
    shared.check_world(model, engine.capabilities.modes)
    pipe = engine.pipeline
    pipe.set_progress_bar_config(disable=True)
    with ProgressLine() as line:
        report = evaluate_customize(
            pipe, Judge.from_pretrained(), config, work=work, json_file=json, progress=line.say,
            settings={"model": model, "bits": bits},
        )  # fmt: skip
    tables.customize(report)


@app.command(epilog="Example: mm eval chat --json runs/chat.json")
def chat(
    model: shared.ModelOption = "mm-tiny",
    bits: shared.BitsOption = None,
    lora: shared.AdapterOption = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the run.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only this many conversations.")] = None,
    best_of: BestOf = 1,
    scripts: Annotated[Path | None, typer.Option(help="Other scripts, in the shape of our own files.")] = None,
    json: Json = None,
    force: shared.ForceOption = False,
) -> None:
    """Scripted conversations of four and twelve turns: every drawing, edit, answer and reply judged."""
    from mm.evaluation.chat import LONG_SCRIPTS, SCRIPTS, evaluate_chat
    from mm.world.judge import Judge

    pipe, loaded = _pipeline("converse", model, bits, lora)
    judge, settings = Judge.from_pretrained(), loaded
    where = [SCRIPTS, LONG_SCRIPTS] if scripts is None else [scripts]
    report = evaluate_chat(
        pipe, judge, scripts=where, limit=limit, seed=seed, best_of=best_of, json_file=json, settings=settings
    )
    shares = report["tasks"] | {"faultless": report["faultless"]}
    tables.shares(
        report | {"tasks": {name: task for name, task in shares.items() if task["n"]}}, f"{report['n']} turns"
    )


@app.command(epilog="Example: mm eval reconstruct --limit 32 --extra weights/comparisons --json runs/reconstruct.json")
def reconstruct(
    model: shared.ModelOption = "mm-tiny",
    extra: Annotated[Path | None, typer.Option(help="A folder with further tokenizers to compare.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the held-out renders.")] = 0,
    limit: Limit = None,
    json: Json = None,
    force: shared.ForceOption = False,
) -> None:
    """PSNR, SSIM and bits per picture of a model's tokenizers, by style, on held-out renders."""
    from mm.core.paths import resolve_model
    from mm.evaluation.reconstruct import evaluate_reconstruct

    report = evaluate_reconstruct(resolve_model(model), extra=extra, seed=seed, limit=limit, json_file=json)
    tables.show(tables.reconstruct(report))


app.command(epilog=ERASE_EXAMPLE)(erase)


def _pipeline(task: str, model: str, bits: shared.Bits | None, lora: list[str] | None) -> tuple[Any, dict[str, Any]]:
    """The pipeline of a task, and the settings of the model for a report.

    Raises:
        UserError: for a model that does not draw the world that the judge reads.
    """
    engine = shared.Loading(model=model, bits=bits, adapters=lora).engine()
    if task != "describe":
        shared.check_world(model, engine.capabilities.modes)
    pipe = engine.pipeline_for(task)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"model": model} | engine.facts
