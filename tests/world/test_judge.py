"""The judge: its decoding against closed forms, its files, its pictures, and the shipped one on fresh renders."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from mm.core.errors import UserError
from mm.training.judge_check import agrees, ceilings
from mm.training.judge_losses import answer_table, losses
from mm.training.judge_pictures import UNREADABLE_SHARE, JudgeBatch, Ring, melt, sample_judge_scene, truth, warp, wreck
from mm.training.judge_stage import JUDGE_TRAINER, JudgeStageConfig, make_stage
from mm.training.trainer import TrainerConfig
from mm.world import vocabulary as v
from mm.world.judge import GRID, SIZE_UNIT, STRIDE, TINTS, Judge, JudgeConfig, Raw, bump, decode
from mm.world.render import render
from mm.world.scene import Scene, Sprite

TINY = JudgeConfig(stem=4, width=8, deep=8, deep_blocks=1)


def tiny_judge() -> Judge:
    torch.manual_seed(0)
    judge = Judge(TINY)
    with torch.no_grad():
        for name, t in judge.state_dict().items():
            if name.endswith("running_mean"):
                t.uniform_(-0.1, 0.1)
    return judge.eval()


def perfect(scenes: list[Scene]) -> Raw:
    """The outputs of a judge that makes no mistake, computed cell by cell."""
    n = len(scenes)
    raw = Raw(
        centre_BGG=torch.full((n, GRID, GRID), -20.0),
        object_BOGG=torch.zeros(n, len(v.ALL_OBJECTS), GRID, GRID),
        colour_BKGG=torch.full((n, len(TINTS), GRID, GRID), -9.0),
        offset_B2GG=torch.zeros(n, 2, GRID, GRID),
        size_BGG=torch.zeros(n, GRID, GRID),
        background_BN=torch.zeros(n, len(v.BACKGROUNDS)),
        style_BN=torch.zeros(n, len(v.STYLES)),
        readable_B=torch.full((n,), 9.0),
    )
    for b, scene in enumerate(scenes):
        raw.background_BN[b, v.BACKGROUNDS.index(scene.background)] = 9
        raw.style_BN[b, v.STYLES.index(scene.style)] = 9
        for s in scene.sprites:
            for row in range(GRID):
                for column in range(GRID):
                    dx, dy = s.x / STRIDE - column - 0.5, s.y / STRIDE - row - 0.5
                    height = float(bump(torch.tensor(dx * dx + dy * dy)))
                    if height < 0.05:
                        continue
                    raw.centre_BGG[b, row, column] = torch.logit(torch.tensor(min(height, 0.9999)))
                    raw.object_BOGG[b, v.ALL_OBJECTS.index(s.object), row, column] = 20
                    for k, colour in enumerate(TINTS):
                        raw.colour_BKGG[b, k, row, column] = 9 if v.counts_as(s.object, s.colour, colour) else -9
                    raw.offset_B2GG[b, :, row, column] = torch.tensor((dx, dy))
                    raw.size_BGG[b, row, column] = s.size / SIZE_UNIT
    return raw


def scenes_for(seed: str, count: int) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_judge_scene(rng) for _ in range(count)]


def test_config_rejects_bad_values():
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        JudgeConfig(width=0)
    with pytest.raises(ValueError, match=r"threshold must lie between 0 and 1, got 1\.5"):
        JudgeConfig(threshold=1.5)
    with pytest.raises(ValueError, match="want 0 < fresh <= start <= ring, got 9 8 16"):
        JudgeStageConfig(fresh=9, start=8, ring=16)


def test_perfect_outputs_decode_to_the_scene():
    scenes = scenes_for("decode", 40)
    for reading, scene in zip(decode(perfect(scenes), 0.5), scenes, strict=True):
        assert reading.readable
        assert reading.style == scene.style
        assert reading.background == scene.background
        assert agrees(reading, scene, near=0.01)
        assert all(f.confidence > 0.95 for f in reading.objects)
        sizes = sorted(s.size for s in scene.sprites)
        assert sorted(f.size for f in reading.objects) == pytest.approx(sizes)


def test_a_centre_on_a_cell_corner_is_found_once_with_full_confidence():
    scene = Scene(sprites=(Sprite(object="cat", x=64, y=48, size=44),))
    (found,) = decode(perfect([scene]), 0.5)[0].objects
    assert (found.x, found.y) == pytest.approx((64, 48))
    assert found.confidence > 0.99


def test_confidence_below_the_threshold_does_not_count():
    raw = perfect([Scene(sprites=(Sprite(object="cat", x=64, y=48, size=44),))])
    weak = replace(raw, centre_BGG=raw.centre_BGG - 3)
    assert decode(weak, 0.5)[0].objects == ()
    assert len(decode(weak, 0.05)[0].objects) == 1
    torn = raw.object_BOGG.clone()
    torn[:, v.ALL_OBJECTS.index("tiger")] = torn[:, v.ALL_OBJECTS.index("cat")] + 0.1
    (found,) = decode(replace(raw, object_BOGG=torn), 0.5)[0].objects
    assert found.object == "tiger"
    assert found.confidence < 0.55


def test_colours_answer_like_the_vocabulary():
    sprites = [("apple", "red"), ("apple", None), ("apple", "blue"), ("fox", "red"), ("fox", None), ("wolf", None)]
    for name, tint in sprites:
        scene = Scene(sprites=(Sprite(object=name, colour=tint, x=60, y=60, size=44),))
        (found,) = decode(perfect([scene]), 0.5)[0].objects
        for colour in TINTS:
            assert found.answers_to(colour) == v.counts_as(name, tint, colour)
        assert v.counts_as(name, tint, found.colour)


def test_no_colour_and_no_ground_where_the_style_shows_none():
    scene = Scene(sprites=(Sprite(object="apple", x=60, y=60, size=44),), style="sketch")
    raw = perfect([scene])
    raw.background_BN[0] = torch.tensor([9.0, 0, 0, 0, 0, 0])
    (reading,) = decode(raw, 0.5)
    assert reading.background == "plain"
    assert reading.objects[0].colour is None
    assert not reading.objects[0].answers_to("red")


def test_reading_does_not_depend_on_the_batch():
    judge = tiny_judge()
    pictures = render(scenes_for("batch", 3))
    many = torch.cat([pictures] * 23)  # 69: more than one internal batch
    readings = judge.read(many)
    assert len(readings) == 69
    assert readings[:3] == readings[66:]
    assert [r.style for r in readings[:3]] == [judge.read(p[None])[0].style for p in pictures]
    assert judge.read(many) == readings
    assert judge.read(pictures[:0]) == []


def test_reading_leaves_a_training_judge_training():
    judge = tiny_judge().train()
    before = judge.stem[1][1].running_mean.clone()
    judge.read(render(scenes_for("mode", 1)))
    assert judge.training
    assert torch.equal(before, judge.stem[1][1].running_mean)


def test_wrong_pictures_are_refused():
    with pytest.raises(ValueError, match=r"uint8.*got torch\.float32"):
        tiny_judge().read(torch.zeros(1, 3, 128, 128))
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 64\)"):
        tiny_judge().read(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_save_and_load(tmp_path):
    judge = tiny_judge()
    judge.save_pretrained(tmp_path)
    again = Judge.from_pretrained(tmp_path)
    assert again.config == TINY
    assert not again.training
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    pictures = render(scenes_for("files", 2)).float() / 255
    assert torch.allclose(judge(pictures).centre_BGG, again(pictures).centre_BGG, atol=0.05)
    config = json.loads((tmp_path / "config.json").read_text())
    config["objects"][0] = "lynx"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="other objects"):
        Judge.from_pretrained(tmp_path)
    config["objects"][0] = "cat"
    (tmp_path / "config.json").write_text(json.dumps(config | {"colour": 3}))
    with pytest.raises(UserError, match="is no config of a judge"):
        Judge.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no judge in"):
        Judge.from_pretrained(tmp_path / "nowhere")


def batch_of(scenes: list[Scene]) -> JudgeBatch:
    sprites, background, style = truth(scenes)
    readable = torch.ones(len(scenes), dtype=torch.bool)
    pictures = render(scenes).float() / 255
    return JudgeBatch(
        pictures_BCHW=pictures, sprites_BS5=sprites, background_B=background, style_B=style, readable_B=readable
    )


def test_losses_vanish_for_perfect_outputs_and_only_for_them():
    scenes = scenes_for("loss", 6)
    batch, raw = batch_of(scenes), perfect(scenes)
    parts = losses(raw, batch, answer_table())
    assert all(float(x) < 0.02 for x in parts.values()), parts
    wrong = losses(replace(raw, offset_B2GG=raw.offset_B2GG.flip(1), style_BN=-raw.style_BN), batch, answer_table())
    assert float(wrong["place"]) > 0.05
    assert float(wrong["style"]) > 1
    unread = replace(batch, readable_B=torch.zeros(len(scenes), dtype=torch.bool))
    parts = losses(raw, unread, answer_table())
    assert {name for name, x in parts.items() if float(torch.nan_to_num(x)) > 0} == {"readable"}


def test_warps_move_the_labels_along():
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(30, 98, (32, 2), generator=generator)
    pictures = torch.zeros(32, 3, 128, 128)
    sprites = torch.full((32, 6, 5), -1.0)
    for picture, rows, (x, y) in zip(pictures, sprites, places.tolist(), strict=True):
        picture[:, y - 10 : y + 10, x - 10 : x + 10] = 1
        rows[0] = torch.tensor([0, 0, x, y, 20])
    moved, rows = warp(pictures, sprites, generator)
    mass = moved.mean(1)
    at = torch.arange(128) + 0.5
    x = (mass.sum(1) * at).sum(1) / mass.sum((1, 2))
    y = (mass.sum(2) * at).sum(1) / mass.sum((1, 2))
    # The wobble adds up to about two pixels that the labels leave out.
    assert (x - rows[:, 0, 2]).abs().max() < 2.5
    assert (y - rows[:, 0, 3]).abs().max() < 2.5
    assert (rows[:, 0, 2:4] - places).abs().max() > 3


def test_wrecks_remove_the_label_of_the_sprite_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    scene = Scene(sprites=(Sprite(object="cat", x=40, y=40, size=44), Sprite(object="dog", x=90, y=90, size=44)))
    batch = batch_of([scene] * 40)
    pictures, sprites = wreck(batch.pictures_BCHW, batch.sprites_BS5, generator)
    wrecked = sprites[:, 0, 0] < 0
    assert 0 < int(wrecked.sum()) < 20
    assert torch.equal(sprites[:, 1], batch.sprites_BS5[:, 1])
    change = (pictures - batch.pictures_BCHW).abs().amax((1, 2, 3))
    assert torch.equal(change > 0.1, wrecked)
    assert torch.allclose(pictures[..., 72:, 72:], batch.pictures_BCHW[..., 72:, 72:], atol=1e-2)
    assert (melt(batch.pictures_BCHW[:1], generator) - batch.pictures_BCHW[:1]).abs().mean() > 0.02


def test_ring_draws_labelled_batches():
    ring = Ring(48, seed=1)
    ring.refill(40)
    ring.refill(16)
    assert ring.filled == 48
    assert ring.written == 56
    ring.add_decoded(torch.rand(4, 3, 128, 128))
    batch = ring.draw(32, torch.Generator().manual_seed(0))
    assert batch.pictures_BCHW.shape == (32, 3, 128, 128)
    assert 0 <= float(batch.pictures_BCHW.min()) <= float(batch.pictures_BCHW.max()) <= 1
    assert int((~batch.readable_B).sum()) == int(UNREADABLE_SHARE * 32)
    again = ring.draw(32, torch.Generator().manual_seed(0))
    assert torch.equal(batch.pictures_BCHW, again.pictures_BCHW)


def test_training_is_published_and_goes_on_where_it_stopped(tmp_path, capsys):
    settings = JudgeStageConfig(fresh=8, start=16, ring=32, check=4)

    def run(minutes: float):
        config = TrainerConfig(**JUDGE_TRAINER | {"batch_size": 8, "minutes": minutes})
        torch.manual_seed(0)
        return make_stage(Judge(TINY), settings, config, None, "judge").train(tmp_path)

    first = run(0.005)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert {"exact", "readable", "style", "background"} <= set(lines[-1])
    published = Judge.from_pretrained(tmp_path / "judge").state_dict()
    averages = first.average.tensors
    for name in ("cells.weight", "deep.0.1.running_mean"):  # trained weights, and statistics, are averages
        torch.testing.assert_close(published[name], averages[f"judge.{name}"], atol=2e-3, rtol=2e-3)
    second = run(first.seconds / 60 + 0.002)
    assert second.step > first.step > 0


def test_the_shipped_judge_reads_fresh_renders():
    judge = Judge.from_pretrained()
    scenes = scenes_for("fresh renders for the shipped judge", 96)
    readings = [r for i in range(0, 96, 32) for r in judge.read(render(scenes[i : i + 32]))]
    assert sum(agrees(r, s) for r, s in zip(readings, scenes, strict=True)) / 96 >= 0.95
    garbage = [torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8), torch.full((3, 128, 128), 128).byte()]
    a, b = render(scenes_for("two scenes that are blended", 2)).float()
    garbage.append(((a + b) / 2).byte())
    assert not any(r.readable for r in judge.read(torch.stack(garbage)))
    table = ceilings(judge, per_task=16)
    assert min(row["all"] for row in table.values()) >= 0.85
