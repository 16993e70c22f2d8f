"""What `mm generate` does with its options: settings of another picture, requests, files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.cli import options as shared
from mm.cli.running import follow, say
from mm.core.errors import UserError
from mm.core.files import check_folder
from mm.core.pictures import check_output_type, read_picture
from mm.engine import output
from mm.engine.events import Picture
from mm.engine.prompts import has_wildcards
from mm.engine.requests import Draw
from mm.engine.settings import Again, drawn_again
from mm.engine.variants import variants, wildcard_files
from mm.provenance.file_settings import read_file_settings

if TYPE_CHECKING:
    from mm.engine.engine import Engine

DEFAULT = "mm-tiny"


@dataclass(frozen=True, kw_only=True)
class Job:
    """The options of `mm generate`: `changes` are fields of `Draw` that were given, `loading` those of `Loading`."""

    changes: dict[str, Any]
    loading: dict[str, Any]
    out: Path
    model: str | None = None
    scheduler: str | None = None
    image: Path | None = None
    mask: Path | None = None
    like: Path | None = None
    matrix: bool = False
    wildcards: Path | None = None
    force: bool = False
    batch_size: int = 8
    metadata: bool = True


def run(job: Job) -> None:
    """Draws, and prints each file and its seed as soon as it is written.

    Raises:
        UserError: for options that do not fit together, files that are not there, or what the model cannot do.
    """
    check_output_type(job.changes.get("options", {}), file=True)
    if job.like is None and "prompt" not in job.changes:
        raise UserError("there is no prompt; say in words what to draw, or give --like PICTURE")
    lines_of = wildcard_files(job.wildcards) if job.wildcards is not None else None
    _check_alternatives(job)
    single = output.is_picture_file(job.out)
    if single and job.changes.get("count", 1) > 1:
        raise UserError(f"{job.out} is one file and {job.changes['count']} pictures are wanted; give a folder")
    output.check_file(job.out, force=job.force) if single else check_folder(job.out)
    pictures = {
        name: read_picture(path) for name, path in (("image", job.image), ("mask", job.mask)) if path is not None
    }
    before = read_file_settings(job.like) if job.like is not None else {}
    if "prompt" in job.changes and not before:
        Draw(**{**job.changes, **pictures})  # wrong values fail before a model is loaded
    engine = _engine(job, before)
    again = _request(job, engine, before, pictures)
    if "prompt" not in job.changes:  # words that were expanded already
        several = [again.request]
    else:
        several = variants(again.request, matrix=job.matrix, lines_of=lines_of)
    if single and again.keep is None and sum(one.count for one in several) > 1:
        raise UserError(f"{job.out} is one file, and the prompt stands for several pictures; give a folder")
    _draw(job, engine, several, single, again.keep)


def _check_alternatives(job: Job) -> None:
    """Raises UserError for options of prompts with alternatives beside a prompt without any."""
    prompt = job.changes.get("prompt")
    given = [name for name, value in (("--matrix", job.matrix), ("--wildcards", job.wildcards)) if value]
    if given and prompt is None:
        raise UserError(f"{given[0]} acts on a prompt that is given, and --like takes the picture's; give a prompt too")
    if job.wildcards is not None and prompt is not None and not has_wildcards(prompt):
        raise UserError(
            f"the prompt {prompt[:60]!r} has no __NAME__, so --wildcards would change nothing; write the name of a "
            f"file in {job.wildcards} as in 'a __animals__', or leave out --wildcards"
        )


def _engine(job: Job, before: dict[str, Any]) -> Engine:
    """The model of the command line, or the one of the picture that is drawn again."""
    adapters, bits, model = None, None, job.model
    if before and model is None:
        model = _model_of(before, str(job.like))
        if not job.loading["adapters"]:
            adapters = _adapters_of(before)
        bits = before.get("bits") if before.get("bits") in (4, 8) else None
    return shared.Loading(model=model or DEFAULT, **job.loading).engine(adapters, bits)


def _model_of(settings: dict[str, Any], source: str) -> str:
    """The model of a picture: an embedded one, a folder, or one of the hub that was downloaded before.

    A picture makes mm download no model.
    """
    from mm.core.paths import embedded_models

    name = settings.get("model")
    if isinstance(name, str) and (name in embedded_models() or Path(name).exists() or _in_cache(name)):
        return name
    raise UserError(f"{source} was drawn with the model {name!r}, which is not here by that name; give it with --model")


def _in_cache(name: str) -> bool:
    """Whether the hub's cache has a model of that name."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in ("model_index.json", "config.json"))
    except ValueError:  # no name of the hub
        return False


def _adapters_of(settings: dict[str, Any]) -> list[tuple[Path, float]]:
    found = settings.get("adapters", [])
    if not isinstance(found, list) or any(not isinstance(a, dict) or not {"file", "scale"} <= a.keys() for a in found):
        raise UserError("the picture's list of adapters is damaged; give them with --lora FILE:SCALE")
    try:
        return [shared.adapter(f"{entry['file']}:{entry['scale']}") for entry in found]
    except UserError as error:
        raise UserError(f"{error}; the picture was drawn with it: give its new place with --lora FILE:SCALE") from error


def _request(job: Job, engine: Engine, before: dict[str, Any], pictures: dict[str, Any]) -> Again:
    changes = {**job.changes, **pictures}
    if job.scheduler is not None:
        changes["scheduler"] = shared.scheduler(job.scheduler, engine.capabilities)
    if not before:
        return Again(request=Draw(**changes))
    again = drawn_again(before, engine.capabilities, **changes)
    for note in again.notes:
        say(note)
    return again


def _draw(job: Job, engine: Engine, requests: list[Draw], single: bool, only: int | None) -> None:
    source = {"source": job.image.name} if job.image is not None else {}

    def keep(event: Picture) -> None:
        if only not in (None, event.index):
            return
        settings = event.settings | source if job.metadata else None
        path = job.out
        if single:
            output.save_file(path, event.picture, settings, force=job.force)
        else:
            path = output.save_numbered(job.out, output.picture_bytes(event.picture, settings))
        print(f"{path}  seed {event.seed}", flush=True)

    total = sum(one.count for one in requests)
    size = job.batch_size if only is None else total
    follow(engine.run_all(requests, batch_size=size), keep, total=total)
