"""The autoencoder, its quantized rivals, the stage that trains them and the report about them, all with tiny widths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mm.evaluation.reconstruct import evaluate_reconstruct
from mm.tokenizers import Autoencoder, Bridge, VisionTokenizer
from mm.tokenizers.quantized import QuantizedTokenizer
from mm.training import tokenizer_stage
from mm.training.optimizers import Muon, orthogonalize
from mm.training.trainer import Trainer, TrainerConfig

TINY = {
    "encoder_widths": (8, 8, 16),
    "encoder_depths": (1, 0, 1),
    "decoder_widths": (16, 8, 8),
    "decoder_depths": (1, 0, 1),
    "refine_width": 4,
}


def pictures(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1


def tiny(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return (Autoencoder(**TINY) if kind == "autoencoder" else QuantizedTokenizer(kind=kind, **TINY)).eval()


@pytest.mark.parametrize("kind", ["autoencoder", "fsq", "vq"])
@torch.inference_mode()
def test_one_protocol_and_a_save_load_round_trip(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    raw = model.encode(pictures())
    mean, std = raw.mean((0, 2, 3)), raw.std((0, 2, 3)) + 1e-3
    model.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    latents = model.encode(pictures())
    assert isinstance(model, VisionTokenizer)
    torch.testing.assert_close(latents, (raw - mean[:, None, None]) / std[:, None, None])
    images = model.decode(latents)
    assert images.shape == (2, 3, 128, 128)
    assert images.abs().max() <= 1
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(pictures()), latents)
    assert torch.equal(loaded.decode(latents), images)


@torch.inference_mode()
def test_codes_stand_for_the_values_that_encode_returns() -> None:
    for kind, per_cell in (("fsq", 16), ("vq", 8)):
        model = tiny(kind)
        codes = model.codes(pictures())
        assert codes.shape == (2, per_cell, 8, 8)
        assert codes.max() < model.levels
        assert model.bits_per_picture() == Bridge().bits_per_picture() == 6144
        torch.testing.assert_close(model.dequantize(codes), model.encode(pictures()), atol=1e-5, rtol=0)


def test_training_latents_have_unit_deviation() -> None:
    latents, auxiliary = tiny("autoencoder").training_latents(pictures(4))
    assert auxiliary == 0
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(16), atol=1e-2, rtol=0)


def test_wrong_shapes_are_named() -> None:
    model = tiny("autoencoder")
    with pytest.raises(ValueError, match=r"\(1, 3, 100, 128\)"):
        model.encode(torch.zeros(1, 3, 100, 128))
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 8\)"):
        model.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="latents_std has 2 values"):
        Autoencoder(latents_std=(1.0, 1.0))
    with pytest.raises(ValueError, match="'lfq'"):
        QuantizedTokenizer(kind="lfq")


def test_muon_makes_updates_nearly_orthogonal() -> None:
    matrix = torch.randn(24, 60, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalize(matrix).float())
    assert 0.6 < singular.min() and singular.max() < 1.3
    weight = nn.Parameter(torch.zeros(8, 4, 3, 3))
    weight.grad = torch.randn(8, 4, 3, 3)
    Muon([weight], lr=0.5).step()
    expected = 0.5 * 0.2 * 36**0.5 / 36**0.5  # lr * 0.2, the root mean square of 8 x 36 with unit singular values * 6
    assert weight.square().mean().sqrt().item() == pytest.approx(expected, rel=0.15)


@pytest.fixture
def tiny_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_stage, "build", tiny)


CONFIG = TrainerConfig(batch_size=2, learning_rate=2e-3, warmup=2, schedule="cosine")


def trained(out: Path, steps: int, **settings: bool) -> Trainer:
    """A run in `out` (resumed where there is one), `steps` steps further and saved."""
    config = tokenizer_stage.TokenizerConfig(pool_start=2, pool_grow=0, pool_size=2, **settings)
    torch.manual_seed(0)
    module = tokenizer_stage.TokenizerTraining(tokenizer_stage.build("autoencoder"), config)
    batches = tokenizer_stage.PoolBatches(config, CONFIG.batch_size, CONFIG.seed)
    trainer = Trainer(module, out, CONFIG, optimizers=module.optimizers(CONFIG))
    for _ in range(steps):
        trainer.train_step(batches(trainer.step))
    trainer.save()
    return trainer


@pytest.mark.usefixtures("tiny_stage")
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    straight = trained(tmp_path / "a", 4)
    trained(tmp_path / "b", 2)
    resumed = trained(tmp_path / "b", 2)
    assert resumed.step == straight.step == 4
    for (name, a), b in zip(straight.bare.named_parameters(), resumed.bare.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name, atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("tiny_stage")
def test_a_frozen_encoder_stays_as_it_was(tmp_path: Path) -> None:
    before = trained(tmp_path, 0, freeze_encoder=True).bare.model.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    after = trained(tmp_path, 2, freeze_encoder=True).bare.model
    changed = {name.split(".")[0] for name, p in after.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"decoder"}


@pytest.mark.usefixtures("tiny_stage")
def test_the_published_tokenizer_has_latents_of_unit_deviation(tmp_path: Path) -> None:
    trainer = trained(tmp_path, 2)
    pool = tokenizer_stage.ScenePool(0, 64)
    pool.grow_to(64)
    published = tokenizer_stage.measured(trainer.bare, pool)
    latents = published.encode(tokenizer_stage.to_float(pool.pictures))
    assert latents.std((0, 2, 3)).sub(1).abs().max() < 0.05
    assert trainer.bare.model.config.latents_mean is None
    scores = tokenizer_stage.report(published, {"cartoon": pool.pictures[:8]}, tmp_path)
    assert scores["cartoon"] == scores["mean"] > 3
    assert Image.open(tmp_path / "preview.png").size == (8 * 128, 2 * 128)


def test_stage_settings_reject_bad_values() -> None:
    with pytest.raises(ValueError, match="minutes -1"):
        TrainerConfig(minutes=-1)
    with pytest.raises(ValueError, match="'lion'"):
        tokenizer_stage.TokenizerConfig(kind="lion")
    with pytest.raises(ValueError, match="pool_start is 2, below the batch size of 4"):
        tokenizer_stage.PoolBatches(tokenizer_stage.TokenizerConfig(pool_start=2), 4, 0)


def test_reconstruct_report_of_a_folder(tmp_path: Path) -> None:
    tiny("autoencoder").save_pretrained(tmp_path / "autoencoder")
    Bridge().save_pretrained(tmp_path / "bridge")
    tiny("fsq").save_pretrained(tmp_path / "fsq")
    report = evaluate_reconstruct(tmp_path, seed=3, limit=2, json_file=tmp_path / "grid.json")
    json.dumps(report, allow_nan=False)
    names = ["autoencoder", "autoencoder + bridge (gaussian, 64 levels)", "fsq (fsq, 16 x 64)"]
    assert list(report["tasks"]) == names
    assert [report["tasks"][name]["bits"] for name in names] == [16384, 6144, 6144]
    first = report["tasks"]["autoencoder"]
    assert report["overall"] == first["score"]
    assert first["n"] == 16 and first["low"] <= first["score"] <= first["high"]
    assert set(first["styles"]) >= {"cartoon", "sketch"}
    assert Image.open(tmp_path / "grid.png").size == (2 * 128, 8 * 4 * 128)


def test_psnr_is_the_closed_form(tmp_path: Path) -> None:
    from mm.evaluation.reconstruct import Candidate, measure

    flat = torch.full((1, 3, 128, 128), 100, dtype=torch.uint8)
    shifted = Candidate(name="5 too bright", reconstruct=lambda x: x + 10 / 255, bits=0)
    psnr, ssim, output = measure(shifted, flat)
    assert psnr.item() == pytest.approx(20 * torch.log10(torch.tensor(255 / 5)).item(), abs=1e-3)
    assert int(output[0, 0, 0, 0]) == 105
    assert 0.9 < ssim.item() <= 1
