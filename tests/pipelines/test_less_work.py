"""Less work a picture on a tiny random pipeline of ours: what equals the full picture, and what is computed."""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import seeded, tiny_pipeline
from torch import nn

from mm.core.errors import UserError
from mm.models.cache import PromptCache
from mm.pipelines.code_filling import neighbours, planned, revised
from mm.pipelines.fast import (
    CAREFUL_CODES,
    FULL_CODES,
    LEVELS,
    SIMILARITY,
    FastCodes,
    FastFlow,
    fast_settings,
    flow_plan,
    similarity_at,
)
from mm.pipelines.sampling import code_steps, halton_places, masked_steps

ALL: dict[str, Any] = {"guided": 1.0, "features": 1.0, "spaced": False}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


def draw(pipe: Any, prompt: Any = "two red cats on grass", **options: Any) -> torch.Tensor:
    """Pictures (B, 3, 128, 128) with the steps that the settings say."""
    return pipe(prompt, output_type="pt", **options).images


def rows_of(pipe: Any, part: str) -> list[int]:
    rows: list[int] = []

    def count(_: nn.Module, args: tuple[Any, ...]) -> None:
        rows.append(len(args[0]))

    handle = getattr(pipe, part).register_forward_pre_hook(count)
    rows_of.handles.append(handle)  # type: ignore[attr-defined]
    return rows


rows_of.handles = []  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _no_hooks():
    yield
    while rows_of.handles:  # type: ignore[attr-defined]
        rows_of.handles.pop().remove()  # type: ignore[attr-defined]


def test_settings_that_leave_nothing_out_change_no_bit(pipe: Any):
    plain = draw(pipe, num_inference_steps=5, generator=seeded(1))
    assert torch.equal(draw(pipe, generator=seeded(1), fast=ALL | {"steps": 5}), plain)
    never = ALL | {"threshold": 1.5}
    assert torch.equal(draw(pipe, num_inference_steps=5, generator=seeded(1), fast=never), plain)


def plain_codes(pipe: Any, prompt: str, seed: int, fill: int, again: int) -> torch.Tensor:
    """The latents that codes mode draws with nothing left out, as its docstrings say: one loop, whole batches."""
    generator, side = seeded(seed)[0], int(pipe.trunk.config.latent_size)
    tokens, channels, levels = side * side, pipe.bridge.config.channels, pipe.bridge.config.levels
    order, left = torch.randperm(tokens, generator=generator), masked_steps(tokens, fill)
    revisions = [torch.randperm(tokens, generator=generator)[: tokens // 4] for _ in range(again)]
    uniform = torch.rand(tokens, channels, levels, generator=generator).clamp(1e-9, 1 - 1e-7)
    gumbel, caches = -(-uniform.log()).log(), PromptCache.cat(list(pipe.encode_prompt([prompt])))
    steps = [(order[tokens - a :], order[tokens - a : tokens - b], 1.0) for a, b in pairwise([tokens, *left]) if a]
    steps += [(some, some, 1 - 0.9 * (k + 1) / again) for k, some in enumerate(revisions)]
    codes, latents = torch.zeros(tokens, channels, dtype=torch.int64), torch.zeros(1, channels, side, side)
    for masked, now, heat in steps:
        open_L = torch.zeros(tokens, dtype=torch.bool).index_fill(0, masked, True)
        rows = open_L.expand(2, -1)
        prompted, empty = pipe.trunk(latents.repeat(2, 1, 1, 1), rows.float(), caches, "codes", rows)
        features = empty + (1 + 2 * (1 - open_L.float().mean())) * (prompted - empty)
        codes[now] = pipe.code_head.sample(features[now], gumbel[now], temperature=0.9 * heat)
        open_L[now] = False
        values = pipe.bridge.dequantize(codes.T.unflatten(1, (side, side))[None])
        latents = values.masked_fill(open_L.unflatten(0, (side, side)), 0.0)
    return latents


@torch.no_grad()
def test_codes_mode_with_nothing_left_out_is_a_plain_loop(pipe: Any):
    none = asdict(FULL_CODES) | {"steps": 8}
    for seed in (1, 2):
        wanted = plain_codes(pipe, "a dog", seed, fill=5, again=3)
        got = pipe("a dog", mode="codes", generator=seeded(seed), fast=none, output_type="latent").images
        assert torch.allclose(got, wanted, atol=1e-5)


def test_unconditional_features_are_computed_where_guidance_counts(pipe: Any):
    trunk = rows_of(pipe, "trunk")
    plain = {"mode": "codes", "generator": seeded(1), "output_type": "latent"}
    none = asdict(FULL_CODES) | {"steps": 8}
    full = pipe("a dog", fast=none, **plain).images
    known = [1 - left / 64 for left in (64, *masked_steps(64, 5)[:-1])] + [0.75] * 3
    assert trunk == [1] + [2] * 7  # guidance of an empty picture is zero
    for settings in ({"guided_from": 0.3}, {"guided_until": 0.7}, {"guided_from": 0.2, "guided_until": 0.5}):
        trunk.clear()
        pipe("a dog", fast=none | settings, **plain)
        low, high = settings.get("guided_from", 0.0), settings.get("guided_until", 1.0)
        assert trunk == [2 if share > 0 and low <= share <= high else 1 for share in known], settings
    never = pipe("a dog", fast=none | {"guided_from": 1.0}, **plain).images
    assert torch.equal(never, pipe("a dog", fast=none, guidance_scale=1.0, **plain).images)
    assert not torch.equal(never, full)


def test_spaced_levels_end_a_step_above_zero(pipe: Any):
    plain = draw(pipe, generator=seeded(1), sigmas=[1, 0.75, 0.5, 0.25])
    assert torch.equal(draw(pipe, generator=seeded(1), fast=ALL | {"steps": 4, "spaced": True}), plain)


def test_each_part_computes_what_the_plan_says(pipe: Any):
    trunk, decoder = rows_of(pipe, "trunk"), rows_of(pipe, "velocity_decoder")
    draw(pipe, generator=seeded(1), fast={"steps": 8, "guided": 0.5, "features": 1.0})
    assert trunk == decoder == [2] * 4 + [1] * 4
    trunk.clear(), decoder.clear()
    plan = flow_plan(FastFlow(steps=8, guided=0.5, features=0.75), [1 - step / 8 for step in range(8)])
    draw(pipe, fast={"steps": 8, "guided": 0.5, "features": 0.75}, generator=seeded(1))
    assert decoder == [2] * 4 + [1] * 4 and len(trunk) == len(plan.refreshed) == 6 and 0 in plan.refreshed
    trunk.clear(), decoder.clear()
    draw(pipe, generator=seeded(1), fast=ALL | {"steps": 6, "threshold": -1})
    assert decoder == [2, 1, 1, 1, 1, 1]
    decoder.clear()
    draw(pipe, generator=seeded(1), fast=ALL | {"steps": 6, "linear": True})
    assert decoder == [2, 2, 1, 2, 1, 2]
    decoder.clear()
    draw(pipe, generator=seeded(1), fast=True)
    assert len(decoder) == FastFlow().steps


def test_ended_guidance_is_a_callback_that_ends_it(pipe: Any):
    """`_guidance_scale` set to 1 after a step: the same velocities, computed in full."""

    def end(run: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            run._guidance_scale = 1.0
        return {}

    wanted = draw(pipe, num_inference_steps=6, generator=seeded(1), callback_on_step_end=end)
    got = draw(pipe, generator=seeded(1), fast=ALL | {"steps": 6, "guided": 0.5})
    assert (got - wanted).abs().max() < 1e-5


def test_a_picture_does_not_depend_on_its_batch(pipe: Any):
    prompts = ["two red cats on grass", "a dog", "three stars at night"]
    codes = asdict(FULL_CODES) | {"steps": 10}
    for fast in ({"mode": "flow", "fast": True}, {"mode": "flow", "fast": ALL | {"steps": 6, "threshold": 0.99}},
                 {"mode": "codes", "fast": codes | {"confidence": -4.0, "neighbours": True}},
                 {"mode": "codes", "fast": {"steps": 10, "confidence": -4.0}},
                 {"mode": "codes", "fast": codes | {"full_every": 3}}):  # fmt: skip
        together = draw(pipe, prompts, generator=seeded(1, 2, 3), **fast)
        alone = [draw(pipe, one, generator=seeded(seed), **fast) for seed, one in enumerate(prompts, 1)]
        assert (together - torch.cat(alone)).abs().max() < 2 / 255, fast


def test_confident_neighbours_save_steps(pipe: Any):
    steps: list[int] = []

    def note(run: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return {}

    for confidence in (None, -1e9):
        draw(pipe, mode="codes", generator=seeded(1), callback_on_step_end=note,
             fast=asdict(FULL_CODES) | {"steps": 16, "confidence": confidence, "neighbours": True})  # fmt: skip
    first, second = steps[: steps.index(0, 1)], steps[steps.index(0, 1) :]
    # every neighbour is sure enough: the known area grows by a ring a step
    assert first == list(range(16)) and len(second) < 12


def test_local_steps_equal_full_ones_where_nothing_else_changed(pipe: Any):
    trunk, generator = pipe.trunk, torch.Generator().manual_seed(0)
    side, tokens = int(trunk.config.latent_size), int(trunk.config.latent_size) ** 2
    prompt = PromptCache.cat([pipe.encode_prompt(["two red cats"])[0], pipe.encode_prompt(["a dog"])[0]])
    before, after = (torch.randn(2, int(trunk.config.latent_channels), side, side, generator=generator) for _ in "ab")
    masked = torch.rand(2, tokens, generator=generator) < 0.5
    with torch.no_grad():
        whole = trunk(after, masked.float(), prompt, "codes", masked)
        features, cache = trunk.full_step(before, masked, prompt)
        assert torch.allclose(features, trunk(before, masked.float(), prompt, "codes", masked), atol=1e-6)
        some = torch.stack([torch.randperm(tokens, generator=generator)[:5] for _ in range(2)])
        same = trunk.local_step(before, masked, cache, some)
        assert torch.allclose(same, features[torch.arange(2)[:, None], some], atol=1e-5)
        every = torch.arange(tokens).expand(2, -1)
        assert torch.allclose(trunk.local_step(after, masked, cache, every), whole, atol=1e-5)


def test_the_schedule_goes_on_from_what_is_known():
    order = torch.tensor([[3, 1, 0, 2, 4, 5]])
    known = torch.tensor([[False, True, False, False, False, False]])
    assert planned(order, known, [5, 3, 1, 0])[0].nonzero().flatten().tolist() == [0, 3]  # 5 masked become 3
    assert not planned(order, torch.ones(1, 6, dtype=torch.bool), [5, 3, 1, 0]).any()
    near = neighbours((2, 3))
    assert near[0].nonzero().flatten().tolist() == [1, 3, 4] and torch.equal(near, near.T)


def test_revisions_take_unsure_tokens_in_their_order():
    plan = list(code_steps(seeded(3), 16, 8, revisions=3, revised=0.25))[-1]
    log = torch.full((1, 16), -0.1)
    assert torch.equal(revised(plan, log, None), plan.masked_BL) and not revised(plan, log, -0.5).any()
    unsure = plan.order_BL[0, [1, 5, 9, 12, 14, 15]]
    log[0, unsure] = -2.0
    assert sorted(revised(plan, log, -0.5)[0].nonzero().flatten().tolist()) == sorted(unsure[:4].tolist())


def test_spread_tokens_of_a_step_lie_apart():
    """In a Halton order all places come once; a revision of half of the tokens takes none that share an edge."""
    assert halton_places((2, 3)) == ((0, 0), (1, 1), (0, 2), (1, 0), (0, 1), (1, 2))
    assert sorted(halton_places((8, 8))) == [(y, x) for y in range(8) for x in range(8)]
    given: dict[str, Any] = {"revisions": 2, "revised": 0.5, "shape": (8, 8)}
    steps, again, other = (list(code_steps(seeded(seed), 64, 8, **given)) for seed in (1, 1, 2))
    filled = torch.cat([step.now_BN for step in steps[:-2]], 1)
    assert sorted(filled[0].tolist()) == list(range(64))
    assert torch.equal(filled, torch.cat([step.now_BN for step in again[:-2]], 1))
    assert not torch.equal(filled, torch.cat([step.now_BN for step in other[:-2]], 1))
    first, second = (set(step.now_BN[0].tolist()) for step in steps[-2:])
    assert not first & second and len(first) == len(second) == 32
    assert all({at - 8, at + 8}.isdisjoint(first) and (at % 8 == 7 or at + 1 not in first) for at in first)


def test_a_power_draws_the_first_tokens_singly():
    assert masked_steps(64, 6, 3.0) == [63, 61, 56, 45, 26, 0]
    assert masked_steps(64, 4, 1.0) == [48, 32, 16, 0]
    assert masked_steps(3, 5, 3.0) == [2, 1, 0, 0, 0] and masked_steps(64, 1, 3.0) == [0]
    drawn = [step.now_BN.shape[1] for step in code_steps(seeded(1), 64, 6, revisions=0, revised=0, power=3.0)]
    assert drawn == [1, 2, 5, 11, 19, 26]


def test_similarity_lies_between_its_levels():
    for row, first in enumerate(LEVELS):
        for column, second in enumerate(LEVELS):
            assert similarity_at(first, second) == pytest.approx(SIMILARITY[row][column], abs=1e-9)
    middle = similarity_at((LEVELS[2] + LEVELS[3]) / 2, LEVELS[5])
    assert middle == pytest.approx((SIMILARITY[2][5] + SIMILARITY[3][5]) / 2)
    assert similarity_at(0.001, LEVELS[-1]) == pytest.approx(1)


@pytest.mark.parametrize(
    "mode, given, said",
    [
        ("flow", {"steps": 0}, "steps is 0"), ("flow", {"guided": 1.5}, "guided is 1.5"),
        ("flow", {"spaced": 1}, "spaced is 1"),
        ("flow", {"features": "all"}, "features is 'all'"), ("flow", {"threshold": 5}, "threshold is 5"),
        ("flow", {"confidence": -1}, "no setting 'confidence'"), ("codes", {"guided": 1}, "no setting 'guided'"),
        ("codes", {"confidence": 0.5}, "confidence is 0.5"), ("codes", {"full_every": 0}, "full_every is 0"),
        ("codes", {"revising": 1}, "revising is 1"), ("codes", {"revised": -0.1}, "revised is -0.1"),
        ("codes", {"neighbours": "no"}, "neighbours is 'no'"), ("codes", {"guided_from": 2}, "guided_from is 2"),
        ("codes", {"guided_until": None}, "guided_until is None"),
        ("codes", {"full_every": 2, "guided_until": 0.5}, "full_every is 2"),
        ("codes", {"guided_from": 0.9, "guided_until": 0.1}, "guided_from is 0.9 and guided_until 0.1"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_before_anything_is_drawn(pipe: Any, mode: str, given: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        draw(pipe, mode=mode, fast=given)


def test_the_mix_is_frozen():
    """Changing it is a line in CHANGELOG.md: pictures of `--fast` change."""
    assert FastFlow() == FastFlow(steps=8, spaced=True, guided=0.6, features=0.75, threshold=None, linear=False)
    codes: dict[str, Any] = {"confidence": None, "neighbours": False, "full_every": 1}
    cheap = {"revised": 0.5, "spread": True, "power": 3.0, "guided_from": 0.05, "guided_until": 0.45}
    assert FastCodes() == FastCodes(steps=9, revising=0.34, tries=3, unchecked_steps=26, **cheap, **codes)
    assert FastCodes().revisions(9) == 3
    full = {"revised": 0.25, "spread": False, "power": None, "guided_from": 0.0, "guided_until": 1.0}
    assert FULL_CODES == FastCodes(steps=32, revising=0.375, tries=1, **full, **codes)
    careful = codes | {"confidence": -0.4, "neighbours": True}
    assert CAREFUL_CODES == FastCodes(steps=26, revising=0.375, tries=1, **full, **careful)
    assert fast_settings("codes", {"steps": 7})["steps"] == 7
