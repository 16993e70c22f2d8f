"""Same seed, same picture: how far pictures of a batch differ from the same pictures drawn alone, and what that costs.

    python benchmarks/batch_invariance.py --json runs/batch-invariance.json

For 16 and for 4 bits: the largest difference of a pixel (of 255) between a batch of 8 and single calls, the share of
pictures that differ by more than 2, and the seconds of the batch call over those of drawing the batch at once. For 4
bits "at once" is measured too, with the rule of `mm.pipelines.batch_parts` taken out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import mm
from mm.core.files import write_json
from mm.pipelines import text_to_image

BATCH = 8


def draw(pipe: Any, prompts: list[str], first: int) -> tuple[torch.Tensor, float]:
    """Pictures (B, 3, H, W) in [0, 255], and seconds."""
    generators = [torch.Generator().manual_seed(first + k) for k in range(len(prompts))]
    started = time.perf_counter()
    images = pipe(prompts, generator=generators, output_type="pt").images
    return torch.as_tensor(images) * 255, time.perf_counter() - started


def compare(pipe: Any, prompts: list[str]) -> dict[str, float]:
    """Differences and seconds over all prompts, in batches of `BATCH`."""
    worst, over, together, alone = 0.0, 0, 0.0, 0.0
    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        batch, seconds = draw(pipe, some, start)
        together += seconds
        for k, prompt in enumerate(some):
            single, seconds = draw(pipe, [prompt], start + k)
            alone += seconds
            difference = float((single[0] - batch[k]).abs().max())
            worst, over = max(worst, difference), over + (difference > 2)
    return {"largest": round(worst, 3), "pictures_over_2": over, "batch_seconds": together, "single_seconds": alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--model", default="mm-tiny")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from mm.families import family_named

    prompts = family_named("mm-tiny").calibration_prompts(options.prompts, 1)
    pipe = mm.TextToImagePipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    rows = {"16 bits": compare(pipe, prompts)}
    mm.quantize(pipe, mm.SVDQuantConfig(data_free=True), progress=False)
    rows["4 bits"] = compare(pipe, prompts)
    rule = text_to_image.parts_of
    text_to_image.parts_of = lambda pipe, pictures: [slice(0, pictures)]
    rows["4 bits, at once"] = compare(pipe, prompts)
    text_to_image.parts_of = rule
    print("| weights | largest difference of 255 | pictures over 2 | batch of 8 / single calls, seconds |")
    print("|---|---|---|---|")
    for name, row in rows.items():
        ratio = row["batch_seconds"] / row["single_seconds"]
        print(f"| {name} | {row['largest']:g} | {row['pictures_over_2']} of {len(prompts)} | {ratio:.2f} |")
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
