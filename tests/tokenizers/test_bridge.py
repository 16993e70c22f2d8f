"""The bridge: bins against numeric integration, exact round trips, the order against a plain DFT."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mm.tokenizers.bridge import Bridge, gaussian_centres, lloyd_max_centres, low_frequency_order


def correlated_latents(count: int = 24) -> Tensor:
    """Latents of unit deviation whose channels get rougher with their number: a known order, shuffled."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 16, 8, 8, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(noise, 5, 1, 2)
    share = torch.linspace(1, 0, 16)[:, None, None]
    mixed = share * smooth / smooth.std() + (1 - share) * noise
    mixed = (mixed - mixed.mean((0, 2, 3), keepdim=True)) / mixed.std((0, 2, 3), keepdim=True)
    return mixed[:, torch.randperm(16, generator=generator)]


def test_gaussian_centres_are_the_cell_means_by_numeric_integration() -> None:
    grid = torch.linspace(-3, 3, 600_001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi)
    cumulative = torch.special.ndtr(grid)
    cell = (cumulative * 64).long().clamp(0, 63)
    mass = torch.zeros(64, dtype=torch.float64).index_add_(0, cell, density)
    mean = torch.zeros(64, dtype=torch.float64).index_add_(0, cell, density * grid) / mass
    torch.testing.assert_close(gaussian_centres(64).double(), mean, atol=2e-4, rtol=0)


def test_lloyd_max_reaches_the_known_distortion_of_a_normal() -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    for levels, published in ((4, 0.1175), (16, 0.009497), (64, 0.000662)):  # Max 1960; Panter and Dite for 64
        centres = lloyd_max_centres(values, levels)
        error = (values[:, None] - centres).abs().min(1).values.square().mean().item()
        assert error == pytest.approx(published, rel=0.06)


@pytest.mark.parametrize("bins", ["gaussian", "lloyd-max"])
def test_codes_round_trip_exactly(bins: str) -> None:
    bridge = Bridge.fit(correlated_latents(), bins=bins)
    codes = torch.randint(64, (3, 16, 8, 8), generator=torch.Generator().manual_seed(2))
    assert torch.equal(bridge.quantize(bridge.dequantize(codes)), codes)
    latents = correlated_latents(4)
    assert torch.equal(bridge(bridge(latents)), bridge(latents))


def test_every_value_goes_to_its_nearest_centre() -> None:
    bridge = Bridge.fit(correlated_latents())
    latents = correlated_latents(2)
    distance = (latents[..., None] - bridge.centres_CK[None, :, None, None]).abs()
    chosen = distance.gather(-1, bridge.quantize(latents)[..., None])[..., 0]
    torch.testing.assert_close(chosen, distance.min(-1).values)


def test_lloyd_max_beats_gaussian_bins() -> None:
    latents = correlated_latents(64)
    errors = [(Bridge.fit(latents, bins=bins)(latents) - latents).square().mean() for bins in ("lloyd-max", "gaussian")]
    assert errors[0] < errors[1]


def test_order_falls_in_low_frequency_energy_by_a_plain_dft() -> None:
    latents = correlated_latents()
    steps = torch.arange(8, dtype=torch.float64)
    energies = torch.zeros(16, dtype=torch.float64)
    for fy in range(-2, 3):
        for fx in range(-2, 3):
            phase = 2 * math.pi * (fy * steps[:, None] + fx * steps[None, :]) / 8
            real = (latents.double() * torch.cos(phase)).sum((2, 3))
            imaginary = (latents.double() * torch.sin(phase)).sum((2, 3))
            energies += (real.square() + imaginary.square()).mean(0)
    assert low_frequency_order(latents) == torch.argsort(energies, descending=True).tolist()


def test_straight_through_has_the_gradient_of_the_latents() -> None:
    bridge = Bridge()
    latents = correlated_latents(1).requires_grad_()
    out = bridge.straight_through(latents)
    assert torch.allclose(out, bridge(latents.detach()), atol=1e-6)
    out.sum().backward()
    assert torch.equal(latents.grad, torch.ones_like(latents))


def test_save_and_load(tmp_path: Path) -> None:
    bridge = Bridge.fit(correlated_latents())
    bridge.save_pretrained(tmp_path)
    loaded = Bridge.from_pretrained(tmp_path)
    latents = correlated_latents(2)
    assert torch.equal(loaded.quantize(latents), bridge.quantize(latents))
    assert loaded.order == bridge.order
    assert sorted(loaded.order) == list(range(16))
    assert loaded.bits_per_picture() == 64 * 16 * 6


def test_bad_values_are_named() -> None:
    with pytest.raises(ValueError, match="'uniform'"):
        Bridge(bins="uniform")
    with pytest.raises(ValueError, match="each of the 16 channels once"):
        Bridge(order=[0] * 16)
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 8\)"):
        Bridge().quantize(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="give more latents"):
        lloyd_max_centres(torch.zeros(3), 64)
