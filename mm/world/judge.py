"""The judge: a small network that predicts objects, colours, positions, background and style of a picture.

Design choices
- It measures and does nothing else: no model is trained against it, and it shares no weights with any.
- Centres on a grid of 8-pixel cells (CenterNet, arXiv 1904.07850). A cell's target falls smoothly with the distance to
  the sprite's centre; as the cell also predicts its offset, the height it should have is known, wherever in the cell
  (or on its border) the centre lies. Confidence is the part of that height it reached, times the probability of the
  object; what stays below `threshold` does not count.
- Colours are separate yes/no answers, since a tint equal to the natural colour counts as both (`counts_as`).
- Batch norm with fixed statistics when reading: a picture's reading does not depend on its batch.
- A reading is decided in float32. Weights are stored with 16 bits, and the vocabulary is stored beside them.

Legend: B pictures, C channels, G = 16 grid cells a side, O objects, K = 9 colours (natural first).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn

from mm.core.build_limit import build_empty
from mm.core.errors import UserError
from mm.core.safe_json import read_object
from mm.core.safe_tensors import read_tensors
from mm.world import vocabulary as v

STRIDE = 8
GRID = v.SIZE // STRIDE
SPREAD = 0.7  # cells; the deviation of the bump around a centre
SIZE_UNIT = 64.0  # sizes are predicted in this many pixels
TINTS: tuple[str | None, ...] = (None, *v.COLOURS)
_BATCH = 64
_APART = 12  # pixels; two centres closer than this are one object seen twice
_VOCABULARY = {"objects": v.ALL_OBJECTS, "colours": v.COLOURS, "backgrounds": v.BACKGROUNDS, "styles": v.STYLES}


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Widths of the three resolutions (32, 16 and 8 cells a side), residual blocks, and what counts as found."""

    stem: int = 32
    width: int = 64
    deep: int = 128
    deep_blocks: int = 3
    threshold: float = 0.5

    def __post_init__(self) -> None:
        for name in ("stem", "width", "deep", "deep_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"judge config: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"judge config: threshold must lie between 0 and 1, got {self.threshold}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One detected object: centre (x, y) and longest side in pixels, y down.

    `colours` holds every colour it answers to, None meaning natural; it is empty in styles without hue. `colour` is the
    one to name: None where it is natural, or where colour is not visible.
    """

    object: str
    colour: str | None
    x: float
    y: float
    size: float
    confidence: float
    colours: tuple[str | None, ...] = ()

    def answers_to(self, colour: str | None) -> bool:
        """Whether the object may be called `colour` (None = natural)."""
        return colour in self.colours


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The judge's prediction for one picture, the most confident object first."""

    readable: bool
    objects: tuple[Found, ...]
    background: str
    style: str


@dataclass(frozen=True, kw_only=True)
class Raw:
    """The network's outputs as logits and numbers."""

    centre_BGG: torch.Tensor
    object_BOGG: torch.Tensor
    colour_BKGG: torch.Tensor
    offset_B2GG: torch.Tensor  # of the sprite's centre from the cell's centre, in cells, x first
    size_BGG: torch.Tensor
    background_BN: torch.Tensor
    style_BN: torch.Tensor
    readable_B: torch.Tensor


def _conv(wide_in: int, wide_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(wide_in, wide_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(wide_out), nn.ReLU(inplace=True))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _conv(width, width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm.weight)  # starts as the identity

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return F.relu(x_BCHW + self.norm(self.second(self.first(x_BCHW))))


class Judge(nn.Module):
    """Reads pictures; see `read`."""

    def __init__(self, config: JudgeConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or JudgeConfig()
        self.stem = nn.Sequential(nn.PixelUnshuffle(4), _conv(48, c.stem))
        self.middle = nn.Sequential(_conv(c.stem, c.width, 3, 2), _Residual(c.width))
        self.deep = nn.Sequential(_conv(c.width, c.deep, 3, 2), *[_Residual(c.deep) for _ in range(c.deep_blocks)])
        self.up = _conv(c.deep, c.width, 1)
        self.join = nn.Sequential(_Residual(c.width), _conv(c.width, 2 * c.width, 1))
        self.cells = nn.Conv2d(2 * c.width, 1 + len(v.ALL_OBJECTS) + len(TINTS) + 3, 1)
        self.pooled = nn.Sequential(nn.Linear(2 * c.deep + 2 * c.width, c.deep), nn.ReLU(inplace=True))
        self.whole = nn.Linear(c.deep, len(v.BACKGROUNDS) + len(v.STYLES) + 1)
        nn.init.constant_(self.get_parameter("cells.bias").data[:1], -3.0)  # few cells hold a centre
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pictures_BCHW: torch.Tensor) -> Raw:
        """Raw outputs for pictures in [0, 1]."""
        x = (2 * pictures_BCHW - 1).contiguous(memory_format=torch.channels_last)
        middle = self.middle(self.stem(x))
        deep = self.deep(middle)
        joined = self.join(middle + F.interpolate(self.up(deep), scale_factor=2.0, mode="nearest"))
        centre, obj, colour, offset, size = (
            self.cells(joined).float().split((1, len(v.ALL_OBJECTS), len(TINTS), 2, 1), 1)
        )
        pooled = torch.cat([deep.mean((2, 3)), deep.amax((2, 3)), joined.mean((2, 3))], 1)
        whole = self.whole(self.pooled(pooled)).float()
        background, style, readable = whole.split((len(v.BACKGROUNDS), len(v.STYLES), 1), 1)
        return Raw(
            centre_BGG=centre[:, 0],
            object_BOGG=obj,
            colour_BKGG=colour,
            offset_B2GG=offset,
            size_BGG=size[:, 0],
            background_BN=background,
            style_BN=style,
            readable_B=readable[:, 0],
        )

    @torch.no_grad()
    def read(self, pictures_BCHW: torch.Tensor) -> list[Reading]:
        """Readings of uint8 pictures (B, 3, 128, 128), in order."""
        if pictures_BCHW.dtype != torch.uint8 or pictures_BCHW.shape[1:] != (3, v.SIZE, v.SIZE):
            raise ValueError(
                f"the judge reads uint8 pictures of shape (B, 3, {v.SIZE}, {v.SIZE}), "
                f"got {pictures_BCHW.dtype} of shape {tuple(pictures_BCHW.shape)}"
            )
        was_training = self.training
        self.eval()
        where = self.whole.weight.device
        out: list[Reading] = []
        for start in range(0, len(pictures_BCHW), _BATCH):
            part = pictures_BCHW[start : start + _BATCH].to(where)
            out += decode(self(part.float() / 255), self.config.threshold)
        self.train(was_training)
        return out

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors; each appears whole or not at all, in the place of one before."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: (t.half() if t.ndim > 1 else t).contiguous()
            for name, t in self.state_dict().items()
            if not name.endswith("num_batches_tracked")
        }
        _write(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
        _write(folder / "config.json", (json.dumps(asdict(self.config) | _VOCABULARY, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls, folder: str | Path | None = None) -> Judge:
        """The judge stored in `folder`, by default the shipped one; ready to read."""
        folder = default_folder() if folder is None else Path(folder)
        if not (folder / "config.json").is_file():
            raise UserError(f"no judge in {folder}: config.json is missing; train one with mm.training.judge_stage")
        config = read_object(folder / "config.json", "judge's config")
        for kind, words in _VOCABULARY.items():
            if config.pop(kind, None) != list(words):
                raise UserError(f"the judge in {folder} was trained on other {kind} than mm.world.vocabulary lists")
        shape = _config(config, folder)
        file = folder / "model.safetensors"
        stored = read_tensors(file, "judge's weights").tensors
        count, values = len(stored), sum(tensor.numel() for tensor in stored.values())
        build_empty(lambda: cls(shape), count, values, str(folder / "config.json"))
        judge = cls(shape)
        state = {name: t for name, t in judge.state_dict().items() if name.endswith("num_batches_tracked")}
        state |= {name: t.float() for name, t in stored.items()}
        try:
            judge.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(f"{file} does not hold the judge that config.json describes ({_line(error)})") from error
        return judge.eval()


def _config(given: dict[str, Any], folder: Path) -> JudgeConfig:
    """The config of a judge in a folder. Raises UserError for other fields and values."""
    try:
        return JudgeConfig(**given)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} is no config of a judge ({_line(error)})") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def default_folder() -> Path:
    """Where the shipped judge lies: inside the installed package, or in the checkout's weights/."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "weights" / "judge"
    return inside if inside.is_dir() else package.parent / "weights" / "judge"


def _write(path: Path, data: bytes) -> None:
    """Writes a file that appears whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def bump(distance2: torch.Tensor) -> torch.Tensor:
    """A cell's target height from its squared distance (in cells) to a centre."""
    return torch.exp(-distance2 / (2 * SPREAD**2))


def decode(raw: Raw, threshold: float) -> list[Reading]:
    """Readings from raw outputs: local maxima of the centres, each confident at least `threshold`."""
    height_BGG = raw.centre_BGG.sigmoid()
    peak_BGG = height_BGG == F.max_pool2d(height_BGG[:, None], 3, 1, 1)[:, 0]
    # Beyond a cell's corner another cell would have been the peak, so the height expected there is never lower.
    reach2_BGG = raw.offset_B2GG.square().sum(1).clamp(max=0.5)
    sure_BGG = (height_BGG / bump(reach2_BGG)).clamp(max=1)
    odds_BGG, object_BGG = raw.object_BOGG.softmax(1).max(1)
    confidence_BGG = torch.where(peak_BGG, sure_BGG * odds_BGG, 0).cpu()
    at_G = torch.arange(GRID, device=raw.centre_BGG.device) + 0.5
    x_BGG = ((at_G + raw.offset_B2GG[:, 0]) * STRIDE).cpu()
    y_BGG = ((at_G[:, None] + raw.offset_B2GG[:, 1]) * STRIDE).cpu()
    size_BGG, object_BGG, colour_BKGG = (t.cpu() for t in (raw.size_BGG * SIZE_UNIT, object_BGG, raw.colour_BKGG))
    styles, backgrounds = raw.style_BN.argmax(1).tolist(), raw.background_BN.argmax(1).tolist()
    readable = (raw.readable_B > 0).tolist()
    out = []
    for b, (style, background) in enumerate(zip((v.STYLES[i] for i in styles), backgrounds, strict=True)):
        found: list[Found] = []
        cells = torch.nonzero(confidence_BGG[b] >= threshold)
        order = confidence_BGG[b][cells[:, 0], cells[:, 1]].argsort(descending=True, stable=True)
        for row, column in cells[order].tolist():
            x, y = float(x_BGG[b, row, column]), float(y_BGG[b, row, column])
            if any(max(abs(x - f.x), abs(y - f.y)) < _APART for f in found):
                continue
            named, colours = _colours(colour_BKGG[b, :, row, column], style)
            found.append(
                Found(
                    object=v.ALL_OBJECTS[int(object_BGG[b, row, column])],
                    colour=named,
                    x=x,
                    y=y,
                    size=float(size_BGG[b, row, column]),
                    confidence=float(confidence_BGG[b, row, column]),
                    colours=colours,
                )
            )
        ground = v.BACKGROUNDS[background] if v.shows_background(style) else "plain"
        out.append(Reading(readable=readable[b], objects=tuple(found), background=ground, style=style))
    return out


def _colours(logits_K: torch.Tensor, style: str) -> tuple[str | None, tuple[str | None, ...]]:
    """The colour to name, and all that the object answers to: at least the likeliest one."""
    if not v.shows_colour(style):
        return None, ()
    likeliest = int(logits_K.argmax())
    answers = tuple(tint for i, tint in enumerate(TINTS) if logits_K[i] > 0 or i == likeliest)
    if None in answers:
        return None, answers
    return TINTS[likeliest], answers
