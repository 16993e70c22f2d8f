"""The crisp stage: the decoder grows without a change, losses do what they say, and the stage runs and goes on."""

from __future__ import annotations

import json
import random

import pytest
import torch
import yaml
from tiny import tiny_pipeline

from mm.tokenizers import Autoencoder
from mm.training import crisp_losses, run
from mm.training.crisp_data import BatchMaker, CrispBatch, CrispConfig, RedrawnPool
from mm.training.crisp_growth import grown
from mm.training.crisp_stage import stage as make_stage
from mm.training.redrawn import redraw, write_redrawn
from mm.training.stage import StageContext
from mm.world.captions import caption
from mm.world.render import render
from mm.world.scene import sample_scene


def tiny_autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    made = Autoencoder(encoder_widths=(8, 8, 8), decoder_widths=(8, 8, 8), decoder_depths=(2, 1, 1), refine_width=4)
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def test_a_grown_decoder_writes_the_same_pictures():
    before = tiny_autoencoder()
    after = grown(before, CrispConfig(quarter_depth=3, refine_depth=2))
    assert (after.config.decoder_depths[2], after.config.refine_depth) == (3, 2)
    latents = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(after.decode(latents), before.decode(latents))
    pictures = torch.rand(2, 3, 128, 128) * 2 - 1
    torch.testing.assert_close(after.encode(pictures), before.encode(pictures))
    same = grown(after, CrispConfig())
    torch.testing.assert_close(same.decode(latents), before.decode(latents))
    with pytest.raises(ValueError, match="3 blocks in a stage cannot shrink to 1"):
        grown(after, CrispConfig(quarter_depth=1))


def test_gradient_energy_by_hand():
    picture = torch.zeros(1, 1, 2, 2)
    picture[..., 0, 0] = 3.0
    # One edge across of two, one edge down of two, each of strength 3.
    assert float(crisp_losses.gradient_energy(picture)) == pytest.approx(9 / 2 + 9 / 2)


def test_errors_of_redrawn_rows_are_of_means():
    """Details that lie elsewhere within 4 x 4 pixels cost encoded rows something, redrawn ones nothing."""
    wanted = torch.zeros(1, 3, 128, 128)
    wanted[..., ::4] = 1.0
    shifted = wanted.roll(1, -1)
    rows = torch.tensor([True])
    assert float(crisp_losses.pixel_loss(shifted, wanted, rows)) == pytest.approx(0.0, abs=1e-6)
    assert float(crisp_losses.pixel_loss(shifted, wanted, ~rows)) > 0.1
    assert float(crisp_losses.edge_loss(wanted, wanted)) == 0.0
    assert float(crisp_losses.edge_loss(torch.zeros_like(wanted), wanted)) > 0.5


def test_patches_weigh_by_their_edges():
    picture = torch.zeros(1, 3, 128, 128)
    picture[..., :64, :64:2] = 1.0  # stripes in one quarter
    (weights,) = crisp_losses.patch_weights(picture, [torch.zeros(1, 16, 16)])
    assert float(weights.mean()) == pytest.approx(1.0)
    assert float(weights[0, :8, :8].mean()) > 10 * float(weights[0, 9:, 9:].mean())


@pytest.fixture(scope="module")
def batch() -> CrispBatch:
    config = CrispConfig(redrawn_share=0.0)
    made = BatchMaker(tiny_autoencoder(), None, 4, config)(random.Random(0))
    return CrispBatch(
        latents_BCHW=made.latents_BCHW,
        pictures_BCHW=made.pictures_BCHW,
        before_BCHW=made.before_BCHW,
        redrawn_B=torch.tensor([False, False, True, True]),
    )


def gradients(part: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(loss, list(part.parameters()), retain_graph=True, allow_unused=True))


def test_each_loss_teaches_its_own_part(batch):
    torch.manual_seed(1)
    config = CrispConfig(adversary_after=1, critic_first=1, critic_steps=2)
    module = crisp_losses.Crisp(tiny_autoencoder().decoder, config)
    first, alone, also, losses = (module(batch) for _ in range(4))
    assert set(first) == {"pixels", "edges", "_sharp"}
    assert set(alone) == {"critic", "_sharp"} == set(also)  # the discriminator learns alone
    assert all(g is None for g in gradients(module.decoder, losses["critic"]))
    for name in ("pixels", "edges", "features", "adversary"):
        assert all(g is None for g in gradients(module.discriminator, losses[name])), name
        assert any(g is not None and g.any() for g in gradients(module.decoder, losses[name])), name
    assert all(g is not None for g in gradients(module.discriminator, losses["critic"]))


def test_the_discriminator_learns_to_tell_renders_and_the_decoder_to_please_it(batch):
    torch.manual_seed(1)
    module = crisp_losses.Crisp(
        tiny_autoencoder().decoder,
        CrispConfig(adversary_after=0, critic_first=0, critic_steps=1, adversary_weight=1.0),
    )
    learner = torch.optim.AdamW(module.discriminator.parameters(), 2e-3)
    critics = []
    for _ in range(15):
        critics.append(module(batch)["critic"])
        learner.zero_grad()
        critics[-1].backward()
        learner.step()
    assert critics[-1] < 0.8 * critics[0]
    learner = torch.optim.AdamW(module.decoder.parameters(), 2e-3)
    hinges = []
    for _ in range(10):
        hinges.append(module(batch)["adversary"])
        learner.zero_grad()
        hinges[-1].backward()
        learner.step()
    assert hinges[-1] < hinges[0]


def test_parts_learn_with_their_share_of_the_rate(tmp_path):
    tiny_pipeline().autoencoder.save_pretrained(tmp_path / "model" / "autoencoder")
    section = {"shards": 0, "shard_size": 0, "trainer": {"learning_rate": 0.01}}
    section["stage"] = {"decoder_rate": 0.3, "redrawn_share": 0.0}
    made = make_stage(StageContext(config={"crisp": section}, state=tmp_path))
    decoder, discriminator = made.optimizers(made.module)
    for optimizer, part, rate in ((decoder, "decoder", 0.003), (discriminator, "discriminator", 0.01)):
        (group,) = optimizer.param_groups
        assert group["lr"] == pytest.approx(rate)
        assert {id(p) for p in group["params"]} == {id(p) for p in getattr(made.module, part).parameters()}


def test_redrawing_starts_from_the_picture_and_ends_with_the_model():
    pipe = tiny_pipeline()
    rng = random.Random(4)
    scenes = [sample_scene(rng) for _ in range(2)]
    latents = pipe.autoencoder.encode(render(scenes).float() / 127.5 - 1)
    words = [caption(scene, rng) for scene in scenes]
    made = {k: redraw(pipe, latents, words, torch.Generator().manual_seed(0), start=k, steps=6) for k in (0, 3, 6)}
    assert torch.equal(made[6], latents)
    # From the first step on, nothing of the latents is kept: it is the pipeline's own drawing from that noise.
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    drawn = pipe(words, latents=noise, num_inference_steps=6, guidance_scale=5.5, output_type="latent").images
    torch.testing.assert_close(made[0], drawn, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(made[3], drawn, atol=1e-2)


def test_shards_depend_on_their_number_alone_and_join_a_running_pool(tmp_path):
    pipe = tiny_pipeline()
    with pytest.raises(FileNotFoundError, match="no redrawn latents"):
        RedrawnPool(tmp_path)
    write_redrawn(tmp_path, 0, pipe, size=3)
    pool = RedrawnPool(tmp_path)
    write_redrawn(tmp_path, 1, pipe, size=3)
    write_redrawn(tmp_path / "again", 0, pipe, size=3)
    assert len(pool.scenes) == 3
    pool.refresh()
    assert len(pool.scenes) == 6
    assert torch.equal(pool.latents[0], RedrawnPool(tmp_path / "again").latents[0])
    latents, scenes = pool.draw(40, random.Random(0))
    for row, scene in zip(latents, scenes, strict=True):
        k, i = divmod(pool.scenes.index(scene), 3)
        assert torch.equal(row, pool.latents[k][i].float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"redrawn_share": 1.5}, "redrawn_share 1.5"),
        ({"noise": -0.1}, "noise -0.1"),
        ({"decoder_rate": 0.0}, "decoder_rate 0.0"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        CrispConfig(**options)


def test_the_stage_runs_publishes_and_goes_on(tmp_path):
    folder, state = tmp_path / "published", tmp_path / "state"
    tiny_pipeline().save_pretrained(folder)
    before = Autoencoder.from_pretrained(folder / "autoencoder")
    loop = {"minutes": 0.02, "batch_size": 4, "learning_rate": 0.02, "muon": False, "warmup": 1}
    config = {
        "state": str(state),
        "crisp": {
            "shards": 1,
            "shard_size": 4,
            "trainer": loop,
            "stage": {"adversary_after": 1, "critic_first": 1, "critic_steps": 2, "refine_depth": 1},
        },
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    run.run_stages(str(tmp_path / "tiny.yaml"), stages=["crisp"], init_from=folder)
    rows = [json.loads(line) for line in (state / "crisp" / "log.jsonl").read_text().splitlines()]
    assert {"sharp", "psnr"} <= set(rows[-1])
    assert (state / "crisp" / "preview.png").is_file()
    after = Autoencoder.from_pretrained(state / "model" / "autoencoder")
    assert after.config.refine_depth == 1
    pictures = torch.rand(1, 3, 128, 128) * 2 - 1
    torch.testing.assert_close(after.encode(pictures), before.encode(pictures), atol=0.02, rtol=0.02)  # bf16
    assert not torch.allclose(after(pictures), before(pictures), atol=1e-3)
    more = (rows[-1]["seconds"] + 2) / 60
    run.run_stages(str(tmp_path / "tiny.yaml"), stages=["crisp"], init_from=folder, minutes=more)
    again = [json.loads(line) for line in (state / "crisp" / "log.jsonl").read_text().splitlines()]
    assert again[-1]["step"] > rows[-1]["step"] > 0
