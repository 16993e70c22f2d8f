"""Fingerprints on tiny decoders: stamped weights, reading after attacks, files, and training for other decoders."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mm.cli.train import Stage
from mm.core.errors import UserError
from mm.provenance.attacks import MEASURED, cropped, jpeg, jpeg_like, scaled
from mm.provenance.fingerprint import Fingerprint, FingerprintConfig, Found, fingerprint_of
from mm.provenance.measuring import measure
from mm.provenance.readers import TileReader, carriers
from mm.provenance.solving import solve_fingerprint
from mm.provenance.training import STATE, FingerprintTraining, train_fingerprint
from mm.tokenizers import Autoencoder

SIDE, BITS = 128, 8


def tiny_decoder() -> Autoencoder:
    torch.manual_seed(0)
    made = Autoencoder(
        latent_channels=4, encoder_widths=(8, 8, 8), encoder_depths=(0, 0, 0), decoder_widths=(16, 12, 12),
        decoder_depths=(1, 1, 1), refine_width=8, sample_size=SIDE,
    )  # fmt: skip
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def solved() -> tuple[Autoencoder, Fingerprint, torch.Tensor]:
    decoder = tiny_decoder()
    latents = torch.randn(72, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    config = FingerprintConfig(bits=BITS, side=SIDE, period=16, layers=("decoder.2", "decoder.5"))
    made = fingerprint_of(decoder, lambda: decoder.decode(latents[:1]), config)
    solve_fingerprint(made, decoder, decoder.decoder, latents[:48], psnr=34.0, rounds=2)
    return decoder, made, latents[48:]


def test_uncertain_bits_are_counted() -> None:
    found = Found(bits_BK=torch.tensor([[0.99, 0.02, 0.6], [0.94, 0.06, 0.5]]), present_B=torch.ones(2))
    assert found.uncertain() == [1, 3]


def test_bits_are_read_after_attacks(solved: tuple[Autoencoder, Fingerprint, torch.Tensor]) -> None:
    """The decoder is unchanged, the change is within its budget, and plain pictures carry none."""
    decoder, fingerprint, latents = solved
    before = tiny_decoder().state_dict()
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
    report = measure(fingerprint, decoder, decoder.decoder, latents)
    assert report["psnr"] == pytest.approx(34.0, abs=1.0)
    assert report["read"]["none"] > 0.97
    assert min(report["read"].values()) > 0.9
    # A crop has to stand out among all shifts of the tile, which few bits on a tiny decoder do not.
    assert min(report["found"][name] for name in ("none", "jpeg 80", "half")) > 0.9
    assert report["found_in_plain"] < 0.05


def test_stamped_weights_draw_what_hooks_draw(solved: tuple[Autoencoder, Fingerprint, torch.Tensor]) -> None:
    decoder, fingerprint, latents = solved
    number = 0b10110010
    bits = fingerprint.bits_of(number)
    assert bits.tolist() == [1, 0, 1, 1, 0, 0, 1, 0]
    with fingerprint.modulating(decoder, bits.expand(len(latents), -1)):
        wanted = decoder.decode(latents)
    stamped = tiny_decoder()
    fingerprint.stamp(stamped, number)
    assert torch.allclose(stamped.decode(latents), wanted, atol=1e-5)
    found = fingerprint.read(stamped.decode(latents) / 2 + 0.5)
    assert sum(read == number for read in found.numbers()) > 0.8 * len(latents)
    plain = tiny_decoder()
    for wrong, message in ((256, "does not fit into 8 bits"), ([1, 0], "2 bits where the fingerprint has 8")):
        with pytest.raises(UserError, match=message):
            fingerprint.stamp(plain, wrong)
    with pytest.raises(UserError, match="for another"):
        fingerprint.stamp(torch.nn.Linear(2, 2), 1)


def test_scales_are_stamped_exactly() -> None:
    """A network's fingerprint also scales inputs: the weights' change is that of the hooks."""
    decoder = tiny_decoder()
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    config = FingerprintConfig(bits=4, side=SIDE, period=0, convolutions=3, widths=(8, 8))
    fingerprint = fingerprint_of(decoder, lambda: decoder.decode(latents[:1]), config)
    assert list(fingerprint.shapes)[-1] == "decoder.11"
    fingerprint.start(0.3, torch.Generator().manual_seed(3))
    with fingerprint.modulating(decoder, torch.tensor([[1.0, 0, 0, 1]] * 2)), torch.no_grad():
        wanted = decoder.decode(latents)
    fingerprint.stamp(decoder, [1, 0, 0, 1])
    assert torch.allclose(decoder.decode(latents), wanted, atol=1e-5)


def test_a_file_reads_what_was_written(
    solved: tuple[Autoencoder, Fingerprint, torch.Tensor], tmp_path: Path
) -> None:  # fmt: skip
    decoder, fingerprint, latents = solved
    file = tmp_path / "fingerprint.safetensors"
    fingerprint.save(file, {"n": 1})
    again = Fingerprint.load(file)
    assert again.config == fingerprint.config
    assert again.shapes == fingerprint.shapes
    report, other = (measure(f, decoder, decoder.decoder, latents[:8])["read"]["none"] for f in (fingerprint, again))
    assert other == pytest.approx(report, abs=0.05)
    assert all(t.dtype == torch.int8 for t in load_file(file).values() if t.ndim > 1)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        Fingerprint.load(damaged)
    save_file({"x": torch.zeros(1)}, damaged)
    with pytest.raises(UserError, match="--stage fingerprint") as raised:
        Fingerprint.load(damaged)
    named = re.search(r"--stage (\w+)", str(raised.value))
    assert named is not None and named[1] in [stage.value for stage in Stage]


def test_a_network_learns_on_a_decoder_of_diffusers_and_resumes(tmp_path: Path) -> None:
    """Bits are read better than by chance after a few steps; a run in two parts ends in the same values."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval().requires_grad_(False)  # fmt: skip
    latents = torch.randn(16, 4, 16, 16, generator=torch.Generator().manual_seed(1))

    def decode(some: torch.Tensor) -> torch.Tensor:
        return vae.decode(some).sample

    def fresh() -> Fingerprint:
        torch.manual_seed(1)
        config = FingerprintConfig(bits=4, side=32, period=0, convolutions=4, widths=(8, 16))
        return fingerprint_of(vae, lambda: decode(latents[:1]), config)

    training = FingerprintTraining(
        steps=40, batch_size=4, psnr=20.0, decibels_first=6.0, spread=1.0, save_every=7, log_every=5
    )
    whole = fresh()
    steps = train_fingerprint(whole, vae, decode, latents, training)
    assert [step.number for step in steps] == list(range(5, 45, 5))
    assert steps[-1].read > steps[0].read
    assert steps[0].budget == pytest.approx(6.0 - 5.1 * 5 / 16) and steps[-1].budget == pytest.approx(0.9)
    parts = fresh()
    short = train_fingerprint(parts, vae, decode, latents, training, work=tmp_path, seconds=0.2)
    assert len(short) < len(steps)
    assert (tmp_path / STATE).is_file()
    resumed = fresh()
    train_fingerprint(resumed, vae, decode, latents, training, work=tmp_path)
    for (name, one), two in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two), name
    with pytest.raises(UserError, match="no closed form"):
        solve_fingerprint(whole, vae, decode, latents)
    with pytest.raises(UserError, match="of another fingerprint"):
        train_fingerprint(
            fingerprint_of(
                vae,
                lambda: decode(latents[:1]),
                FingerprintConfig(bits=4, side=32, period=0, convolutions=3, widths=(8, 16)),
            ),
            vae,
            decode,
            latents,
            training,
            work=tmp_path,
        )


def test_a_reader_with_convolutions_reads_what_a_crop_has_shifted() -> None:
    """Trained against attacks, at a given place; `decibels` is what quality loses."""
    decoder = tiny_decoder()
    latents = torch.randn(48, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(48, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    originals = (decoder.decode(latents) / 2 + 0.5 + 0.05 * noise).clamp(0, 1)
    config = FingerprintConfig(bits=4, side=64, period=16, eye=8, layers=("decoder.2", "decoder.5"))
    torch.manual_seed(2)
    fingerprint = fingerprint_of(decoder, lambda: decoder.decode(latents[:1]), config)
    training = FingerprintTraining(steps=100, batch_size=8, decibels=2.0, learning_rate=1e-2, log_every=10)
    whole = (originals[:32] * 255).to(torch.uint8)
    steps = train_fingerprint(fingerprint, decoder, decoder.decoder, latents[:32], training, originals=whole)
    assert steps[-1].strength > 0
    bits = torch.randint(2, (16, 4), generator=torch.Generator().manual_seed(3)).float()
    with torch.no_grad(), fingerprint.modulating(decoder, bits):
        marked = (decoder.decode(latents[32:]) / 2 + 0.5).clamp(0, 1)
    plain = (decoder.decode(latents[32:]) / 2 + 0.5).clamp(0, 1)
    error = [(x - originals[32:]).square().flatten(1).mean(1).log10() for x in (plain, marked)]
    assert 10 * float((error[1] - error[0]).mean()) == pytest.approx(steps[-1].decibels, abs=1.0)
    for pictures, shift in ((marked, (0, 0)), (jpeg(marked, 80), (0, 0)), (marked[..., 3:, 2:], (-3, -2))):
        read = fingerprint.reader.places(pictures, shift)[:, 0, :-1]
        assert float(((read > 0) == (bits > 0.5)).float().mean()) > 0.85, shift
    with pytest.raises(UserError, match="needs an even one"):
        TileReader(4, 64, 7, 8)


def test_places_are_the_turns_of_a_tile() -> None:
    """The first place is the given shift; the others are those of the picture rolled by whole cells."""
    torch.manual_seed(0)
    reader = TileReader(3, 32, 8, 4)
    pictures = torch.rand(2, 3, 32, 32)
    reader.eye = None  # the mean of tiles of what does not depend on borders
    reader.tile = lambda x: x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).mean((2, 4))[:, :, ::2, ::2]  # type: ignore[method-assign]
    reader.out = torch.nn.Linear(3 * 16, 4)
    found = reader.places(pictures)
    for down, right in ((0, 0), (2, 6), (4, 0)):
        place = (down // 2) * 4 + right // 2
        rolled = torch.roll(pictures, (-down, -right), (2, 3))
        assert torch.allclose(found[:, place], reader.places(rolled)[:, 0], atol=1e-6)
        assert torch.allclose(found[:, place], reader.places(pictures, (down, right))[:, 0], atol=1e-6)


def test_attacks_are_those_of_pillow() -> None:
    pictures = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    assert cropped(pictures, 0.1, generator).shape[-2:] == (38, 38)
    bytes_ = (pictures[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    half = Image.fromarray(bytes_).resize((20, 20), Image.Resampling.BILINEAR)
    ours = (scaled(pictures, 0.5)[0] * 255).permute(1, 2, 0)
    assert (
        float((ours - torch.frombuffer(bytearray(half.tobytes()), dtype=torch.uint8).view(20, 20, 3)).abs().max()) < 2
    )
    wanted = pictures.clone().requires_grad_(True)
    jpeg(wanted, 80).sum().backward()
    assert wanted.grad is not None and torch.equal(wanted.grad, torch.ones_like(pictures))
    smooth = torch.rand(3, 3, 6, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(smooth, (45, 37), mode="bicubic").clamp(0, 1)
    for quality in (30, 60, 80, 95):
        ours = jpeg_like(smooth, torch.full((3,), float(quality)))
        lost = float((jpeg(smooth, quality) - smooth).abs().mean())
        assert float((ours - jpeg(smooth, quality)).abs().mean()) < 0.4 * lost
    assert set(MEASURED) == {"none", "jpeg 80", "half", "crop a tenth"}


def test_carriers_are_orthogonal_and_what_cannot_be_is_refused() -> None:
    rows = carriers(33, 16)
    assert torch.allclose(rows @ rows.T, torch.eye(33), atol=1e-5)
    assert torch.allclose(rows.view(33, 3, -1).sum(2), torch.zeros(33, 3), atol=1e-3)
    with pytest.raises(UserError, match="need a larger one"):
        TileReader(64, 64, 4)
    with pytest.raises(UserError, match="period is 65"):
        FingerprintConfig(side=64, period=65)
    decoder = tiny_decoder()
    with pytest.raises(UserError, match="no convolution with a bias"):
        fingerprint_of(
            decoder, lambda: decoder.decode(torch.zeros(1, 4, 4, 4)), FingerprintConfig(layers=("decoder.0.x",))
        )
