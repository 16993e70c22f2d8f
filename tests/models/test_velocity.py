"""The velocity decoder: conditions through adaLN alone, per token, and equals an independent implementation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mm.models import layers
from mm.models.velocity import VelocityDecoder

CONFIG = {"feature_width": 24, "width": 32, "depth": 2, "heads": 2, "ratio": 2, "latent_channels": 4}


def awake(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter moved, since much starts at zero and would hide mistakes."""
    for parameter in module.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    return module.eval()


@pytest.fixture
def decoder() -> VelocityDecoder:
    torch.manual_seed(0)
    return awake(VelocityDecoder(**CONFIG))


def inputs(batch: int, height: int = 4, width: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 4, height, width), torch.rand(batch), torch.randn(batch, height * width, 24)


def test_it_starts_at_zero_with_open_gates():
    """Zero velocity and layers that are the identity, and yet every layer's projections learn at once."""
    torch.manual_seed(0)
    fresh = VelocityDecoder(**CONFIG)
    velocity = fresh(*inputs(3))
    assert velocity.shape == (3, 4, 4, 4) and not velocity.any()
    velocity.sum().backward()
    assert fresh.velocity_out.weight.grad.any()
    x, condition = torch.randn(1, 6, 32, requires_grad=True), torch.randn(1, 6, 32)
    for layer in fresh.layers:
        kept = layer(x, condition, layers.picture_angles(2, 3, 16, x.device))
        assert torch.equal(kept, x)
        kept.square().sum().backward()
        assert layer.attn.to_out.weight.grad.any() and layer.ff.down.weight.grad.any()


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 6), (8, 8)])
def test_shapes_follow_the_latents(decoder, height, width):
    latents, sigma, features = inputs(2, height, width)
    assert decoder(latents, sigma, features).shape == latents.shape


def test_a_tokens_feature_drives_that_token(decoder):
    """Without attention a token's feature and latents reach that token's velocity alone, at its row-major place."""
    for layer in decoder.layers:
        layers.zero(layer.attn.to_out)
    latents, sigma, features = inputs(1, 3, 5)
    base = decoder(latents, sigma, features)
    changed = features.clone()
    changed[0, 7] += 1
    moved = (decoder(latents, sigma, changed) - base).abs().amax((0, 1)) > 1e-5
    assert moved.nonzero().tolist() == [[1, 2]]
    shifted = latents.clone()
    shifted[0, :, 2, 4] += 1
    moved = (decoder(shifted, sigma, features) - base).abs().amax((0, 1)) > 1e-5
    assert moved.nonzero().tolist() == [[2, 4]]


def test_every_input_matters_everywhere(decoder):
    latents, sigma, features = inputs(1)
    base = decoder(latents, sigma, features)
    changed, shifted = features.clone(), latents.clone()
    changed[0, 15] += 2
    shifted[0, :, 3, 3] += 2
    for other in (
        decoder(shifted, sigma, features),
        decoder(latents, (sigma + 0.3) % 1, features),
        decoder(latents, sigma, changed),
    ):
        assert ((other - base).abs().amax((0, 1)) > 1e-6).all()


def test_the_same_in_any_batch(decoder):
    latents, sigma, features = inputs(8)
    whole = decoder(latents, sigma, features)
    for i in (0, 5):
        part = decoder(latents[i : i + 1], sigma[i : i + 1], features[i : i + 1])
        torch.testing.assert_close(part, whole[i : i + 1], atol=2e-5, rtol=1e-4)


def test_it_equals_plain_formulas(decoder):
    """Einsums over one picture, the rotation as a matrix, softmax and layer norm written out."""
    decoder.requires_grad_(False)
    latents, sigma, features = inputs(1, 3, 2)
    x = torch.stack([latents[0, :, i // 2, i % 2] for i in range(6)]) @ decoder.latent_in.weight.T
    x = x + decoder.latent_in.bias
    steps = [10000 ** (-i / 128) for i in range(128)]
    angles = [1000 * sigma.item() * s for s in steps]
    waves = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    embedding = decoder.sigma_embedding
    noise = embedding.down(silu(embedding.up(waves)))
    condition = silu(decoder.feature_in(features[0]) + noise)
    turns = torch.stack([rotation(i // 2, i % 2, 16) for i in range(6)])
    for layer in decoder.layers:
        mod = (condition @ layer.modulation.weight.T + layer.modulation.bias).view(6, 6, 32)
        normed = norm(x, layer.norm_1.weight) * (1 + mod[:, 1]) + mod[:, 0]
        a = layer.attn
        q, k, v = ((normed @ f.weight.T).view(6, 2, 16) for f in (a.to_q, a.to_k, a.to_v))
        q = torch.einsum("lef,lhf->lhe", turns, norm(q, a.norm_q.weight))
        k = torch.einsum("lef,lhf->lhe", turns, norm(k, a.norm_k.weight))
        weights = torch.exp(torch.einsum("lhe,mhe->hlm", q, k) / 4)
        seen = torch.einsum("hlm,mhe->lhe", weights / weights.sum(-1, keepdim=True), v).reshape(6, 32)
        x = x + mod[:, 2] * (seen @ a.to_out.weight.T)
        normed = norm(x, layer.norm_2.weight) * (1 + mod[:, 4]) + mod[:, 3]
        x = x + mod[:, 5] * layer.ff.down(silu(layer.ff.up(normed)))
    shift, scale = decoder.modulation_out(condition).view(6, 2, 32).unbind(1)
    out = decoder.velocity_out(norm(x, decoder.norm_out.weight) * (1 + scale) + shift)
    expected = out.view(3, 2, 4).permute(2, 0, 1)
    torch.testing.assert_close(decoder(latents, sigma, features)[0], expected, atol=2e-4, rtol=1e-3)


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotation(y: int, x: int, channels: int) -> torch.Tensor:
    """The rotation matrix (E, E) of a token at row y, column x."""
    half, quarter = channels // 2, channels // 4
    matrix = torch.zeros(channels, channels)
    for i in range(half):
        angle = (y if i < quarter else x) * 100.0 ** (-(i % quarter) / quarter)
        matrix[i, i] = matrix[i + half, i + half] = math.cos(angle)
        matrix[i + half, i], matrix[i, i + half] = math.sin(angle), -math.sin(angle)
    return matrix


def test_it_learns_a_flow():
    """Velocity of one clean picture: noise - clean, a function of x and sigma that a few steps bring down."""
    torch.manual_seed(0)
    decoder = VelocityDecoder(**CONFIG)
    optimizer = torch.optim.AdamW(decoder.parameters(), 3e-3)
    clean, features, losses = torch.randn(1, 4, 4, 4), torch.zeros(16, 16, 24), []
    for _ in range(40):
        noise, sigma = torch.randn(16, 4, 4, 4), torch.rand(16) * 0.8 + 0.1
        weight = sigma.view(-1, 1, 1, 1)
        loss = F.mse_loss(decoder((1 - weight) * clean + weight * noise, sigma, features), noise - clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_saving_and_loading(decoder, tmp_path):
    decoder.save_pretrained(tmp_path)
    loaded = VelocityDecoder.from_pretrained(tmp_path)
    assert dict(loaded.config).items() >= CONFIG.items()
    given = inputs(2)
    assert torch.equal(loaded(*given), decoder(*given))
