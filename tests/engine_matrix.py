"""The cells of docs/matrix.md: what the engine does with tiny pipelines of public families.

benchmarks/matrix.py writes the page, tests/engine/test_matrix.py runs the same cells.

A cell is a function of a family's `Model`; it returns nothing where it works, and the reason in one line where the
family or diffusers does not have it. Anything that is wrong raises.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_pipelines import SIDE, options_of, source_picture, tiny_pipeline_of

import mm
from mm.batch import run_jobs
from mm.engine.events import Picture
from mm.engine.facts import UNUSABLE
from mm.engine.requests import Draw, Edit
from mm.layers.linear import BranchedLinear
from mm.quantization.folders import quantize_folder

BOUND = 2  # of 255, between batch sizes
NO_TEXT = "the model only changes pictures"
NO_PICTURE = "diffusers has no such pipeline for the family"
NO_WEIGHTS = "needs other weights of the family, made for this task"
NO_LORA = "no linear layer of the denoiser is wide enough"


class Model:
    """A family's tiny pipeline in a folder, its 4-bit copy and a LoRA for it, each made when first asked for."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.root = name, folder
        self.options = options_of(name)

    @cached_property
    def folder(self) -> Path:
        tiny_pipeline_of(self.name).save_pretrained(self.root / "plain")
        return self.root / "plain"

    @cached_property
    def engine(self) -> Any:
        return mm.load(self.folder, dtype="float32")

    @cached_property
    def small(self) -> Path:
        """Its 4-bit copy."""
        config = mm.SVDQuantConfig(rank=4, data_free=True)
        quantize_folder(self.folder, self.root / "small", config, pictures=0, compose=0, progress=False)
        return self.root / "small"

    @cached_property
    def small_engine(self) -> Any:
        return mm.load(self.small, dtype="float32")

    @cached_property
    def lora(self) -> tuple[Path, int]:
        """A LoRA in peft's names for the attention of the denoiser, and its number of layers."""
        part = "unet" if "unet" in self.engine.pipeline.components else "transformer"
        generator, tensors = torch.Generator().manual_seed(1), {}
        layers = [
            (path, layer)
            for path, layer in getattr(self.engine.pipeline, part).named_modules()
            if isinstance(layer, torch.nn.Linear) and path.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))
        ]
        for path, layer in layers:
            down, up = (4, layer.in_features), (layer.out_features, 4)
            tensors[f"{part}.{path}.lora_A.weight"] = torch.randn(down, generator=generator)
            tensors[f"{part}.{path}.lora_B.weight"] = torch.randn(up, generator=generator)
        path = self.root / "style.safetensors"
        save_file(tensors, path)
        return path, len(layers)

    def request(self, **more: Any) -> Any:
        """What draws a picture with this model: from text, from a picture, or by an instruction."""
        tasks, common = self.engine.capabilities.tasks, {"seed": 5, "steps": 2, "options": self.options}
        if "draw" in tasks:
            return Draw(**({"prompt": "a red fox", "size": (SIDE, SIDE)} | common | more))
        if "edit" in tasks:
            return Edit(image=source_picture(), instruction="a red fox", **(common | more))
        return Draw(**({"prompt": "a red fox", "image": source_picture(), "mask": mask()} | common | more))


def mask() -> Image.Image:
    """White in the right half."""
    made = Image.new("L", (SIDE, SIDE))
    made.paste(255, (SIDE // 2, 0, SIDE, SIDE))
    return made


def drawn(engine: Any, *requests: Any, batch_size: int = 1) -> list[np.ndarray]:
    """The pictures of requests, as whole numbers."""
    events = engine.run_all(requests, batch_size=batch_size)
    made = {event.index: np.asarray(event.picture).astype(int) for event in events if isinstance(event, Picture)}
    return [made[k] for k in sorted(made)]


def apart(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of two pictures."""
    return int(abs(one - other).max())


def generate(model: Model) -> str | None:
    """Draws, and draws the same again."""
    one, again = (drawn(model.engine, model.request())[0] for _ in range(2))
    assert apart(one, again) == 0
    return None


def four_bits(model: Model) -> str | None:
    """Draws with a 4-bit copy that was written and loaded again, with the same bits at any batch size."""
    layers = [m for part in model.small_engine.pipeline.components.values() if isinstance(part, torch.nn.Module)
              for m in part.modules() if isinstance(m, BranchedLinear) and m.bits == 4]  # fmt: skip
    assert len(layers) >= 8
    alone = [drawn(model.small_engine, model.request(seed=5 + k))[0] for k in range(3)]
    together = drawn(model.small_engine, model.request(count=3), batch_size=3)
    assert all(apart(one, other) == 0 for one, other in zip(alone, together, strict=True))
    assert apart(alone[0], drawn(model.engine, model.request())[0]) > 0
    return None


def batch(model: Model) -> str | None:
    """Rows through `mm batch`, with the same pictures as alone at batch 1, 3 and 8."""
    tasks = model.engine.capabilities.tasks
    if not {"draw", "inpaint"} & set(tasks):
        return NO_TEXT
    texts = ("a fox", "two cats at night", "x", "a fox")
    common = {"steps": 2, "size": [SIDE, SIDE], "options": model.options}
    given = {}
    if "draw" not in tasks:
        given = {"image": source_picture(), "mask": mask()}
        for name, picture in given.items():
            picture.save(model.root / f"{name}.png")
            common[name] = f"{name}.png"
    bodies = [{"prompt": text, "seed": k, **common} for k, text in enumerate(texts)]
    rows = [{"custom_id": str(k), "task": "generate", "body": body} for k, body in enumerate(bodies)]
    jobs = model.root / "jobs.jsonl"
    jobs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load = lambda _: model.engine  # noqa: E731
    for size in (1, 3, 8):
        out = model.root / f"batch-{size}"
        report = run_jobs(jobs, out, model=str(model.folder), batch_size=size, load=load)
        assert (report.drawn, report.failed) == (len(rows), 0), report.errors
        for k, body in enumerate(bodies):
            (path,) = out.glob(f"00000/*-{k}-0-*.png")
            request = Draw(prompt=body["prompt"], seed=k, steps=2, size=(SIDE, SIDE), options=model.options, **given)
            alone = drawn(model.engine, request)[0]
            assert apart(np.asarray(Image.open(path)).astype(int), alone) <= BOUND
    return None


def _lora(model: Model, engine: Any) -> str | None:
    path, layers = model.lora
    if not layers:
        return NO_LORA
    before = drawn(engine, model.request())[0]
    lines = engine.set_adapters([(path, 0.8)])
    try:
        assert lines == [f"style.safetensors: {layers} of {layers} layers, scale 0.8"]
        assert apart(before, drawn(engine, model.request())[0]) > 0
    finally:
        engine.set_adapters([])
    assert apart(before, drawn(engine, model.request())[0]) == 0
    return None


def lora(model: Model) -> str | None:
    """A LoRA at 16 bits: all its layers, another picture, and off again."""
    return _lora(model, model.engine)


def lora_four_bits(model: Model) -> str | None:
    """The same file on the 4-bit copy."""
    return _lora(model, model.small_engine)


def image_to_image(model: Model) -> str | None:
    """A picture from a picture."""
    if "image_to_image" not in model.engine.capabilities.tasks:
        return NO_PICTURE
    options = {"image": source_picture(), "strength": 0.6, "size": None, "steps": 4}
    if model.name == "sana-sprint":
        options["steps"] = 2  # the consistency scheduler takes no others
    requests = [Draw(**(vars(model.request()) | options | {"seed": 5 + k})) for k in range(2)]
    alone = [drawn(model.engine, request)[0] for request in requests]
    assert all(apart(a, b) == 0 for a, b in zip(alone, drawn(model.engine, *requests, batch_size=2), strict=True))
    return None


def inpaint(model: Model) -> str | None:
    """A part of a picture drawn anew."""
    if "inpaint" not in model.engine.capabilities.tasks:
        family = mm.families.family_of(model.engine.pipeline)
        return UNUSABLE.get(family.pipelines.get("inpaint", ""), NO_PICTURE)
    request = Draw(prompt="a fox", image=source_picture(), mask=mask(), seed=5, steps=2, options=model.options)
    assert drawn(model.engine, request)[0].shape == (SIDE, SIDE, 3)
    return None


def edit(model: Model) -> str | None:
    """A picture changed by an instruction."""
    if "edit" not in model.engine.capabilities.tasks:
        family = mm.families.family_of(model.engine.pipeline)
        return NO_WEIGHTS if "edit" in family.pipelines else NO_PICTURE
    side = 64 if model.name.startswith("flux-2") else SIDE  # FLUX.2 takes no smaller sources
    source = source_picture().resize((side, side))
    request = Edit(image=source, instruction="a fox", seed=5, steps=2, size=(side, side), options=model.options)
    assert drawn(model.engine, request)[0].shape == (side, side, 3)
    return None


CELLS: dict[str, Callable[[Model], str | None]] = {
    "generate": generate,
    "generate --bits 4": four_bits,
    "batch": batch,
    "--lora": lora,
    "--lora, 4 bits": lora_four_bits,
    "--image": image_to_image,
    "--image --mask": inpaint,
    "edit": edit,
}
