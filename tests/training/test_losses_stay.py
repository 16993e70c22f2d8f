"""Three steps of every stage on tiny models give the losses that were recorded before the stages shared one trainer.

Recorded on x86-64 with bf16 autocast; another machine rounds otherwise, hence the tolerance.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_reader

from mm.models.text import build_text_tokenizer
from mm.models.understanding_encoder import UnderstandingEncoder
from mm.tokenizers import Autoencoder
from mm.training import counter_stage, drawing_stage, judge_stage, stem_stage, tokenizer_stage, understanding_stage
from mm.training.conversations import READ
from mm.training.edit_pairs import EditCache, write_edit_shard
from mm.training.joint_losses import Joint, JointConfig
from mm.training.joint_stage import JointBatches
from mm.training.latents import LatentCache, write_shard
from mm.training.trainer import Trainer, TrainerConfig
from mm.world.judge import Judge, JudgeConfig
from mm.world.scene import sample_scene

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "training_losses.json").read_text())
CONFIG = TrainerConfig(minutes=1, batch_size=4, decay_share=0.0, warmup=2)
CONVOLUTIONS = {"encoder_widths": (8, 8, 8), "decoder_widths": (8, 8, 8), "refine_width": 4}


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Path:
    folder, autoencoder = tmp_path_factory.mktemp("state"), tiny_reader()["autoencoder"]
    write_shard(folder / "latents", 0, autoencoder, size=32)
    write_edit_shard(folder / "edits", 0, autoencoder, size=32)
    return folder


def drawing(state: Path) -> tuple[Any, Any, Any]:
    config = drawing_stage.DrawingConfig(codes_share=0.5, align_layer=1, codes_tokens=4)
    parts = tiny_reader()
    torch.manual_seed(0)
    drawn = (parts[name] for name in ("trunk", "velocity_decoder", "code_head", "bridge"))
    module = drawing_stage.Drawing(*drawn, config)
    return module, drawing_stage.DrawingBatches(LatentCache(state / "latents"), config, 4, 0), CONFIG


def understanding(_: Path) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    encoder = UnderstandingEncoder(width=16, depth=1, heads=2, text_width=16, text_depth=1)
    tokenizer = build_text_tokenizer()

    def batches(step: int, process: int) -> Any:
        rng = random.Random(f"understanding 0 {step} {process}")
        scenes = [sample_scene(rng, **READ) for _ in range(4)]
        texts = understanding_stage.captions_for(scenes, rng)
        words = tokenizer(texts, padding="max_length", max_length=64, return_tensors="pt")
        return understanding_stage.make_batch(scenes, words.input_ids)

    module = understanding_stage.Understanding(encoder, understanding_stage.UnderstandingConfig())
    return module, batches, CONFIG


def stem(state: Path) -> tuple[Any, Any, Any]:
    parts, cache = tiny_reader(), LatentCache(state / "latents")

    def batches(step: int, process: int) -> Any:
        rng = random.Random(f"stem 0 {step} {process}")
        latents, scenes = cache.draw(4, rng)
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        return stem_stage.make_batch(scenes, latents, generator, stem_stage.StemConfig())

    return stem_stage.Stem(parts["latent_stem"], parts["understanding_encoder"]), batches, CONFIG


def counter(state: Path) -> tuple[Any, Any, Any]:
    parts, config = tiny_reader(), counter_stage.CounterConfig()
    cache = LatentCache(state / "latents")
    maker = counter_stage.BlockMaker(parts["understanding_encoder"], parts["latent_stem"], cache, 4, config)
    blocks = counter_stage.Blocks(lambda k: maker(k, 0), 0, config)
    module = counter_stage.Counting(parts["understanding_connector"].counter)
    return module, lambda step, process: blocks(step), CONFIG


def joint(state: Path) -> tuple[Any, Any, Any]:
    config = JointConfig(codes_share=0.5, align_layer=1, codes_tokens=4, nouns_layer=0, relations_layer=0)
    parts = tiny_reader()
    connector = parts["understanding_connector"]
    torch.manual_seed(0)
    module = Joint(
        *(parts[name] for name in ("trunk", "velocity_decoder", "code_head", "bridge")),
        encoder=parts["understanding_encoder"],
        latent_stem=parts["latent_stem"],
        understanding_connector=connector,
        counter=connector.counter,
        config=config,
    )
    connector.counter = None
    make = JointBatches(LatentCache(state / "latents"), EditCache(state / "edits"), config, 4, 0)
    found: dict[str, Any] = {}
    for step in range(40):
        batch = make(step)
        found.setdefault(type(batch).__name__, batch)
    tasks = [found[name] for name in ("ReadBatch", "EditBatch", "DrawingBatch")]
    return module, lambda step, process: tasks[step], CONFIG


def autoencoder(_: Path) -> tuple[Any, Any, Any]:
    settings = tokenizer_stage.TokenizerConfig(pool_start=16, pool_size=64)
    config = TrainerConfig(minutes=1, batch_size=4, learning_rate=2e-3, warmup=2, schedule="cosine")
    torch.manual_seed(0)
    model = Autoencoder(**CONVOLUTIONS)
    torch.manual_seed(0)
    return tokenizer_stage.TokenizerTraining(model, settings), tokenizer_stage.PoolBatches(settings, 4, 0), config


def judge(_: Path) -> tuple[Any, Any, Any]:
    settings = judge_stage.JudgeStageConfig(fresh=4, start=16, ring=32)
    config = TrainerConfig(**judge_stage.JUDGE_TRAINER | {"batch_size": 8, "warmup": 2, "minutes": 1})
    torch.manual_seed(0)
    module = judge_stage.JudgeTraining(Judge(JudgeConfig(stem=8, width=8, deep=16, deep_blocks=1)))
    return module, judge_stage.JudgeBatches(settings, 8, 0), config


STAGES: dict[str, Callable[[Path], tuple[Any, Any, Any]]] = {
    f.__name__: f for f in (drawing, understanding, stem, counter, joint, autoencoder, judge)
}
OPTIMIZERS: dict[str, Any] = {
    "autoencoder": lambda module, config: module.optimizers(config),
    "judge": judge_stage.adamw,
}


@pytest.mark.parametrize("name", STAGES)
def test_the_losses_of_three_steps_are_the_recorded_ones(state: Path, tmp_path: Path, name: str) -> None:
    module, batches, config = STAGES[name](state)
    optimizers = OPTIMIZERS[name](module, config) if name in OPTIMIZERS else None
    trainer = Trainer(module, tmp_path, config, optimizers=optimizers)
    trainer.module.train()
    for step, wanted in enumerate(RECORDED[name]):
        losses = trainer.train_step(batches(step, 0))
        assert losses.keys() == wanted.keys()
        assert losses == pytest.approx(wanted, rel=0.05, abs=0.02), f"step {step}"
