"""The enlarger: pictures of twice the side, learned beside a decoder that does not change."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny import seeded, tiny_pipeline, tiny_reader

from mm import ImageEditPipeline
from mm.core.errors import UserError
from mm.tokenizers import Autoencoder
from mm.training import run
from mm.training.enlarger_stage import Enlarge, EnlargerConfig, batch_of, with_enlarger
from mm.training.tokenizer_data import held_out_scenes
from mm.world.render import render
from mm.world.vocabulary import STYLES


def tiny_autoencoder(*, enlarger_width: int = 0) -> Autoencoder:
    torch.manual_seed(0)
    widths = {"encoder_widths": (8, 8, 8), "decoder_widths": (8, 8, 8), "decoder_depths": (1, 1, 1)}
    return Autoencoder(**widths, refine_width=4, enlarger_width=enlarger_width)


@pytest.mark.parametrize("style", STYLES)
def test_larger_renders_show_the_same(style: str) -> None:
    scenes = held_out_scenes(style, 4)
    plain, large = render(scenes).float(), render(scenes, scale=2).float()
    assert large.shape == (4, 3, 256, 256)
    assert (F.avg_pool2d(large, 2) - plain).abs().mean() < 6
    if style not in ("pixel art", "mosaic"):  # whose tiles are plain squares at every size
        assert (large - F.interpolate(plain, scale_factor=2)).abs().mean() > 0.1


def test_a_fresh_enlarger_adds_nothing() -> None:
    before = tiny_autoencoder()
    after = with_enlarger(before, 6)
    latents = torch.randn(2, 16, 8, 8)
    assert (before.scales, after.scales) == ((1,), (1, 2))
    torch.testing.assert_close(after.decode(latents), before.decode(latents), rtol=0, atol=0)
    torch.testing.assert_close(after.decode(latents, scale=2), F.interpolate(before.decode(latents), scale_factor=2))
    with pytest.raises(ValueError, match="scale is 2; this autoencoder writes 1 times"):
        before.decode(latents, scale=2)


def test_only_the_enlarger_learns() -> None:
    autoencoder = with_enlarger(tiny_autoencoder(), 8)
    for part in (autoencoder.encoder, autoencoder.decoder):
        part.requires_grad_(False)
    config = EnlargerConfig(noise=0.0)
    module = Enlarge(autoencoder, config)
    assert {name for name, _ in module.named_parameters()} == {
        f"enlarger.{k}" for k in autoencoder.enlarger.state_dict()
    }
    batch = batch_of(autoencoder, random.Random(0), 4, config)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    losses = []
    for _ in range(12):
        found = module(batch)
        loss = found["pixels"] + found["edges"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0]


def test_the_stage_runs_and_goes_on(tmp_path: Path) -> None:
    state = tmp_path / "state"
    tiny_autoencoder().save_pretrained(state / "model" / "autoencoder")
    before = tiny_autoencoder().state_dict()
    trainer = {"batch_size": 2, "learning_rate": 0.001, "muon": False, "warmup": 1, "save_minutes": 0.01}
    counts, minutes = [], 0.02
    for _ in range(2):  # the second call goes on where the first stopped
        config = {"state": str(state), "enlarger": {"trainer": trainer | {"minutes": minutes}, "stage": {"width": 6}}}
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
        run.run_stages(str(tmp_path / "tiny.yaml"), stages=["enlarger"])
        rows = [json.loads(line) for line in (state / "enlarger" / "log.jsonl").read_text().splitlines()]
        counts.append(max(row.get("step", 0) for row in rows))
        minutes = (rows[-1]["seconds"] + 2) / 60
    assert 0 < counts[0] < counts[1]
    made = Autoencoder.from_pretrained(state / "model" / "autoencoder")
    assert made.config.enlarger_width == 6
    for name, value in before.items():
        torch.testing.assert_close(made.state_dict()[name].float(), value.bfloat16().float(), rtol=0, atol=0)
    assert any("psnr_plain" in row for row in rows)


def test_wrong_settings() -> None:
    with pytest.raises(UserError, match="width is 0"):
        EnlargerConfig(width=0)
    with pytest.raises(UserError, match="noise is -1"):
        EnlargerConfig(noise=-1)


def test_pipelines_write_both_sizes() -> None:
    pipe = tiny_pipeline()
    pipe.autoencoder = with_enlarger(pipe.autoencoder, 6)
    torch.nn.init.normal_(pipe.autoencoder.enlarger[2].weight, std=0.1)
    assert pipe.sides == (128, 256)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    plain = pipe("a cat", generator=seeded(7)[0], **options).images
    large = pipe("a cat", generator=seeded(7)[0], height=256, width=256, **options).images
    assert (plain.shape[-1], large.shape[-1]) == (128, 256)
    assert (F.interpolate(plain, scale_factor=2) - large).abs().mean() < (plain - plain.mean()).abs().mean()
    with pytest.raises(UserError, match="128 x 128 and 256 x 256 pictures, not 256 x 128"):
        pipe("a cat", height=128, width=256)
    with pytest.raises(UserError, match="128 x 128 pictures, not 256 x 256"):
        tiny_pipeline()("a cat", height=256, width=256)


def test_an_edit_keeps_pixels_outside_of_the_mask_at_both_sizes() -> None:
    from PIL import Image

    pipe = ImageEditPipeline(**{k: v for k, v in tiny_reader().items() if k != "latent_stem"})
    pipe.set_progress_bar_config(disable=True)
    pipe.autoencoder = with_enlarger(pipe.autoencoder, 6)
    source = Image.effect_noise((256, 256), 90).convert("RGB")
    mask = Image.new("L", (256, 256))
    mask.paste(255, (0, 0, 128, 256))
    made = pipe(
        source, "remove the cat", mask_image=mask, height=256, width=256, num_inference_steps=2, strict=False,
        generator=seeded(3)[0],
    ).images[0]  # fmt: skip
    assert made.size == (256, 256)
    assert made.crop((128, 0, 256, 256)).tobytes() == source.crop((128, 0, 256, 256)).tobytes()
    assert made.crop((0, 0, 128, 256)).tobytes() != source.crop((0, 0, 128, 256)).tobytes()
