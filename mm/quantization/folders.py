"""4-bit copies of model folders: what `mm quantize` does, and the 4-bit model of `mm generate --quantized`.

Design choices
- Any diffusers folder or hub name: mm's own pipelines and diffusers' alike, and folders of public unified models. The
  copy is an ordinary folder of the same kind with `report.json` and `report.png` in it.
- Pictures of a few prompts are drawn before and after, from the same seeds; their PSNR is the report's headline. For a
  model of our world the judge also scores tuning prompts before and after, picture by picture.
- Finished layers are kept beside the target until all is done, so that a stopped run goes on where it was.
- The embedded 4-bit model is made once and kept in the user's cache, under the hash of what it was made from: shipping
  it would cost more megabytes than making it costs seconds.

This module does not know how layers are quantized, nor the command line.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.core.errors import UserError
from mm.core.files import write_bytes
from mm.core.paths import resolve_model, unified_type

if TYPE_CHECKING:
    from mm.quantization.config import SVDQuantConfig
    from mm.quantization.report import Report

# For pipelines that know the whole world; ours get sentences of their own grammar.
PROMPTS: tuple[str, ...] = (
    "a lighthouse on a cliff in a storm, oil painting",
    "portrait of an old fisherman, soft window light",
    "a bowl of ramen with steam, food photography",
    "a red bicycle leaning on a stone wall",
    "an astronaut walking through a field of sunflowers",
    "isometric drawing of a small bookshop at night",
    "a hummingbird in flight, macro photograph",
    "snowy mountains behind a quiet lake at dawn",
    "a cat sleeping on a pile of folded laundry",
    "a street market in the rain, neon signs, reflections",
    "watercolor of a sailing boat in a harbour",
    "a chess board made of glass, studio lighting",
    "children's book drawing of a fox and an owl",
    "a steam train crossing a viaduct in autumn",
    "a poster that says HELLO in bold letters",
    "an empty theatre with velvet seats",
)


def world_prompts(count: int, seed: int = 0) -> list[str]:
    """Captions of scenes that training may see, in a seed namespace of their own."""
    from mm.world.captions import caption
    from mm.world.scene import sample_scene

    rng = random.Random(f"calibration {seed}")
    return [caption(sample_scene(rng), rng, detail=rng.choice(("full", "partial"))) for _ in range(count)]


def load_any(model: str | Path, **options: Any) -> Any:
    """A pipeline of ours or of diffusers, by embedded name, folder or hub name."""
    from diffusers import DiffusionPipeline

    from mm import TextToImagePipeline

    where = resolve_model(model)
    if isinstance(where, Path):
        if unified_type(where) is not None:
            return TextToImagePipeline.from_pretrained(where, **options)
        kind = json.loads((where / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
        if kind == TextToImagePipeline.__name__:
            return TextToImagePipeline.from_pretrained(where, **options)
    return DiffusionPipeline.from_pretrained(where, **options)


def quantize_folder(
    model: str | Path,
    out: Path,
    config: SVDQuantConfig,
    *,
    prompts: Sequence[str] | None = None,
    pictures: int = 8,
    compose: int = 4,
    components: Sequence[str] | None = None,
    progress: bool = True,
    variant: str | None = None,
) -> Report:
    """Writes a quantized copy of a model to `out` with its report. Raises UserError when `out` holds something else.

    `pictures`: compared by PSNR; `compose`: prompts of each task judged, where the model draws our world; 0 for none.
    `variant`: of the files that are read, such as "fp16".
    """
    from mm.quantization import sources
    from mm.quantization.pipeline_calls import preview
    from mm.quantization.plot import draw
    from mm.quantization.quantize import quantize

    if out.exists() and any(out.iterdir()) and not (out / ".parts").is_dir():
        raise UserError(f"{out} is not empty; choose a new folder, or remove it first")
    parts = out / ".parts"
    _check_parts(parts, model, config)
    ours = _is_ours(model)
    pipe, stored = sources.load(resolve_model(model), variant, load_any, typed=not ours)
    chosen = list(prompts) if prompts else world_prompts(32, config.seed) if ours else list(PROMPTS)
    shown = chosen[:pictures]
    before = preview(pipe, shown, config, "pictures before", progress) if shown and not config.data_free else None
    judged = verdicts(pipe, compose) if compose and ours and not config.data_free else None
    try:
        report = quantize(
            pipe,
            config,
            calibration=None if config.data_free else chosen,
            components=components,
            progress=progress,
            resume=parts,
            dtypes={name: part.main for name, part in stored.items()},
        )
    except UserError:
        if not any(parts.glob("*.safetensors")):  # nothing was done yet: leave nothing behind
            shutil.rmtree(parts)
        raise
    if before is not None:
        after = preview(pipe, shown, config, "pictures after", progress)
        report.whole |= _compare(before, after) | {"prompts": shown}
    if judged is not None:
        report.whole["compose"] = judged_change(judged, verdicts(pipe, compose))
    sources.as_stored(pipe, stored)
    pipe.save_pretrained(out)
    _bring_the_rest(model, out)
    report.whole["folder_before"] = sum(part.bytes for part in stored.values())
    report.whole["folder_after"] = sources.folder_bytes(out)
    report.save(out / "report.json")
    plot = BytesIO()
    draw(report).save(plot, "PNG")
    write_bytes(out / "report.png", plot.getvalue())
    shutil.rmtree(parts)
    return report


def _bring_the_rest(model: str | Path, out: Path) -> None:
    """Copies components that other pipelines of the same folder use, as they are."""
    where = resolve_model(model)
    if not isinstance(where, Path) or unified_type(where) is not None:
        return
    before, after = (json.loads((f / "model_index.json").read_text(encoding="utf-8")) for f in (where, out))
    missing = {k: x for k, x in before.items() if k not in after and isinstance(x, list) and (where / k).is_dir()}
    for name in missing:
        shutil.copytree(where / name, out / name)
    write_bytes(out / "model_index.json", (json.dumps(after | missing, indent=2) + "\n").encode())


def _check_parts(parts: Path, model: str | Path, config: SVDQuantConfig) -> None:
    """Parts are only gone on with when model and settings are the same."""
    mark = json.dumps({"model": str(model), "settings": config.to_dict()}, sort_keys=True)
    file = parts / "of.json"
    if file.is_file() and file.read_text() != mark:
        raise UserError(f"{parts} belongs to another model or other settings; remove it, or choose another folder")
    parts.mkdir(parents=True, exist_ok=True)
    write_bytes(file, mark.encode())


def _is_ours(model: str | Path) -> bool:
    where = resolve_model(model)
    if not isinstance(where, Path) or unified_type(where) is not None:
        return False
    return json.loads((where / "model_index.json").read_text(encoding="utf-8")).get("_class_name", "") in (
        "TextToImagePipeline",
    )


def _compare(before: Any, after: Any) -> dict[str, Any]:
    squares = (before - after).square().flatten(1).mean(1).clamp_min(1e-10)
    each = [-10 * math.log10(float(s)) for s in squares]
    return {"psnr": sum(each) / len(each), "psnr_each": [round(x, 2) for x in each], "pictures": len(each)}


def verdicts(pipe: Any, limit: int | None = None, each: int = 2) -> list[bool]:
    """The judge's verdicts on `each` pictures of each of `limit` tuning prompts a task (None: of all)."""
    from mm.evaluation import compose as c
    from mm.evaluation.prompts import COMPOSE_TUNE, load_prompts
    from mm.world.judge import Judge
    from mm.world.tasks import satisfies

    pipe.set_progress_bar_config(disable=True)
    prompts = c.limited(load_prompts(COMPOSE_TUNE), limit)
    jobs = [(p, c.picture_seed(0, p.id, i)) for p in prompts for i in range(each)]
    readings = Judge.from_pretrained().read(c.draw(pipe, jobs, c.ComposeConfig(), None))
    return [satisfies(r, p.wanted).ok for r, (p, _) in zip(readings, jobs, strict=True)]


def judged_change(before: list[bool], after: list[bool], each: int = 2) -> dict[str, Any]:
    """Shares right before and after, and the paired change with its 95 % interval, resampled by prompt."""
    from mm.core.statistics import paired_change

    change, low, high = paired_change(before, after, [i // each for i in range(len(before))])
    shares = {"before": sum(before) / len(before), "after": sum(after) / len(after)}
    return shares | {"change": change, "low": low, "high": high, "pictures": len(before)}


def cache_dir() -> Path:
    """Where things are kept that can be made again: MM_CACHE, or the user's cache folder."""
    base = os.environ.get("MM_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mm")
    return Path(base).expanduser()


def quantized_copy(model: str | Path, config: SVDQuantConfig | None = None, *, progress: bool = True) -> Path:
    """The folder of a model's 4-bit copy in the cache, made now if it is not there."""
    from mm.quantization.config import SVDQuantConfig

    where = resolve_model(model)
    if not isinstance(where, Path):
        raise UserError(f"--quantized makes a 4-bit copy of a local model; quantize {model!r} with `mm quantize` first")
    config = config or SVDQuantConfig()
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for path in sorted(where.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    folder = cache_dir() / "quantized" / f"{where.name}-{digest.hexdigest()[:16]}"
    if not (folder / "report.json").is_file():
        quantize_folder(model, folder, config, progress=progress, pictures=0, compose=0)
    return folder
