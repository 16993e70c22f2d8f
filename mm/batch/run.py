"""Runs a job file: works out which pictures are missing, draws them in batches, keeps each as soon as it is there.

Design choices:
- The unit of work is a picture, not a row: pictures of any rows share a batch where steps, mode and guidance agree, and
  a run that was stopped goes on in the middle of a row.
- A picture depends on its settings alone. The weights' hash is one of them: other weights of that name draw anew.
- Seeds belong to pictures: a row's own seed + k, or a hash of (run seed, custom_id, k). So no batch size, order or
  restart changes a picture, and adding rows to a file changes none of the others.
- A batch that fails is drawn again picture by picture, so one bad prompt costs only itself. Any exception fails its
  picture and nothing else; a full disk stops the run, since every later picture would fail too.
- What failed stays failed until `retry_failed` asks for it, and counts as failed in every run's result.
- `stop` is asked at every row, step and file: what was begun is dropped, what is finished is kept whole.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mm.batch.jobs import MAX_SEED, BadRow, Row, read_jobs
from mm.batch.store import Picture, Store
from mm.core.devices import place
from mm.core.errors import UserError
from mm.core.paths import resolve_model
from mm.core.png_settings import drawing_settings, png_bytes
from mm.families.mm_tiny import steps_for

if TYPE_CHECKING:
    from mm.pipelines.text_to_image import TextToImagePipeline


_Kind = TypeVar("_Kind")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands; `total` and the counts are pictures, a row that cannot be read counts as one."""

    total: int
    drawn: int = 0
    skipped: int = 0
    failed: int = 0


@dataclass(kw_only=True)
class Report:
    """What a run did. `errors` has a line for each row that cannot be read and each picture that failed."""

    rows: int = 0
    total: int = 0
    missing: int = 0
    drawn: int = 0
    skipped: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)
    stopped: bool = False


class _StoppedError(Exception):
    """Leaves the pipeline in the middle of a picture."""


def run_jobs(
    jobs: str | Path,
    out: str | Path,
    *,
    model: str = "mm-tiny",
    batch_size: int = 4,
    seed: int = 0,
    retry_failed: bool = False,
    dry_run: bool = False,
    limit: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    load: Callable[[], TextToImagePipeline] | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_drawing: Callable[[], None] = lambda: None,
) -> Report:
    """Draws what is missing of a job file in the folder `out`.

    `load` gives the pipeline and is called once, only if something is to be drawn (default: `model` from its weights);
    `model` is part of every picture's settings. A dry run counts, and neither draws nor writes. `limit` takes only the
    first rows. Once `stop` says True, the run ends with what is finished. `on_drawing` is called when the pipeline is
    loaded: nothing is written before.
    """
    if not 1 <= batch_size <= 256:
        raise UserError(f"batch size is {batch_size}; give a whole number from 1 to 256")
    report = Report()
    try:
        rows = list(_asking(islice(read_jobs(jobs), limit), stop))
        if not rows:
            raise UserError(f"{jobs} holds no rows; write one JSON object a line, see docs/batch.md")
        store, report.rows = Store(out), len(rows)
        bad = [row for row in rows if isinstance(row, BadRow)]
        good = _asking((row for row in rows if isinstance(row, Row)), stop)
        missing = _survey(good, bad, store, report, model, seed, retry_failed)
    except _StoppedError:  # nothing was written yet
        report.stopped = True
        return report

    def tell() -> None:
        on_progress(Progress(total=report.total, drawn=report.drawn, skipped=report.skipped, failed=report.failed))

    tell()
    if dry_run:
        return report
    try:
        if missing:
            pipe = load() if load else _load(model)
            on_drawing()
            for batch in _batches(missing, batch_size):
                _draw_batch(pipe, batch, store, report, stop)
                tell()
    except _StoppedError:
        report.stopped = True
    finally:
        store.write_manifests(bad)
    return report


def _asking(rows: Iterable[_Kind], stop: Callable[[], bool]) -> Iterator[_Kind]:
    """The rows, with a look at `stop` before each."""
    for row in rows:
        if stop():
            raise _StoppedError
        yield row


def picture_seed(row: Row, index: int, run_seed: int) -> int:
    """The seed of picture `index` of a row."""
    if row.body.seed is not None:
        return row.body.seed + index
    # the id comes last and whole numbers hold no colon, so that no two triples read alike
    digest = hashlib.sha256(f"{run_seed}:{index}:{row.custom_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % (MAX_SEED + 1)


def model_hash(model: str) -> str | None:
    """A hash of a model's configs and weights; None for a hub name, whose files may not be here."""
    folder = resolve_model(model)
    if not isinstance(folder, Path):
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def pictures(row: Row, model: str, weights: str | None, run_seed: int) -> Iterator[Picture]:
    """A row's pictures, each with all settings that it depends on."""
    body = row.body
    for index in range(body.n):
        settings = drawing_settings(
            prompt=body.prompt, seed=picture_seed(row, index, run_seed), steps=steps_for(body.mode, body.steps),
            mode=body.mode, guidance=float(body.guidance), model=model, model_hash=weights, task=row.task,
        )  # fmt: skip
        yield Picture(line=row.line, custom_id=row.custom_id, index=index, settings=settings)


def _survey(
    rows: Iterable[Row],
    bad: list[BadRow],
    store: Store,
    report: Report,
    model: str,
    run_seed: int,
    retry_failed: bool,
) -> list[Picture]:
    """The pictures to draw; everything else goes into the report."""
    missing, weights = [], model_hash(model)
    report.failed += len(bad)
    report.errors += [row.error for row in bad]
    for row in rows:
        for picture in pictures(row, model, weights, run_seed):
            status, error = store.status(picture)
            if status == "done":
                report.skipped += 1
            elif status == "failed" and not retry_failed:
                report.failed += 1
                report.errors.append(f"{_named(picture)}: {error} (failed in an earlier run; --retry-failed draws it)")
            else:
                missing.append(picture)
    report.missing = len(missing)
    report.total = report.missing + report.skipped + report.failed
    return missing


def _batches(missing: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    """Pictures that can share a call together, whichever rows they come from."""
    groups: dict[tuple[Any, ...], list[Picture]] = defaultdict(list)
    for picture in missing:
        groups[_call(picture)].append(picture)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _call(picture: Picture) -> tuple[Any, ...]:
    return tuple(picture.settings[name] for name in ("mode", "steps", "guidance"))


def _draw_batch(
    pipe: TextToImagePipeline, batch: list[Picture], store: Store, report: Report, stop: Callable[[], bool]
) -> None:
    """Draws and keeps pictures that share a call; whatever cannot be drawn is kept as failed."""
    ready: list[tuple[Picture, list[str]]] = []
    for picture in batch:
        try:
            ready.append((picture, _warnings(pipe, picture)))
        except UserError as error:
            _fail(picture, error, store, report)
    if not ready:
        return
    try:
        drawn = _draw(pipe, [picture for picture, _ in ready], stop)
    except _StoppedError:
        raise
    except Exception as error:  # every kind: one row must not end the run
        if len(ready) > 1:
            for picture, _ in ready:
                _draw_batch(pipe, [picture], store, report, stop)
        else:
            _fail(ready[0][0], error, store, report)
        return
    for (picture, notes), image in zip(ready, drawn, strict=True):
        if stop():
            raise _StoppedError
        settings = {key: value for key, value in picture.settings.items() if key != "task"}
        store.save(picture, png_bytes(image, settings), notes)
        report.drawn += 1


def _warnings(pipe: TextToImagePipeline, picture: Picture) -> list[str]:
    """What the pipeline has to say about one prompt, apart from its batch: unknown words, each once."""
    from mm.pipelines.prompt_encoding import check_prompts

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_prompts([picture.settings["prompt"]], pipe.text_tokenizer)
    return [str(warning.message) for warning in caught]


def _draw(pipe: TextToImagePipeline, batch: list[Picture], stop: Callable[[], bool]) -> list[Any]:
    import torch

    def watch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if stop():
            raise _StoppedError
        return {}

    mode, steps, guidance = _call(batch[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # told already, picture by picture
        return pipe(
            [picture.settings["prompt"] for picture in batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            mode=mode,
            generator=[torch.Generator().manual_seed(picture.seed) for picture in batch],
            callback_on_step_end=watch,
        ).images


def _fail(picture: Picture, error: Exception, store: Store, report: Report) -> None:
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    store.fail(picture, " ".join(text.split()))
    report.failed += 1
    report.errors.append(f"{_named(picture)}: {' '.join(text.split())}")


def _named(picture: Picture) -> str:
    return f"line {picture.line}, {picture.custom_id}, picture {picture.index}"


def _load(model: str) -> TextToImagePipeline:

    from mm import TextToImagePipeline

    pipe = TextToImagePipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)  # the run has one of its own
    return place(pipe)
