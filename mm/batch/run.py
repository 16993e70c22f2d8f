"""Runs a job file: works out which pictures are missing, draws them in batches, keeps each as soon as it is there.

Design choices:
- The unit of work is a picture, not a row: pictures of any rows share a batch where steps, mode and guidance agree, and
  a run that was stopped goes on in the middle of a row.
- What a picture depends on is settled before anything is drawn (`mm.batch.plan`). Pictures of a model are drawn one
  after the other, and adapters of rows go on and come off without loading it again.
- A batch that fails is drawn again picture by picture, so one bad prompt costs only itself. Any exception fails its
  picture and nothing else; a full disk stops the run, since every later picture would fail too.
- What failed stays failed until `retry_failed` asks for it, and counts as failed in every run's result.
- One process draws into a folder. A second one would draw the same pictures, and is refused.
- `stop` is asked at every row, step and file: what was begun is dropped, what is finished is kept whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mm.batch.batches import Models, batches
from mm.batch.checks import PromptCheck, warn_of_words
from mm.batch.jobs import BadRow, Row, read_jobs
from mm.batch.plan import Adapters, Plan, Planned
from mm.batch.store import Picture, Store
from mm.core.adapter_files import adapter_file
from mm.core.checks import check_path
from mm.core.errors import UserError
from mm.core.locks import locked
from mm.core.paths import expanded
from mm.core.png_settings import png_bytes
from mm.engine.attaching import Adapter, listed
from mm.engine.events import CancelToken, Event, Notice, Step
from mm.engine.events import Picture as Drawn

if TYPE_CHECKING:
    from mm.engine.engine import Engine


_Kind = TypeVar("_Kind")
_LOCK = ".running"


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
    model: str | Path = "mm-tiny",
    batch_size: int = 4,
    seed: int = 0,
    retry_failed: bool = False,
    dry_run: bool = False,
    limit: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    load: Callable[[str], Engine] | None = None,
    root: str | Path | None = None,
    base: str | Path | None = None,
    bits: int | None = None,
    adapters: str | Path | Adapter | Sequence[str | Path | Adapter] = (),
    offload: str = "auto",
    dtype: str = "auto",
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_drawing: Callable[[], None] = lambda: None,
) -> Report:
    """Draws what is missing of a job file in the folder `out`.

    Args:
        jobs: the job file.
        out: the folder for results.
        model: of rows that name none; part of every picture's settings.
        batch_size: pictures of a call; changes no picture. Models with rounded activations draw one by one.
        seed: of the run, for rows without one.
        retry_failed: whether what failed in an earlier run is drawn again.
        dry_run: checks rows against the models' configs and counts; loads no weights and writes nothing.
        limit: only the first rows.
        stop: asked at every row, step and file; once it says True, the run ends with what is finished.
        load: gives the engine of a model; called when the first picture of that model is drawn.
        root: the folder under which files lie that rows name; the job file's own where it is None.
        base: as in `mm.load`, for `model`; models that rows name are loaded without.
        bits: 4 or 8 for low-bit weights.
        adapters: patch or LoRA files, each alone or with its scale, before those of a row; or one alone.
        offload: as in `mm.load`.
        dtype: as in `mm.load`.
        on_progress: called whenever the counts change.
        on_drawing: called when the first model is about to draw: nothing is written before.

    Raises:
        UserError: where the file or the folder cannot be used, another process draws into the folder, or a model
            cannot be loaded.
    """
    if not 1 <= batch_size <= 256:
        raise UserError(f"batch size is {batch_size}; give a whole number from 1 to 256")
    for what, place in (("the job file", jobs), ("the folder of results", out), ("the model", model)):
        check_path(what, place)
    model, files = str(model), _files(adapters)
    report = Report()
    try:
        rows = list(_asking(islice(read_jobs(jobs), limit), stop))
        if not rows:
            raise UserError(f"{jobs} holds no rows; write one JSON object a line, see docs/batch.md")
        store, report.rows = Store(out), len(rows)
        bad = [row for row in rows if isinstance(row, BadRow)]
        good = _asking((row for row in rows if isinstance(row, Row)), stop)
        plan = Plan(model=model, seed=seed, root=_root(root, jobs), bits=bits, adapters=files)
        missing = _survey(good, bad, store, report, plan, retry_failed)
        if dry_run:
            _refuse(missing, report, stop)
    except _StoppedError:  # nothing was written yet
        report.stopped = True
        return report

    def announce() -> None:
        on_progress(Progress(total=report.total, drawn=report.drawn, skipped=report.skipped, failed=report.failed))

    announce()
    if dry_run:
        return report
    bases = {} if base is None else {model: str(base)}
    models = Models(load or partial(_load, bases=bases, bits=bits, offload=offload, dtype=dtype))
    with _alone(store.root) if missing else nullcontext():
        try:
            for batch in _loaded(models, missing, batch_size, on_drawing):
                _draw_batch(models, batch, store, report, stop)
                announce()
        except _StoppedError:
            report.stopped = True
        finally:
            store.write_manifests(bad)
    return report


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within the context no other process draws into the folder: it would draw the same pictures again."""
    refusal = (
        f"another mm batch is drawing into {folder}, and would draw the same pictures; wait for its end and run this "
        "again, or give another folder"
    )
    try:
        with locked(folder / _LOCK, refusal=refusal):
            yield
    finally:
        with suppress(OSError):  # where nothing was written, no folder is left
            folder.rmdir()


def _root(root: str | Path | None, jobs: str | Path) -> Path:
    """The folder under which files lie that rows name."""
    found = Path(jobs).resolve().parent if root is None else expanded(root).resolve()
    if not found.is_dir():
        raise UserError(f"root is {root}, which is no folder")
    return found


def _files(adapters: str | Path | Adapter | Sequence[str | Path | Adapter]) -> Adapters:
    """Adapter files with their scales. Raises UserError for one that is not there."""
    found = []
    for one in listed(adapters):
        path, scale = (one, 1.0) if isinstance(one, str | Path) else one
        found.append((adapter_file(path), scale))
    return tuple(found)


def _asking(rows: Iterable[_Kind], stop: Callable[[], bool]) -> Iterator[_Kind]:
    """The rows, with a check of `stop` before each."""
    for row in rows:
        if stop():
            raise _StoppedError
        yield row


def _survey(
    rows: Iterable[Row], bad: list[BadRow], store: Store, report: Report, plan: Plan, retry_failed: bool
) -> list[Planned]:
    """The pictures to draw; everything else goes into the report."""
    missing = []
    for row in rows:
        try:
            planned = list(plan.pictures(row))
        except UserError as error:
            text = f"line {row.line}: {row.custom_id}: {error}"
            bad.append(BadRow(line=row.line, custom_id=row.custom_id, error=text))
            continue
        for one in planned:
            status, error_before = store.status(one.picture)
            if status == "done":
                report.skipped += 1
            elif status == "failed" and not retry_failed:
                report.failed += 1
                text = f"{_named(one.picture)}: {error_before} (failed in an earlier run; --retry-failed draws it)"
                report.errors.append(text)
            else:
                missing.append(one)
    report.failed += len(bad)
    report.errors[:0] = [row.error for row in sorted(bad, key=lambda row: row.line)]
    report.missing = len(missing)
    report.total = report.missing + report.skipped + report.failed
    return missing


def _refuse(missing: list[Planned], report: Report, stop: Callable[[], bool]) -> None:
    """Counts the pictures as failed whose prompts their model would refuse when it is loaded."""
    check = PromptCheck()
    for one in _asking(missing, stop):
        try:
            check(one)
        except UserError as error:
            report.errors.append(f"{_named(one.picture)}: {error}")
            report.failed += 1
            report.missing -= 1


def _loaded(
    models: Models, missing: Sequence[Planned], size: int, on_drawing: Callable[[], None]
) -> Iterator[list[Planned]]:  # fmt: skip
    """The pictures of each call, once the first model is loaded."""
    found = list(batches(missing, size))
    if found:
        with suppress(UserError):  # adapters of this row that do not fit: they fail their own pictures
            models.get(found[0][0])
        on_drawing()
    yield from found


def _draw_batch(models: Models, batch: list[Planned], store: Store, report: Report, stop: Callable[[], bool]) -> None:
    """Draws and keeps pictures that share a call; whatever cannot be drawn is kept as failed."""
    ready: list[tuple[Planned, list[str]]] = []
    try:
        engine = models.get(batch[0])
    except UserError as error:
        if models.engine is None:  # the model cannot be loaded: nothing of it can be drawn
            raise
        for one in batch:
            _fail(one.picture, error, store, report)
        return
    for one in batch:
        try:
            ready.append((one, _warnings(engine, one)))
        except UserError as error:
            _fail(one.picture, error, store, report)
    if not ready:
        return
    try:
        drawn, notices = _draw(engine, [one for one, _ in ready], stop)
    except _StoppedError:
        raise
    except Exception as error:  # every kind: one row must not end the run
        if len(ready) > 1:
            for one, _ in ready:
                _draw_batch(models, [one], store, report, stop)
        else:
            _fail(ready[0][0].picture, error, store, report)
        return
    if len(ready) == 1 or not _has_words(engine):  # of one picture, or of words that no check names one by one
        ready = [(one, list(dict.fromkeys([*notes, *notices]))) for one, notes in ready]
    for (one, notes), event in zip(ready, drawn, strict=True):
        if stop():
            raise _StoppedError
        drawn_with = {"task", "steps"}  # the steps are those of this picture, the record's those of the row
        settings = event.settings | {key: value for key, value in one.picture.settings.items() if key not in drawn_with}
        try:
            data = png_bytes(event.picture, settings)
        except UserError as error:  # an output_type of another kind: one row must not end the run
            _fail(one.picture, error, store, report)
            continue
        store.save(one.picture, data, notes)
        report.drawn += 1


def _has_words(engine: Engine) -> bool:
    """Whether the model has a vocabulary of its own, so that its prompts are checked one by one."""
    return getattr(engine.pipeline, "text_tokenizer", None) is not None


def _warnings(engine: Engine, one: Planned) -> list[str]:
    """What a model with a vocabulary of its own says of one prompt; nothing where it has none."""
    if not _has_words(engine):
        return []
    return warn_of_words(one, engine.pipeline.text_tokenizer)


def _draw(engine: Engine, batch: list[Planned], stop: Callable[[], bool]) -> tuple[list[Drawn], list[str]]:
    """The pictures of a call in order, and what it warned of."""
    token, made, notices = CancelToken(), {}, []

    def keep(event: Event) -> None:
        if isinstance(event, Drawn):
            made[event.index] = event
        elif isinstance(event, Notice):
            notices.append(event.text)
        elif isinstance(event, Step) and stop():
            token.cancel()

    engine.run_all([one.request() for one in batch], token, batch_size=len(batch)).each(keep)
    if len(made) < len(batch):
        raise _StoppedError
    return [made[k] for k in range(len(batch))], notices


def _fail(picture: Picture, error: Exception, store: Store, report: Report) -> None:
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    store.fail(picture, " ".join(text.split()))
    report.failed += 1
    report.errors.append(f"{_named(picture)}: {' '.join(text.split())}")


def _named(picture: Picture) -> str:
    return f"line {picture.line}, {picture.custom_id}, picture {picture.index}"


def _load(model: str, *, bases: Mapping[str, str], **options: Any) -> Engine:
    from mm.engine.loading import load
    from mm.engine.notices import no_loading_bars

    no_loading_bars()  # of diffusers and transformers: `on_progress` says where a run stands
    return load(model, base=bases.get(model), **options)
