"""The code head: causal in the measured order, sampled as it is trained, the same at every batch size."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from mm.models.codes import CodeHead, smooth_rows

ORDER = [3, 0, 5, 1, 4, 2]
SMALL = {"order": ORDER, "levels": 8, "feature_width": 24, "width": 32, "depth": 2, "heads": 2, "ratio": 2}


def make_head(**changes) -> CodeHead:
    """A small head whose zero-initialized parts are awake."""
    torch.manual_seed(0)
    head = CodeHead(**{**SMALL, **changes}).eval()
    for parameter in head.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return head


def gumbel(*shape: int) -> torch.Tensor:
    return -torch.log(-torch.log(torch.rand(*shape).clamp(1e-6, 1 - 1e-6)))


def test_the_default_head_is_small_and_starts_undecided():
    head = CodeHead()
    assert sum(p.numel() for p in head.parameters()) <= 1.5e6
    logits = head(torch.randn(3, 256), torch.randint(0, 64, (3, 16)))
    assert logits.shape == (3, 16, 64) and logits.dtype == torch.float32
    assert not logits.any()


def test_a_channel_sees_those_before_it_in_the_measured_order():
    head, features, codes = make_head(), torch.randn(4, 24), torch.randint(0, 8, (4, 6))
    logits = head(features, codes)
    for place, channel in enumerate(ORDER):
        changed = codes.clone()
        changed[:, channel] = (changed[:, channel] + 3) % 8
        moved = (head(features, changed) - logits).abs().amax((0, 2)) > 1e-4
        assert moved.tolist() == [ORDER.index(k) > place for k in range(6)], channel


def test_a_token_sees_only_its_own_feature():
    head, features, codes = make_head(), torch.randn(4, 24), torch.randint(0, 8, (4, 6))
    changed = features.clone()
    changed[2] += 1
    moved = (head(changed, codes) - head(features, codes)).abs().amax((1, 2)) > 1e-4
    assert moved.tolist() == [False, False, True, False]


def test_it_equals_a_plain_loop():
    """One channel at a time, the whole prefix anew, explicit softmax: no cache, no mask, no batch."""
    head, features, codes = make_head(), torch.randn(3, 24), torch.randint(0, 8, (3, 6))
    logits = head(features, codes)
    for n in range(3):
        condition = F.silu(head.feature_in(features[n]))
        rows = [head.start] + [head.known.weight[k * 8 + codes[n, k]] for k in ORDER]
        for place, channel in enumerate(ORDER):
            x = torch.stack(rows[: place + 1])
            for layer in head.layers:
                x = plain_layer(layer, x, condition)
            shift, scale = head.modulation_out(condition).chunk(2)
            last = head.norm_out(x[-1]) * (1 + scale) + shift
            expected = last @ head.out_weight[place] + head.out_bias[place]
            torch.testing.assert_close(logits[n, channel], expected, atol=1e-4, rtol=1e-4)


def plain_layer(layer: torch.nn.Module, x_PW: torch.Tensor, condition_W: torch.Tensor) -> torch.Tensor:
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = layer.modulation(condition_W).chunk(6)
    normed = layer.norm_1(x_PW) * (1 + scale_a) + shift_a
    seen = torch.zeros_like(x_PW)
    for head in range(2):
        part = slice(16 * head, 16 * head + 16)
        q = layer.attn.norm_q(layer.attn.to_q(normed)[:, part])
        k = layer.attn.norm_k(layer.attn.to_k(normed)[:, part])
        v = layer.attn.to_v(normed)[:, part]
        for i in range(len(x_PW)):
            weights = torch.exp(torch.stack([q[i] @ k[j] / 4 for j in range(i + 1)]))
            seen[i, part] = (weights / weights.sum()) @ v[: i + 1]
    x_PW = x_PW + gate_a * layer.attn.to_out(seen)
    return x_PW + gate_f * layer.ff(layer.norm_2(x_PW) * (1 + scale_f) + shift_f)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 2.5])
def test_sampling_with_the_cache_equals_teacher_forcing(temperature):
    head, features, noise = make_head(), torch.randn(50, 24), gumbel(50, 6, 8)
    codes = head.sample(features, noise, temperature=temperature)
    assert codes.dtype == torch.int64 and codes.shape == (50, 6)
    logits = head(features, codes)  # of each channel, given the very prefix that was sampled
    wanted = logits + temperature * noise
    assert torch.equal(codes, wanted.argmax(-1))
    if temperature:
        assert torch.equal(codes, (logits / temperature + noise).argmax(-1))


def test_sampling_follows_the_logits():
    """Gumbel noise gives softmax frequencies; the second channel's are those given the first one."""
    head = make_head(order=[1, 0], levels=4)
    features = torch.randn(1, 24).expand(20000, -1)
    codes = head.sample(features, gumbel(20000, 2, 4))
    first = head(features[:1], torch.zeros(1, 2, dtype=torch.int64))[0, 1].softmax(-1)
    counted = torch.bincount(codes[:, 1], minlength=4) / 20000
    torch.testing.assert_close(counted, first, atol=0.015, rtol=0)
    best = int(counted.argmax())
    second = head(features[:1], torch.tensor([[0, best]]))[0, 0].softmax(-1)
    given = codes[codes[:, 1] == best, 0]
    torch.testing.assert_close(torch.bincount(given, minlength=4) / len(given), second, atol=0.03, rtol=0)


def test_guidance_moves_logits_away_from_the_empty_prompt():
    head, features, empty, noise = make_head(), torch.randn(40, 24), torch.randn(40, 24), gumbel(40, 6, 8)
    codes = head.sample(features, noise, empty_ND=empty, guidance=3.0)
    prompted, unprompted = head(features, codes), head(empty, codes)
    assert torch.equal(codes, (unprompted + 3 * (prompted - unprompted) + noise).argmax(-1))
    assert torch.equal(head.sample(features, noise, empty_ND=empty, guidance=1.0), head.sample(features, noise))
    assert torch.equal(head.sample(features, noise, empty_ND=empty, guidance=0.0), head.sample(empty, noise))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_codes_at_any_batch_size(dtype):
    """Rule 1 of the architecture: in at least 99 of 100 tokens, and in fp32 nearly always."""
    head = make_head().to(dtype)
    features, noise = torch.randn(256, 24).to(dtype), gumbel(256, 6, 8)
    whole = head.sample(features, noise)
    parts = torch.cat([head.sample(f, n) for f, n in zip(features.split(32), noise.split(32), strict=True)])
    assert (whole == parts).all(1).float().mean() >= (0.99 if dtype == torch.float32 else 0.9)


def test_logits_are_fp32_under_autocast_and_near_the_exact_ones():
    head, features, codes = make_head(), torch.randn(30, 24), torch.randint(0, 8, (30, 6))
    exact = head(features, codes)
    with torch.autocast("cpu", torch.bfloat16):
        rough = head(features, codes)
    assert rough.dtype == torch.float32
    assert F.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.999


def test_every_part_learns():
    """Everything gets a gradient, except the rows of the last channel, which nobody reads."""
    head, codes = make_head().train(), torch.randint(0, 8, (64, 6))
    features = torch.randn(64, 24, requires_grad=True)
    F.cross_entropy(head(features, codes).flatten(0, 1), codes.flatten()).backward()
    assert features.grad is not None and features.grad.any()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert not head.known.weight.grad.view(6, 8, -1)[ORDER[-1]].any()


def test_it_learns_channels_that_follow_from_each_other():
    """Channel k is the feature's code plus the codes before it: a parallel head could not do better than chance."""
    torch.manual_seed(0)
    head = CodeHead(**{**SMALL, "levels": 4})
    optimizer = torch.optim.AdamW(head.parameters(), 5e-3)
    for _ in range(60):
        first, features = torch.randint(0, 4, (128,)), torch.zeros(128, 24)
        codes = torch.zeros(128, 6, dtype=torch.int64)
        for place, channel in enumerate(ORDER):
            codes[:, channel] = (first + place) % 4
        loss = F.cross_entropy(head(features, codes).flatten(0, 1), codes.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sampled = head.eval().sample(torch.zeros(64, 24), gumbel(64, 6, 4))
    steps = torch.stack([(sampled[:, ORDER[i + 1]] - sampled[:, ORDER[i]]) % 4 for i in range(5)])
    assert (steps == 1).float().mean() > 0.95
    assert len(sampled[:, ORDER[0]].unique()) == 4  # undetermined, so still drawn from all levels


def test_neighbouring_levels_start_with_similar_rows():
    rows = smooth_rows(16, 64, torch.empty(1, 128)).view(16, 64, 128)
    assert rows.square().mean().sqrt() == pytest.approx(0.5, abs=1e-3)
    near = F.cosine_similarity(rows[:, 1:], rows[:, :-1], dim=-1).mean()
    far = F.cosine_similarity(rows[:, 32:], rows[:, :32], dim=-1).mean()
    assert near > 0.95 and far < 0.3


def test_saving_and_loading(tmp_path):
    head, features, noise = make_head(), torch.randn(5, 24), gumbel(5, 6, 8)
    head.save_pretrained(tmp_path)
    loaded = CodeHead.from_pretrained(tmp_path)
    assert list(loaded.config.order) == ORDER
    assert loaded.channel_order.tolist() == ORDER
    assert not (set(loaded.state_dict()) ^ set(head.state_dict()))
    assert torch.equal(loaded(features, head.sample(features, noise)), head(features, head.sample(features, noise)))
    assert torch.equal(copy.deepcopy(head).sample(features, noise), loaded.sample(features, noise))


def test_wrong_input_says_what_was_wrong():
    head, features, noise = make_head(), torch.randn(2, 24), gumbel(2, 6, 8)
    with pytest.raises(ValueError, match=r"order must name every channel.*\[0, 0, 1\]"):
        make_head(order=[0, 0, 1])
    with pytest.raises(ValueError, match="width 33"):
        make_head(width=33)
    with pytest.raises(ValueError, match=r"\(2, 5\); these features need \(2, 6\)"):
        head(features, torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="from 0 to 8; they must lie in 0 to 7"):
        head(features, torch.tensor([[0] * 6, [8] * 6]))
    with pytest.raises(ValueError, match=r"\(3, 6, 8\); these features need \(2, 6, 8\)"):
        head.sample(features, gumbel(3, 6, 8))
    with pytest.raises(ValueError, match="-1"):
        head.sample(features, noise, temperature=-1)
    with pytest.raises(ValueError, match=r"\(1, 24\) must match features \(2, 24\)"):
        head.sample(features, noise, empty_ND=features[:1])
