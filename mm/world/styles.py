"""The eight styles and six backgrounds, as plain torch over batches of pictures.

Design choices
- Every style is a fixed function of the picture: no noise per pixel, so that equal scenes give equal pictures.
- Tiles and grids are 4 or 16 pixels wide and start at the corner, aligned with the f16 latents.
- Pictures of twice the side (`scale` 2) show the same with more detail: tiles, lines and blurs are as much larger.
- Styles that lose the ground (sketch, neon, blueprint) draw lines from the sprites alone.
- No background holds anything similar to an object (night has no stars, no moon; grass has no trees).

Legend: B batch, C channels, H = W = 128 times `scale`. Pictures are float in [0, 1].
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from mm.world import vocabulary as v

_LUMA = (0.299, 0.587, 0.114)


def luma(rgb_BCHW: torch.Tensor) -> torch.Tensor:
    """Brightness (B, 1, H, W)."""
    weights = rgb_BCHW.new_tensor(_LUMA).view(1, 3, 1, 1)
    return (rgb_BCHW * weights).sum(1, keepdim=True)


@lru_cache(maxsize=4)
def backgrounds(device: str = "cpu", scale: int = 1) -> torch.Tensor:
    """All backgrounds (6, 3, H, W), in the order of `BACKGROUNDS`."""
    side = scale * v.SIZE
    y = torch.linspace(0, 1, side).view(1, -1, 1)
    x = torch.linspace(0, 1, side).view(1, 1, -1)
    makers = {"sky": _sky, "night": _night, "grass": _grass, "beach": _beach, "snow": _snow, "plain": _plain}
    return torch.stack([makers[name](x, y).clamp(0, 1).expand(3, side, side) for name in v.BACKGROUNDS]).to(device)


def _colour(*rgb: float) -> torch.Tensor:
    return torch.tensor(rgb).view(3, 1, 1)


def _ramp(y: torch.Tensor, top: torch.Tensor, bottom: torch.Tensor) -> torch.Tensor:
    return top + (bottom - top) * y


def _over(base: torch.Tensor, mask: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    return base + (top - base) * mask


def _blob(x: torch.Tensor, y: torch.Tensor, cx: float, cy: float, rx: float, ry: float) -> torch.Tensor:
    return torch.sigmoid(6 * (1 - ((x - cx) / rx) ** 2 - ((y - cy) / ry) ** 2))


def _sky(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    base = _ramp(y, _colour(0.36, 0.68, 0.96), _colour(0.74, 0.90, 1.0))
    for cx, cy, rx in ((0.22, 0.18, 0.2), (0.75, 0.42, 0.24), (0.3, 0.78, 0.22)):
        base = _over(base, _blob(x, y, cx, cy, rx, 0.07), _colour(1, 1, 1))
    return base


def _night(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    base = _ramp(y, _colour(0.03, 0.03, 0.14), _colour(0.12, 0.13, 0.34))
    ground = torch.sigmoid(60 * (y - 0.86 - 0.03 * torch.sin(9 * x)))
    return _over(base, ground, _colour(0.05, 0.09, 0.12))


def _grass(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    base = _ramp(y, _colour(0.72, 0.90, 0.98), _colour(0.80, 0.94, 0.98))
    field = _ramp(y, _colour(0.60, 0.84, 0.36), _colour(0.36, 0.66, 0.20))
    return _over(base, torch.sigmoid(60 * (y - 0.3 - 0.02 * torch.sin(7 * x))), field)


def _beach(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    base = _ramp(y, _colour(0.70, 0.90, 1.0), _colour(0.90, 0.97, 1.0))
    sea = torch.sigmoid(80 * (y - 0.28))
    base = _over(base, sea, _colour(0.16, 0.62, 0.76))
    sand = torch.sigmoid(60 * (y - 0.48 - 0.025 * torch.sin(8 * x)))
    return _over(base, sand, _colour(0.95, 0.85, 0.60))


def _snow(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    base = _ramp(y, _colour(0.62, 0.70, 0.80), _colour(0.76, 0.82, 0.90))
    far = torch.sigmoid(60 * (y - 0.40 - 0.06 * torch.sin(5 * x + 1)))
    near = torch.sigmoid(60 * (y - 0.62 + 0.05 * torch.sin(4 * x)))
    return _over(_over(base, far, _colour(0.86, 0.91, 0.97)), near, _colour(0.97, 0.98, 1.0))


def _plain(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _colour(0.93, 0.91, 0.85)


@lru_cache(maxsize=32)
def _gauss(sigma: float, channels: int, device: str) -> torch.Tensor:
    radius = max(1, round(2.5 * sigma))
    t = torch.arange(-radius, radius + 1, device=device).float()
    k = torch.exp(-(t**2) / (2 * sigma**2))
    return (k / k.sum()).view(1, 1, -1).repeat(channels, 1, 1)


def blur(picture_BCHW: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur with mirrored borders."""
    channels = picture_BCHW.shape[1]
    k = _gauss(sigma, channels, str(picture_BCHW.device))
    r = k.shape[-1] // 2
    out = F.conv2d(F.pad(picture_BCHW, (r, r, 0, 0), mode="reflect"), k.unsqueeze(2), groups=channels)
    return F.conv2d(F.pad(out, (0, 0, r, r), mode="reflect"), k.unsqueeze(3), groups=channels)


def edges(picture_BCHW: torch.Tensor, scale: int = 1) -> torch.Tensor:
    """Sobel magnitude of brightness (B, 1, H, W), about 0..4, between pixels that are `scale` apart."""
    s = scale
    y = F.pad(luma(picture_BCHW), (s, s, s, s), mode="replicate")
    gx = y[..., 2 * s :] - y[..., : -2 * s]
    gx = gx[..., : -2 * s, :] + 2 * gx[..., s:-s, :] + gx[..., 2 * s :, :]
    gy = y[..., 2 * s :, :] - y[..., : -2 * s, :]
    gy = gy[..., : -2 * s] + 2 * gy[..., s:-s] + gy[..., 2 * s :]
    return torch.sqrt(gx**2 + gy**2 + 1e-6)


def _tiles(picture_BCHW: torch.Tensor, scale: int) -> torch.Tensor:
    side = 4 * scale
    return F.interpolate(F.avg_pool2d(picture_BCHW, side), scale_factor=side, mode="nearest")


def _pixel_art(rgb: torch.Tensor, alpha: torch.Tensor, scale: int) -> torch.Tensor:
    return torch.round(_tiles(rgb, scale) * 6) / 6


@lru_cache(maxsize=4)
def _grout(device: str, scale: int) -> torch.Tensor:
    line = (torch.arange(scale * v.SIZE, device=device) % (4 * scale) >= 3 * scale).float()
    return torch.maximum(line.view(1, 1, 1, -1), line.view(1, 1, -1, 1))


def _mosaic(rgb: torch.Tensor, alpha: torch.Tensor, scale: int) -> torch.Tensor:
    grout = _grout(str(rgb.device), scale)
    return _tiles(rgb, scale) * (1 - 0.55 * grout) + 0.55 * 0.9 * grout


def _watercolor(rgb: torch.Tensor, alpha: torch.Tensor, scale: int) -> torch.Tensor:
    soft = blur(rgb, 1.3 * scale)
    pigment = (blur(soft, 2.5 * scale) - soft).abs().mean(1, keepdim=True)  # paint gathers where the washes meet
    washed = 1 - 0.78 * (1 - soft)
    return washed - 0.9 * pigment


def _sketch(rgb: torch.Tensor, alpha: torch.Tensor, scale: int) -> torch.Tensor:
    white = rgb * alpha + (1 - alpha)
    lines = (0.55 * edges(white, scale)).clamp(0, 0.85)
    shade = 0.30 * (1 - luma(white))
    return (0.98 - lines - shade).expand(-1, 3, -1, -1)


def _neon(rgb: torch.Tensor, alpha: torch.Tensor, scale: int) -> torch.Tensor:
    flat = rgb * alpha + 0.04 * (1 - alpha)
    hue = flat / flat.amax(1, keepdim=True).clamp_min(0.15)
    hue = (hue - 0.6 * hue.amin(1, keepdim=True)).clamp(0, 1)
    glow = hue * (0.7 * edges(flat, scale)).clamp(0, 1)
    return (
        flat.new_tensor((0.05, 0.03, 0.11)).view(1, 3, 1, 1)
        + 0.35 * flat * alpha
        + glow
        + 0.7 * blur(glow, 2.5 * scale)
    )


@lru_cache(maxsize=4)
def _graph_paper(device: str, scale: int) -> torch.Tensor:
    line = (torch.arange(scale * v.SIZE, device=device) % (scale * v.CELL) < scale).float()
    return torch.maximum(line.view(1, 1, 1, -1), line.view(1, 1, -1, 1))


def _blueprint(rgb: torch.Tensor, alpha: torch.Tensor, scale: int) -> torch.Tensor:
    ground = rgb.new_tensor((0.09, 0.25, 0.58)).view(1, 3, 1, 1) + 0.10 * _graph_paper(str(rgb.device), scale)
    flat = rgb * alpha + (1 - alpha)
    return ground + (0.5 * edges(flat, scale)).clamp(0, 0.9) + 0.12 * alpha * luma(flat)


def _sepia(rgb: torch.Tensor, alpha: torch.Tensor, scale: int) -> torch.Tensor:
    return luma(rgb) * rgb.new_tensor((0.90, 0.74, 0.52)).view(1, 3, 1, 1) + 0.07


_MAKERS = {
    "pixel art": _pixel_art,
    "watercolor": _watercolor,
    "sketch": _sketch,
    "neon": _neon,
    "mosaic": _mosaic,
    "blueprint": _blueprint,
    "sepia": _sepia,
}


def apply_style(style: str, rgb_BCHW: torch.Tensor, alpha_BCHW: torch.Tensor, scale: int = 1) -> torch.Tensor:
    """Redraws composed pictures in `style`; `alpha` is where any sprite covers the ground."""
    maker = _MAKERS.get(style)
    return (rgb_BCHW if maker is None else maker(rgb_BCHW, alpha_BCHW, scale)).clamp(0, 1)
