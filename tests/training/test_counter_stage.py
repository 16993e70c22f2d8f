"""The counter stage: blocks depend on their number alone, are reused, and train a counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny_reader

from mm.models.connectors import SameObjectCounter
from mm.training import counter_stage as stage
from mm.training.latents import LatentCache, write_shard

TOKENS = 16


def numbered(k: int) -> stage.CounterBatch:
    none = torch.zeros(1, 1, 1)
    return stage.CounterBatch(merged_BSC=none.half() + k, same_kind_BSS=none, objects_BS=torch.full((1, 1), -1))


def test_a_step_takes_its_block_and_some_of_the_latest():
    config = stage.CounterConfig(again=3, window=5)
    first, again = (stage.Blocks(numbered, 0, config) for _ in range(2))
    used = [first(step).merged_BSC.flatten().tolist() for step in range(40)]
    assert all(blocks[0] == step and len(blocks) == 4 for step, blocks in enumerate(used))
    assert all(max(0, step - 4) <= k <= step for step, blocks in enumerate(used) for k in blocks)
    assert again(30).merged_BSC.flatten().tolist() == used[30]  # a resumed run makes the same batches


def test_blocks_alternate_between_pictures_and_latents_and_train_a_counter(tmp_path):
    parts = tiny_reader()
    write_shard(tmp_path, 0, parts["autoencoder"], size=32)
    encoder, stem = parts["understanding_encoder"], parts["latent_stem"]
    made = stage.BlockMaker(encoder, stem, LatentCache(tmp_path), 8, stage.CounterConfig())
    for k in (0, 1):
        first, again = made(k, 0), made(k, 0)
        assert torch.equal(first.merged_BSC, again.merged_BSC)
        assert first.merged_BSC.shape == (8, TOKENS, 4 * 16)
        assert first.same_kind_BSS.shape == (8, TOKENS, TOKENS)
        assert not torch.equal(first.same_kind_BSS, made(k, 1).same_kind_BSS)
    batch = made(0, 0)
    assert ((batch.objects_BS >= 0) == (batch.same_kind_BSS.sum(-1) > 0)).all()
    batch = replace(batch, merged_BSC=batch.merged_BSC.float())
    torch.manual_seed(0)
    module = stage.Counting(SameObjectCounter(64, 64, 16))
    learner = torch.optim.AdamW(module.parameters(), 1e-2)
    losses = []
    for _ in range(100):
        losses.append(sum(loss for name, loss in module(batch).items() if not name.startswith("_")))
        learner.zero_grad()
        losses[-1].backward()
        learner.step()
    assert losses[-1] < 0.1 * losses[0]
    assert module(batch)["_right"] > 0.8
    assert all(p.grad is None for part in (encoder, stem) for p in part.parameters())


def test_different_objects_of_two_pictures_are_distinguished():
    """Two tokens with equal features: a loss if their objects differ, wherever they are, and none if not."""
    torch.manual_seed(0)
    module = stage.Counting(SameObjectCounter(4, 4, 2))
    tokens = torch.randn(2, 1, 4)[:1].expand(2, 1, 4)
    same = torch.ones(2, 1, 1)
    apart = stage.CounterBatch(merged_BSC=tokens, same_kind_BSS=same, objects_BS=torch.tensor([[3], [5]]))
    slope, offset = module.counter.sharpness
    want = torch.nn.functional.softplus(slope + offset)  # keys of length 1 that are equal
    torch.testing.assert_close(module(apart)["different_kinds"], want)
    together = replace(apart, objects_BS=torch.tensor([[3], [3]]))
    alone = replace(apart, objects_BS=torch.tensor([[3], [-1]]))
    assert not module(together)["different_kinds"].any()
    assert not module(alone)["different_kinds"].any()


def test_wrong_settings_are_named():
    for name, value in (("noise", -1), ("again", -1), ("window", 0)):
        with pytest.raises(ValueError, match=f"{name} {value} must"):
            stage.CounterConfig(**{name: value})
