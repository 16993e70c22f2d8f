"""The enlarger stage: `mm train mm-tiny --stage enlarger --init-from weights/mm-tiny`.

Design choices
- Encoder, latents and decoder stay as they are; the enlarger alone is trained, on the decoder's features. So pictures
  of the trained side do not change.
- It learns from renders at twice the side. Latents are those of the same scenes at the trained side, with a little
  noise.
- Reconstruction and the strength of edges are those of the crisp stage (`mm.training.crisp_losses`).

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm.core.errors import UserError
from mm.evaluation.reconstruct import save_grid
from mm.tokenizers import Autoencoder
from mm.training.crisp_losses import edge_loss, gradient_energy
from mm.training.publishing import publish
from mm.training.stage import Stage, StageContext
from mm.training.tokenizer_data import held_out_scenes, reconstruction_loss
from mm.world.render import render
from mm.world.scene import sample_scene
from mm.world.vocabulary import STYLES

PREVIEWED = 8  # held-out renders of each style


@dataclass(frozen=True, kw_only=True)
class EnlargerConfig:
    """Settings of the stage.

    Attributes:
        width: Channels of the enlarger, where the autoencoder has none yet.
        noise: Largest deviation of the noise on latents.
        edge_weight: Of the error of edges' local strength.
    """

    width: int = 24
    noise: float = 0.12
    edge_weight: float = 0.5

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError(f"width is {self.width}; give 1 or more")
        for name in ("noise", "edge_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; give 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class EnlargerBatch:
    """The decoder's picture and features of scenes, and the renders (B, 3, 2 H, 2 W) in [-1, 1] that are wanted."""

    picture_BCHW: Tensor
    features_BCHW: Tensor
    wanted_BCHW: Tensor


class Enlarge(nn.Module):
    """The enlarger with its losses."""

    def __init__(self, autoencoder: Autoencoder, config: EnlargerConfig) -> None:
        super().__init__()
        assert autoencoder.enlarger is not None
        self.config, self.enlarger = config, autoencoder.enlarger
        self._frozen = [autoencoder]  # in a list, so that its parameters are none of this module's

    def forward(self, batch: EnlargerBatch) -> dict[str, Tensor]:
        """Weighted losses. `_sharp`: gradient energy as a share of the renders'."""
        written = self._frozen[0].enlarged(batch.picture_BCHW, batch.features_BCHW).float()
        wanted = batch.wanted_BCHW
        return {
            "pixels": reconstruction_loss(written, wanted, 0.5),
            "edges": self.config.edge_weight * edge_loss(written, wanted),
            "_sharp": gradient_energy(written.detach()).mean() / gradient_energy(wanted).mean(),
        }


def stage(context: StageContext) -> Stage:
    """The enlarger of the published autoencoder, fresh or trained on."""
    config, settings = context.trainer_config("enlarger"), context.settings(EnlargerConfig, "enlarger")
    autoencoder = with_enlarger(context.load(Autoencoder, "autoencoder").float(), settings.width)
    for part in (autoencoder.encoder, autoencoder.decoder):
        part.requires_grad_(False)

    def batches(step: int, process: int) -> EnlargerBatch:
        return batch_of(
            autoencoder, random.Random(f"enlarger {config.seed} {step} {process}"), config.batch_size, settings
        )

    def evaluate(trainer: Any) -> dict[str, float]:
        publish(autoencoder, context.published / "autoencoder")
        return enlargements(autoencoder, trainer.out)

    return Stage(
        name="enlarger", module=Enlarge(autoencoder, settings), batches=batches, evaluate=evaluate, config=config
    )


def with_enlarger(autoencoder: Autoencoder, width: int) -> Autoencoder:
    """The same autoencoder with an enlarger; one that has any is returned as it is."""
    if autoencoder.enlarger is not None:
        return autoencoder
    known: dict[str, Any] = {key: value for key, value in autoencoder.config.items() if not key.startswith("_")}
    known["enlarger_width"] = width
    made: Any = Autoencoder(**known)
    made = made.to(autoencoder.dtype).eval()
    lost = made.load_state_dict(autoencoder.state_dict(), strict=False)
    if lost.unexpected_keys or any(not key.startswith("enlarger.") for key in lost.missing_keys):
        raise UserError(f"the autoencoder lacks {(lost.missing_keys + lost.unexpected_keys)[0]}")
    return made


@torch.no_grad()
def batch_of(autoencoder: Autoencoder, rng: random.Random, size: int, config: EnlargerConfig) -> EnlargerBatch:
    """Random scenes, rendered at both sides and encoded."""
    scenes = [sample_scene(rng, default_weight=8) for _ in range(size)]
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    latents = autoencoder.encode(render(scenes).float() / 127.5 - 1).float()
    level_B111 = config.noise * torch.rand(size, 1, 1, 1, generator=generator)
    with torch.autocast(latents.device.type, torch.bfloat16):
        picture, features = autoencoder.features(latents + level_B111 * torch.randn(latents.shape, generator=generator))
    wanted = render(scenes, scale=2).float() / 127.5 - 1
    return EnlargerBatch(picture_BCHW=picture.float(), features_BCHW=features.float(), wanted_BCHW=wanted)


@torch.no_grad()
def enlargements(autoencoder: Autoencoder, out: Path) -> dict[str, float]:
    """Of held-out renders: PSNR in dB at twice the side, that of the plain picture enlarged, and sharpness.

    Writes a sheet `preview.png` of renders, plain pictures and enlarged ones.
    """
    found: dict[str, list[Tensor]] = {"psnr": [], "psnr_plain": [], "sharp": [], "sharp_plain": []}
    rows = {}
    for style in STYLES:
        scenes = held_out_scenes(style, PREVIEWED)
        target = render(scenes, scale=2).float()
        latents = autoencoder.encode((render(scenes).float() / 127.5 - 1).to(autoencoder.device))
        large = _bytes(autoencoder.decode(latents, scale=2))
        plain = F.interpolate(_bytes(autoencoder.decode(latents)), scale_factor=2, mode="bicubic").clamp(0, 255)
        for name, made in (("", large), ("_plain", plain)):
            found["psnr" + name].append(10 * torch.log10(255**2 / (made - target).square().mean((1, 2, 3))).mean())
            found["sharp" + name].append(gradient_energy(made).mean() / gradient_energy(target).mean())
        rows[style] = [target.byte(), plain.round().byte(), large.byte()]
    save_grid(rows, out / "preview.png")
    return {name: float(torch.stack(values).mean()) for name, values in found.items()}


def _bytes(pictures_BCHW: Tensor) -> Tensor:
    return ((pictures_BCHW.float().cpu() + 1) * 127.5).round().clamp(0, 255)
