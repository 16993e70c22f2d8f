"""Layers of the trunk against an independent implementation in plain loops, and against torch's own attention."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_trunk import awake

from mm.models import layers
from mm.models.trunk import PictureLayer, TextLayer

# ---- independent implementations ------------------------------------------------------------------------------------


def turned(x_E: list[float], angles: list[float]) -> list[complex]:
    """Pairs (first half, second half) as complex numbers, turned."""
    half = len(x_E) // 2
    return [complex(x_E[i], x_E[i + half]) * cmath.exp(1j * angles[i]) for i in range(half)]


def angles_at(y: float, x: float, channels: int) -> list[float]:
    quarter = channels // 4
    speeds = [100.0 ** (-2 * j / (channels // 2)) for j in range(quarter)]
    return [y * s for s in speeds] + [x * s for s in speeds]


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def mixture(q: list[complex], keys: list[list[complex]], values: list[torch.Tensor]) -> torch.Tensor:
    """Softmax of real scalar products, written out."""
    scores = [sum((a * b.conjugate()).real for a, b in zip(q, k, strict=True)) / math.sqrt(2 * len(q)) for k in keys]
    weights = [math.exp(s - max(scores)) for s in scores]
    return sum(w / sum(weights) * v for w, v in zip(weights, values, strict=True))


def test_a_picture_layer_equals_plain_loops():
    """One picture of 3 x 2 tokens behind its mode token, two heads, a prompt of 3 words of which one is masked."""
    torch.manual_seed(0)
    layer = awake(PictureLayer(16, 2, 2)).requires_grad_(False)
    positions = [(0, 0)] + [(y, x) for y in range(3) for x in range(2)]
    x, shared = torch.randn(7, 16), torch.randn(7, 6, 16) * 0.3
    text_k, text_v, keep = torch.randn(3, 2, 8), torch.randn(3, 2, 8), [True, False, True]
    angles = F.pad(layers.picture_angles(3, 2, 8, x.device), (0, 0, 1, 0))
    mask = torch.tensor(keep + [True] * 7)[None, None, None]
    got = layer(x[None], shared[None], angles, text_k[None], text_v[None], mask)[0]

    a, mod = layer.attn, shared + layer.modulation
    normed = norm(x, layer.norm_1.weight) * (1 + mod[:, 1]) + mod[:, 0]
    seen = torch.zeros(7, 16)
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        q = norm((normed @ a.to_q.weight.T)[:, part], a.norm_q.weight).tolist()
        k = norm((normed @ a.to_k.weight.T)[:, part], a.norm_k.weight).tolist()
        v = (normed @ a.to_v.weight.T)[:, part]
        words = [t for t in range(3) if keep[t]]
        keys = [turned(text_k[t, head].tolist(), [0.0] * 4) for t in words]
        keys += [turned(k[i], angles_at(*positions[i], 8)) for i in range(7)]
        values = [text_v[t, head] for t in words] + list(v)
        for i in range(7):
            seen[i, part] = mixture(turned(q[i], angles_at(*positions[i], 8)), keys, values)
    x = x + mod[:, 2] * (seen @ a.to_out.weight.T)
    normed = norm(x, layer.norm_2.weight) * (1 + mod[:, 4]) + mod[:, 3]
    hidden = normed @ layer.ff.up.weight.T + layer.ff.up.bias
    x = x + mod[:, 5] * ((hidden / (1 + torch.exp(-hidden))) @ layer.ff.down.weight.T + layer.ff.down.bias)
    torch.testing.assert_close(got, x, atol=1e-4, rtol=1e-4)


def test_a_text_layer_equals_plain_loops():
    torch.manual_seed(0)
    layer = awake(TextLayer(16, 2, 2)).requires_grad_(False)
    x = torch.randn(5, 16)
    speeds = [10000.0 ** (-2 * j / 8) for j in range(4)]
    angles, causal = layers.rotary_angles(torch.arange(5), 8, 10000.0), torch.ones(5, 5, dtype=torch.bool).tril()
    got = layer(x[None], angles, causal)[0][0]
    a, normed, seen = layer.attn, norm(x, layer.norm_1.weight), torch.zeros(5, 16)
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        q = norm((normed @ a.to_q.weight.T)[:, part], a.norm_q.weight).tolist()
        k = norm((normed @ a.to_k.weight.T)[:, part], a.norm_k.weight).tolist()
        v = (normed @ a.to_v.weight.T)[:, part]
        keys = [turned(k[i], [i * s for s in speeds]) for i in range(5)]
        for i in range(5):
            seen[i, part] = mixture(turned(q[i], [i * s for s in speeds]), keys[: i + 1], list(v[: i + 1]))
    x = x + seen @ a.to_out.weight.T
    hidden = norm(x, layer.norm_2.weight) @ layer.ff.up.weight.T + layer.ff.up.bias
    x = x + (hidden / (1 + torch.exp(-hidden))) @ layer.ff.down.weight.T + layer.ff.down.bias
    torch.testing.assert_close(got, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("masking", ["none", "causal", "per picture", "per head"])
def test_attention_by_products_equals_torchs(masking):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, length, 2, 8, requires_grad=True) for length in (6, 9, 9))
    mask = {
        "none": None,
        "causal": torch.ones(6, 9, dtype=torch.bool).tril(3),
        "per picture": F.pad(torch.rand(3, 1, 1, 8) < 0.5, (0, 1), value=True),
        "per head": F.pad(torch.rand(3, 2, 6, 8) < 0.5, (0, 1), value=True),
    }[masking]
    ours = layers._attend_by_products(q, k, v, mask)
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    theirs = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(ours)
    ours_back = torch.autograd.grad(ours, (q, k, v), direction)
    theirs_back = torch.autograd.grad(theirs, (q, k, v), direction)
    for a, b in zip(ours_back, theirs_back, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(layers.attend(q.detach(), k, v, mask), ours)


def test_rotation_keeps_norms_and_sees_only_differences():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def at(x: torch.Tensor, position: float) -> torch.Tensor:
        return layers.rotate(x, layers.rotary_angles(torch.tensor([position]), 16, 10000.0))

    assert torch.equal(at(q, 0.0), q)
    assert at(q, 11.0).norm().item() == pytest.approx(q.norm().item(), rel=1e-5)
    product = (at(q, 3.0) * at(k, 7.0)).sum().item()
    assert (at(q, 13.0) * at(k, 17.0)).sum().item() == pytest.approx(product, abs=1e-4)
    assert (at(q, 3.0) * at(k, 8.0)).sum().item() != pytest.approx(product, abs=1e-2)


def test_picture_positions_are_row_major_and_relative_on_both_axes():
    angles = layers.picture_angles(3, 5, 16, torch.device("cpu")).view(3, 5, 8)
    for y, x in ((0, 0), (1, 0), (0, 4), (2, 3)):
        torch.testing.assert_close(angles[y, x], torch.tensor(angles_at(y, x, 16)))
    torch.testing.assert_close(angles[2, 3] - angles[1, 1], angles[1, 2])


def test_modulation_and_norm():
    x, shift, scale = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    torch.testing.assert_close(layers.modulate(x, shift, scale), x * (1 + scale) + shift)
    weighted = layers.Norm(8)
    weighted.weight.data.uniform_(0.5, 2)
    torch.testing.assert_close(weighted(x), norm(x, weighted.weight))


def test_noise_levels_have_distinct_embeddings():
    torch.manual_seed(0)
    embedding = layers.SigmaEmbedding(32)
    assert embedding(torch.rand(2, 5)).shape == (2, 5, 32)
    levels = torch.linspace(0, 1, 101)
    vectors = embedding(levels)
    assert (torch.cdist(vectors, vectors) + torch.eye(101)).min() > 0.1
    assert (embedding(levels + 1e-5) - vectors).norm(dim=-1).max() < 0.1  # and yet it is smooth
