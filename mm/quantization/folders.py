"""4-bit copies of model folders: what `mm quantize` does.

Design choices
- Any model folder or hub name of a known family, and any other diffusers pipeline. The family says by which class it is
  loaded, in what type, and with which prompts it is calibrated. The copy is an ordinary folder of the same kind with
  `report.json` and `report.png` in it.
- Pictures of a few prompts are drawn before and after, from the same seeds; their PSNR is the report's headline. Where
  the family names a score, it also judges pictures before and after, one by one.
- Finished layers are kept beside the target until all is done, so that a stopped run goes on where it was.
- Two processes never write one copy: the second is refused.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.core.checks import check_path, texts
from mm.core.errors import UserError
from mm.core.files import check_folder, write_bytes
from mm.core.locks import locked
from mm.core.model_parts import bring_the_rest, save_pipeline
from mm.core.part_files import packed_parts
from mm.core.paths import model_type, resolve_model
from mm.families import family_of, quantizable_parts
from mm.families.family import resolve
from mm.families.folders import family_at
from mm.families.loading import open_folder, packed_line
from mm.families.prompts import PROMPTS
from mm.families.sizes import check_side

if TYPE_CHECKING:
    from mm.families import Family
    from mm.quantization.config import SVDQuantConfig
    from mm.quantization.report import Report
    from mm.quantization.sources import Stored

_MARK = "of.json"
_LOCK = ".running"


def quantize_folder(
    model: str | Path,
    out: str | Path,
    config: SVDQuantConfig,
    *,
    prompts: str | Sequence[str] | None = None,
    pictures: int = 8,
    compose: int = 4,
    components: str | Sequence[str] | None = None,
    progress: bool = True,
    variant: str | None = None,
) -> Report:
    """Writes a quantized copy of a model with its report.

    Args:
        model: an embedded name, a folder or a hub name.
        out: the folder of the copy: a new or an empty one, or that of a stopped run, which goes on.
        config: how it is quantized.
        prompts: for calibration and for the pictures that are compared; None takes the family's.
        pictures: how many are compared by PSNR before and after.
        compose: prompts of each task that the family's score judges, where it has one; 0 for none.
        components: of the pipeline; None takes those of the family.
        progress: whether a bar shows where it stands.
        variant: of the files that are read, such as "fp16".

    Returns:
        The report, which is also in the folder.

    Raises:
        UserError: where `out` holds something else, or the model cannot be quantized so.
    """
    from mm.quantization import sources
    from mm.quantization.quantize import quantize

    check_path("the folder of the copy", out)
    out = Path(out)
    _check_out(out)
    parts, there = out / ".parts", out.exists()
    mark = _mark_of(parts, model, config)
    pipe, stored, family = _opened(model, variant)
    quantizable_parts(pipe, components)  # raises before anything is drawn
    if config.size is not None:
        check_side(pipe, config.size)
    chosen = list(texts("prompts", prompts)) if prompts else _prompts(family, config.seed)
    compared = _compared(pipe, family, chosen[:pictures], compose, config, progress)
    with _writing(out, parts, there):
        write_bytes(parts / _MARK, mark)  # from here on the run can be gone on with
        report = quantize(
            pipe,
            config,
            calibration=None if config.data_free else chosen,
            components=components,
            progress=progress,
            resume=parts,
            dtypes={name: part.main for name, part in stored.items()},
        )
        report.whole |= compared()
        sources.as_stored(pipe, stored)
        save_pipeline(pipe, out)
        _bring_the_rest(model, out)
        report.whole["folder_before"] = sum(part.bytes for part in stored.values())
        report.whole["folder_after"] = sources.folder_bytes(out)
        _save_report(report, out)
        shutil.rmtree(parts)
    return report


@contextmanager
def _writing(out: Path, parts: Path, there: bool) -> Iterator[None]:
    """Within the context no other process writes the copy. A UserError leaves nothing of a run without parts.

    Raises:
        UserError: where another process writes the copy, or has done so since `out` was checked.
    """
    busy = f"another process writes {out}; wait until it ends, or choose a new folder"
    with locked(parts / _LOCK, refusal=busy):
        try:
            if (out / "report.json").exists() and not (parts / _MARK).exists():
                raise UserError(f"{out} was written by another process meanwhile; choose a new folder")
            yield
        except UserError:
            _clear(parts, there or any(path != parts for path in out.iterdir()))
            raise


def _opened(model: str | Path, variant: str | None) -> tuple[Any, dict[str, Stored], Family | None]:
    """A pipeline to be quantized, how its parts are stored, and its family."""
    from mm.quantization import sources

    where = resolve_model(model)
    family = family_at(where) if isinstance(where, Path) else None
    if isinstance(where, Path):
        _refuse_packed(where)
    wide = family is not None and family.dtype == "float32"
    pipe, stored = sources.load(where, variant, open_folder, typed=not wide)
    return pipe, stored, family or family_of(pipe)


def _refuse_packed(folder: Path) -> None:
    """Raises UserError where another library has quantized what would be quantized here."""
    others = ("text_encoder", "vae", "movq", "image_encoder", "safety_checker")
    if packed := {name: method for name, method in packed_parts(folder).items() if not name.startswith(others)}:
        raise UserError(f"{folder} cannot be quantized: {packed_line(packed)}; give the model with weights of 16 bits")


def _compared(
    pipe: Any, family: Family | None, prompts: list[str], compose: int, config: SVDQuantConfig, progress: bool
) -> Callable[[], dict[str, Any]]:  # fmt: skip
    """Draws and judges pictures before quantizing. What is returned does so afterwards, and gives what changed."""
    from mm.quantization.pipeline_calls import preview

    if config.data_free:
        return dict
    before = preview(pipe, prompts, config, "pictures before", progress) if prompts else None
    score = resolve(family.score) if family and family.score and compose else None
    judged = score(pipe, compose) if score else None

    def after() -> dict[str, Any]:
        found: dict[str, Any] = {}
        if before is not None:
            found |= _compare(before, preview(pipe, prompts, config, "pictures after", progress))
            found["prompts"] = prompts
        if score and judged is not None:
            found["compose"] = judged_change(judged, score(pipe, compose))
        return found

    return after


def _check_out(out: Path) -> None:
    """Raises UserError unless `out` is a folder that can be written, empty or with the parts of a stopped run."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a new folder")
    if out.exists() and any(out.iterdir()) and not (out / ".parts").is_dir():
        raise UserError(f"{out} is not empty; choose a new folder, or remove it first")
    check_folder(out)


def _save_report(report: Report, out: Path) -> None:
    """Writes a report and its plot."""
    from mm.quantization.plot import draw

    report.save(out / "report.json")
    plot = BytesIO()
    draw(report).save(plot, "PNG")
    write_bytes(out / "report.png", plot.getvalue())


def _clear(parts: Path, there: bool) -> None:
    """Removes the folder of parts where nothing was done yet, and the one around it unless it was `there` before."""
    if not any(parts.glob("*.safetensors")):
        shutil.rmtree(parts)
        if not there:
            parts.parent.rmdir()


def _prompts(family: Family | None, seed: int) -> list[str]:
    """Calibration prompts of the family; the general ones where it has none of its own."""
    return family.calibration_prompts(32, seed) if family else list(PROMPTS)


def _bring_the_rest(model: str | Path, out: Path) -> None:
    """Copies components that other pipelines of the same folder use, as they are."""
    where = resolve_model(model)
    if not isinstance(where, Path) or model_type(where) is not None:
        return
    bring_the_rest(where, out)


def _mark_of(parts: Path, model: str | Path, config: SVDQuantConfig) -> bytes:
    """The mark of a model and settings. Raises UserError where the parts of an earlier run have another one."""
    mark = json.dumps({"model": str(model), "settings": config.to_dict()}, sort_keys=True)
    file = parts / _MARK
    if file.is_file() and file.read_bytes() != mark.encode():
        raise UserError(f"{parts} belongs to another model or other settings; remove it, or choose another folder")
    return mark.encode()


def _compare(before: Any, after: Any) -> dict[str, Any]:
    squares = (before - after).square().flatten(1).mean(1).clamp_min(1e-10)
    each = [-10 * math.log10(float(s)) for s in squares]
    return {"psnr": sum(each) / len(each), "psnr_each": [round(x, 2) for x in each], "pictures": len(each)}


def judged_change(before: list[bool], after: list[bool], each: int = 2) -> dict[str, Any]:
    """Shares right before and after, and the paired change with its 95 % interval, resampled by prompt."""
    from mm.core.statistics import paired_change

    change, low, high = paired_change(before, after, [i // each for i in range(len(before))])
    shares = {"before": sum(before) / len(before), "after": sum(after) / len(after)}
    return shares | {"change": change, "low": low, "high": high, "pictures": len(before)}
