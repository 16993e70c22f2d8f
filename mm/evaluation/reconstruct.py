"""`mm eval reconstruct`: how much of a picture each tokenizer in a folder keeps, and at how many bits.

Design choices
- Whatever lies in the folder is measured: autoencoders, each with the bridges beside it, and quantized tokenizers. A
  Gaussian bridge is measured next to every autoencoder, since it needs no weights: so the table shows which
  bins are better.
- Held-out renders in a seed namespace of their own, the same number in every style; the mean is over styles.
- Reconstructions are rounded to bytes first: that is what a user can save.
- PSNR and SSIM per picture (torchmetrics), then averaged; intervals are 95 % of the mean, by the pictures' deviation.
- There is no ceiling: a perfect tokenizer has an infinite PSNR, so the field is null.

Legend: B batch, C channels, H height, W width, N pictures.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.core.errors import UserError
from mm.core.files import write_bytes
from mm.core.picture_metrics import psnr
from mm.core.safe_json import read_object
from mm.evaluation.report import write_report
from mm.tokenizers.bridge import Bridge
from mm.world.render import render
from mm.world.scene import sample_scene
from mm.world.vocabulary import STYLES

PICTURES_PER_STYLE = 256
_CHUNK = 32


def _through(model: Any, bridge: Bridge, images_BCHW: Tensor) -> Tensor:
    """Pictures by way of their codes."""
    return model.decode(bridge(model.encode(images_BCHW)))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One line of the table: pictures in [-1, 1] to their reconstructions, at a price."""

    name: str
    reconstruct: Callable[[Tensor], Tensor]
    bits: float


def held_out_renders(style: str, count: int, seed: int) -> Tensor:
    """Pictures (N, 3, H, W) as bytes in one style, from scenes that no training run draws."""
    scenes = [sample_scene(random.Random(f"reconstruct-{seed}-{style}-{i}")) for i in range(count)]
    return render([replace(scene, style=style) for scene in scenes])


def find_tokenizers(folder: Path, device: str = "cpu") -> Iterator[Candidate]:
    """Every tokenizer in a folder and its subfolders, loaded one after the other."""
    bridges = [path for path, kind in _saved(folder) if kind == "Bridge"]
    for path, kind in _saved(folder):
        if kind == "Autoencoder":
            yield from _autoencoder_lines(path, [b for b in bridges if b.parent == path.parent], device)
        elif kind == "QuantizedTokenizer":
            from mm.tokenizers.quantized import QuantizedTokenizer

            model = _ready(QuantizedTokenizer, path, device)
            name = f"{path.name} ({model.config.kind}, {model.groups} x {model.levels})"
            yield Candidate(name=name, reconstruct=model, bits=model.bits_per_picture())


def _saved(folder: Path) -> list[tuple[Path, str]]:
    """Folders that hold a saved component, and its class name."""
    found = []
    for config in sorted(folder.glob("**/config.json")):
        kind = read_object(config).get("_class_name")
        found.append((config.parent, str(kind)))
    return found


def _ready(kind: Any, path: Path, device: str) -> Any:
    return kind.from_pretrained(path).to(device).eval()


def _autoencoder_lines(path: Path, bridges: list[Path], device: str) -> Iterator[Candidate]:
    from mm.tokenizers.autoencoder import Autoencoder

    model = _ready(Autoencoder, path, device)
    yield Candidate(name=path.name, reconstruct=model, bits=model.bits_per_picture())
    saved = [_ready(Bridge, bridge, device) for bridge in bridges]
    gaussian: Any = Bridge(channels=model.config.latent_channels)
    gaussian.to(device)
    for bridge in [*saved, *([gaussian] if all(b.config.bins != "gaussian" for b in saved) else [])]:
        name = f"{path.name} + bridge ({bridge.config.bins}, {bridge.config.levels} levels)"
        yield Candidate(
            name=name,
            reconstruct=partial(_through, model, bridge),
            bits=bridge.bits_per_picture(),
        )


@torch.inference_mode()
def measure(candidate: Candidate, pictures_u8: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """PSNR (N), SSIM (N) and the reconstructions as bytes."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    quality, ssim, outputs = [], [], []
    for chunk in pictures_u8.split(_CHUNK):
        output = ((candidate.reconstruct(chunk.float() / 127.5 - 1).float() + 1) * 127.5).round().clamp(0, 255)
        target = chunk.float()
        quality.append(psnr(output, target, data_range=255.0))
        ssim.append(structural_similarity_index_measure(output, target, data_range=255.0, reduction="none"))
        outputs.append(output.to(torch.uint8))
    return torch.cat(quality), torch.cat([torch.as_tensor(s) for s in ssim]), torch.cat(outputs)


def _summary(values_N: Tensor) -> dict[str, float | int]:
    """Mean, number and 95 % interval."""
    mean = values_N.mean().item()
    half = 1.96 * values_N.std().item() / len(values_N) ** 0.5 if len(values_N) > 1 else 0.0
    return {"score": round(mean, 3), "n": len(values_N), "low": round(mean - half, 3), "high": round(mean + half, 3)}


def evaluate_reconstruct(
    model: str | Path,
    *,
    extra: str | Path | None = None,
    seed: int = 0,
    limit: int | None = None,
    json_file: Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """PSNR, SSIM and bits of every tokenizer in the folders `model` and `extra`; `limit` is pictures per style.

    `overall` is the mean PSNR of the first tokenizer (the autoencoder that draws). With `json_file`, writes the report
    and a grid PNG beside it: originals above each tokenizer's reconstructions, a block per style.
    """
    folder, count = Path(model), limit or PICTURES_PER_STYLE
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; give at least 1 picture per style")
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give one that holds tokenizers")
    pictures = {style: held_out_renders(style, count, seed).to(device) for style in STYLES}
    rows = {style: [sample[:8]] for style, sample in pictures.items()}
    tasks: dict[str, dict[str, Any]] = {}
    for place in [folder] if extra is None else [folder, Path(extra)]:
        for candidate in find_tokenizers(place, device):
            tasks[candidate.name] = _line(candidate, pictures, rows)
    if not tasks:
        raise UserError(f"{folder} holds no tokenizer (no config.json of an autoencoder or a quantized tokenizer)")
    first = next(iter(tasks.values()))
    settings = {"model": str(model), "seed": seed, "pictures_per_style": count, "metric": "PSNR in dB"}
    report = {"overall": first["score"], "ceiling": None, "n": first["n"], "tasks": tasks, "settings": settings}
    if json_file is not None:
        write_report(json_file, report, _png(rows))
    return report


def _line(candidate: Candidate, pictures: dict[str, Tensor], rows: dict[str, list[Tensor]]) -> dict[str, Any]:
    """One tokenizer's entry in `tasks`; its first reconstructions are added to `rows`."""
    all_psnr, all_ssim, styles = [], [], {}
    for style, sample in pictures.items():
        quality, ssim, output = measure(candidate, sample)
        rows[style].append(output[:8])
        all_psnr.append(quality)
        all_ssim.append(ssim)
        styles[style] = {**_summary(quality), "ssim": round(ssim.mean().item(), 4)}
    ssim_mean = round(torch.cat(all_ssim).mean().item(), 4)
    return {**_summary(torch.cat(all_psnr)), "ssim": ssim_mean, "bits": candidate.bits, "styles": styles}


def save_grid(rows: dict[str, list[Tensor]], path: Path) -> None:
    """Writes originals and reconstructions, one block of rows per style; a file that is there is replaced."""
    write_bytes(path, _png(rows))


def _png(rows: dict[str, list[Tensor]]) -> bytes:
    import io

    from PIL import Image

    strips = [torch.cat(list(strip), 2) for block in rows.values() for strip in block]
    width = max(strip.shape[2] for strip in strips)
    sheet = torch.cat([torch.nn.functional.pad(strip, (0, width - strip.shape[2])) for strip in strips], 1)
    buffer = io.BytesIO()
    Image.fromarray(sheet.permute(1, 2, 0).cpu().contiguous().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
