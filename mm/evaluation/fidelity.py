"""`mm eval fidelity`: how sharp drawn pictures are beside renders, and how far the two lie apart.

Design choices
- Sharpness is the gradient energy (the mean squared difference of neighbouring pixels) of drawn pictures as a share of
  that of renders of the same prompts. Noise has gradients too, so the second figure stands beside it.
- The Frechet distance between two Gaussians (Dowson and Landau 1982), fitted to the judge's features of drawn pictures
  and of renders. It is not the FID, whose network is another one. Its floor is that between two sets of renders.
- Both are reported for what the tokenizer leaves of the same renders as well: what no drawing can be expected to beat.
- Intervals come from resampling prompts (bootstrap, 95 %).

Legend: B pictures, C channels, H height, W width, D features.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mm.evaluation.compose import ComposeConfig, ProgressCallback, draw, limited, picture_seed, reconstruct, true_scene
from mm.evaluation.prompts import COMPOSE, load_prompts
from mm.evaluation.report import grid_png, write_report
from mm.world.judge import Judge
from mm.world.render import render

DRAWS = 500  # of the bootstrap
_CHUNK = 64


def gradient_energy(pictures_BCHW: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of neighbouring pixels, across and down, of each picture (B,), in units of full scale.

    Args:
        pictures_BCHW: uint8 pictures.
    """
    x_BCHW = pictures_BCHW.float() / 255
    across, down = x_BCHW[..., 1:] - x_BCHW[..., :-1], x_BCHW[..., 1:, :] - x_BCHW[..., :-1, :]
    return across.square().mean((1, 2, 3)) + down.square().mean((1, 2, 3))


@torch.no_grad()
def judge_features(judge: Judge, pictures_BCHW: torch.Tensor) -> torch.Tensor:
    """The judge's last features (B, D) of whole uint8 pictures, from which it reads background and style."""
    found: list[torch.Tensor] = []
    hook = judge.pooled.register_forward_hook(lambda _module, _inputs, output: found.append(output.float().cpu()))
    try:
        where = judge.whole.weight.device
        for part in pictures_BCHW.split(_CHUNK):
            judge(part.to(where).float() / 255)
    finally:
        hook.remove()
    return torch.cat(found)


def frechet_distance(first_BD: torch.Tensor, second_BD: torch.Tensor) -> float:
    """The squared Frechet distance between Gaussians with the samples' means and covariances.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the last trace by the eigenvalues of S1^(1/2) S2 S1^(1/2).
    """
    means, covariances = [], []
    for sample in (first_BD.double(), second_BD.double()):
        means.append(sample.mean(0))
        covariances.append(torch.cov(sample.T))
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp_min(0).sqrt().sum()
    apart = (means[0] - means[1]).square().sum()
    return float(apart + covariances[0].trace() + covariances[1].trace() - 2 * cross)


def sharpness(drawn_B: torch.Tensor, true_B: torch.Tensor, clusters: Sequence[int]) -> dict[str, Any]:
    """Mean gradient energy as a share of the renders', with its interval from resampling clusters (prompts)."""
    names = torch.tensor(clusters)
    rows = [torch.nonzero(names == name).flatten() for name in names.unique()]
    sums = torch.stack([torch.stack([drawn_B[r].sum(), true_B[r].sum()]) for r in rows])
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(sums), (DRAWS, len(sums)), generator=generator)
    totals = sums[picks].sum(1)
    low, high = (totals[:, 0] / totals[:, 1]).quantile(torch.tensor([0.025, 0.975])).tolist()
    score = float(drawn_B.sum() / true_B.sum())
    return {"score": round(score, 4), "n": len(drawn_B), "low": round(low, 4), "high": round(high, 4)}


def evaluate_fidelity(
    pipe: Any,
    judge: Judge,
    config: ComposeConfig,
    *,
    prompts: str | Path = COMPOSE,
    json_file: Path | None = None,
    settings: dict[str, Any] | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Draws, compares with renders, and reports; with `json_file`, writes it and a sheet beside it.

    Returns:
        `overall` is the sharpness; `tasks` are those of styles; `frechet`, `frechet_reconstructed` and `frechet_floor`
        the squared distances; `reconstructed` the sharpness of what the tokenizer leaves of renders.
    """
    chosen = limited(load_prompts(prompts), config.limit)
    jobs = [(p, picture_seed(config.seed, p.id, i)) for p in chosen for i in range(config.pictures)]
    scenes = [true_scene(prompt, seed) for prompt, seed in jobs]
    others = [true_scene(prompt, seed + 1) for prompt, seed in jobs]
    true, floor = render(scenes), render(others)
    pictures = draw(pipe, jobs, config, progress)
    return compared(
        pictures, reconstruct(pipe, true, config.mode), true, floor, judge,
        clusters=[i for i in range(len(chosen)) for _ in range(config.pictures)],
        styles=[scene.style for scene in scenes],
        labels=[prompt.text for prompt, _ in jobs],
        json_file=json_file,
        settings=asdict(config) | {"prompts": str(prompts)} | (settings or {}),
    )  # fmt: skip


def compared(
    drawn: torch.Tensor,
    reconstructed: torch.Tensor,
    true: torch.Tensor,
    floor: torch.Tensor,
    judge: Judge,
    *,
    clusters: Sequence[int],
    styles: Sequence[str],
    labels: Sequence[str],
    json_file: Path | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The report of pictures (B, 3, H, W) that were drawn already, beside reconstructions and two sets of renders."""
    energies = [gradient_energy(x) for x in (drawn, reconstructed, true)]
    tasks = {}
    for style in dict.fromkeys(styles):
        here = [i for i, name in enumerate(styles) if name == style]
        tasks[style] = sharpness(energies[0][here], energies[2][here], [clusters[i] for i in here])
    features = [judge_features(judge, x) for x in (drawn, reconstructed, floor, true)]
    distances = [round(frechet_distance(x, features[3]), 4) for x in features[:3]]
    whole = sharpness(energies[0], energies[2], clusters)
    report = {
        "overall": whole["score"],
        "ceiling": 1.0,
        "n": len(drawn),
        "low": whole["low"],
        "high": whole["high"],
        "reconstructed": sharpness(energies[1], energies[2], clusters),
        "tasks": tasks,
        **dict(zip(("frechet", "frechet_reconstructed", "frechet_floor"), distances, strict=True)),
        "settings": settings | {"metric": "gradient energy as a share of renders'"},
    }
    if json_file is not None:
        shown = sorted(random.Random("fidelity").sample(range(len(drawn)), min(24, len(drawn))))
        sheet = torch.stack([x for i in shown for x in (drawn[i], true[i])])
        names = [labels[i] for i in shown for _ in range(2)]
        write_report(json_file, report, grid_png(sheet, names, [None] * len(sheet)))
    return report
