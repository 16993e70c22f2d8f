"""Pictures from outside of the world: sets the connector's statistics, and measures how well they are separated.

    python -m mm.evaluation.outside --fit                # writes them into the model's connector
    python -m mm.evaluation.outside --json outside.json  # measures

Design choices
- The statistics come from renders alone: mean and principal directions of the mean token, and the distance that one
  in a hundred other renders exceeds. Photographs choose the number of directions (every second one), and the others
  are for the report.
- The photographs are those that scikit-image and scikit-learn ship (the `dev` extra), whole and in random crops. An
  interval would count crops of one photograph as independent, so none is given.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from mm.core.files import write_json
from mm.core.paths import resolve_model
from mm.pipelines.pictures import to_tensor
from mm.world.captions import caption
from mm.world.render import render
from mm.world.scene import sample_scene

if TYPE_CHECKING:
    from mm.models.connectors import Connector
    from mm.models.understanding_encoder import UnderstandingEncoder

RANK = 96
FALSE_ALARMS = 0.01
_CROPS, _SHARE = 12, 3  # crops of a photograph; the smallest is a third of its shorter side
_FROM_SKIMAGE = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png"),
    *("coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png"),
    *("retina.jpg", "rocket.jpg"),
)
_FROM_SKLEARN = ("china.jpg", "flower.jpg")


@dataclass(frozen=True, kw_only=True)
class OutsideReport:
    """How well photographs are separated from pictures of the world.

    Attributes:
        auroc: Area under the receiver operating characteristic, against renders and own drawings together.
        detected: Share of the photographs' crops that the shipped limit finds.
        false_renders, false_drawn: Share of held-out renders and of own drawings that it finds.
        photographs, crops, renders, drawn: How many there were.
    """

    auroc: float
    detected: float
    false_renders: float
    false_drawn: float
    photographs: int
    crops: int
    renders: int
    drawn: int


def photographs() -> dict[str, Path]:
    """The photographs by name. Raises ImportError where the `dev` extra is not installed."""
    import skimage.data
    import sklearn.datasets

    folders = (Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images")
    return {
        name: folder / name
        for folder, names in zip(folders, (_FROM_SKIMAGE, _FROM_SKLEARN), strict=True)
        for name in names
        if (folder / name).is_file()
    }


def halves() -> tuple[list[str], list[str]]:
    """Names of the photographs for choosing and for the report: every second one."""
    names = sorted(photographs())
    return names[::2], names[1::2]


def crops(name: str, count: int = _CROPS) -> list[Image.Image]:
    """A photograph, and random squares of it."""
    whole, rng = Image.open(photographs()[name]).convert("RGB"), random.Random(name)
    out = [whole]
    for _ in range(count - 1):
        side = rng.randint(min(whole.size) // _SHARE, min(whole.size))
        x, y = rng.randint(0, whole.width - side), rng.randint(0, whole.height - side)
        out.append(whole.crop((x, y, x + side, y + side)))
    return out


def rendered(count: int, seed: int, *, held_out: bool) -> list[Image.Image]:
    """Renders of random scenes."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng, held_out=held_out) for _ in range(count)]
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in render(scenes)]


def drawn_pictures(model: str, count: int, seed: int) -> list[Image.Image]:
    """Own drawings of random captions."""
    import mm

    engine, rng = mm.load(model), random.Random(seed)
    prompts = [caption(sample_scene(rng), rng) for _ in range(count)]
    return [engine.draw(prompt, seed=seed + k)[0] for k, prompt in enumerate(prompts)]


@torch.no_grad()
def mean_tokens(encoder: UnderstandingEncoder, pictures: Sequence[Image.Image], batch: int = 32) -> torch.Tensor:
    """Tokens (B, L, W) of pictures, batch by batch."""
    size = encoder.config.image_size
    parts = [pictures[k : k + batch] for k in range(0, len(pictures), batch)]
    return torch.cat([encoder(to_tensor(list(part), size).to(encoder.dtype))[1].float().mean(1) for part in parts])


def fit(
    encoder: UnderstandingEncoder, connector: Connector, *, renders: int = 4000, rank: int = RANK, seed: int = 1
) -> Connector:
    """A copy of a connector with statistics of renders.

    Args:
        encoder: Trained.
        connector: That belongs to it.
        renders: How many set the directions; as many again set the limit.
        rank: Number of directions.
        seed: Of the scenes.

    Returns:
        The connector with buffers, in the same type.
    """
    from mm.models.connectors import Connector

    x_BC = mean_tokens(encoder, rendered(renders, seed, held_out=False)).double()
    mean_C = x_BC.mean(0)
    basis_RC = torch.linalg.svd(x_BC - mean_C, full_matrices=False).Vh[:rank]
    settings = {key: value for key, value in dict(connector.config).items() if not key.startswith("_")}
    made = Connector(**settings | {"domain_rank": rank})
    torch.nn.Module.to(made, connector.dtype)
    statistics = {"domain_mean": mean_C, "domain_basis": basis_RC, "domain_limit": torch.ones(1)}
    rounded = {k: x.bfloat16().to(connector.dtype) for k, x in statistics.items()}  # as published weights are stored
    made.load_state_dict({**connector.state_dict(), **rounded})
    others = mean_tokens(encoder, rendered(renders, seed + 1, held_out=False))
    distance_B = made.domain_distance(others[:, None])
    assert distance_B is not None
    made.get_buffer("domain_limit").fill_(float(distance_B.quantile(1 - FALSE_ALARMS)))
    return made.eval()


def measure(
    encoder: UnderstandingEncoder,
    connector: Connector,
    drawn: Sequence[Image.Image],
    names: Sequence[str],
    *,
    renders: int = 1000,
) -> OutsideReport:
    """Distances of photographs against those of held-out renders and of own drawings."""

    def distances(pictures: Sequence[Image.Image]) -> torch.Tensor:
        found = connector.domain_distance(mean_tokens(encoder, pictures)[:, None])
        assert found is not None
        return found

    photos = distances([one for name in names for one in crops(name)])
    plain, own = distances(rendered(renders, 2, held_out=True)), distances(drawn)
    inside = torch.cat([plain, own])
    wins = (photos[:, None] > inside).double() + 0.5 * (photos[:, None] == inside).double()
    return OutsideReport(
        auroc=float(wins.mean()),
        detected=float((photos > 1).double().mean()),
        false_renders=float((plain > 1).double().mean()),
        false_drawn=float((own > 1).double().mean()),
        photographs=len(names),
        crops=len(photos),
        renders=len(plain),
        drawn=len(own),
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mm-tiny")
    parser.add_argument("--fit", action="store_true", help="Set the statistics, and write them into the model.")
    parser.add_argument("--drawn", type=int, default=100, help="Own drawings.")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from mm.models.connectors import Connector
    from mm.models.understanding_encoder import UnderstandingEncoder

    where = resolve_model(given.model)
    encoder = UnderstandingEncoder.from_pretrained(where, subfolder="understanding_encoder", use_safetensors=True)
    connector = Connector.from_pretrained(where, subfolder="understanding_connector", use_safetensors=True)
    if given.fit:
        fit(encoder.float(), connector.float()).bfloat16().save_pretrained(Path(where) / "understanding_connector")
        return
    report = measure(encoder.float(), connector.float(), drawn_pictures(given.model, given.drawn, 100), halves()[1])
    print(report)
    if given.json:
        write_json(given.json, asdict(report))


if __name__ == "__main__":
    main()
