"""Erasures in files of others: partial checkpoints and LECO's LoRAs are read, LoRA files are written."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tiny_pipelines import draw_with, tiny_pipeline_of

from mm.adapters import Patch
from mm.adapters.entry import Entry
from mm.core.errors import UserError
from mm.erasure.files import export, partial_checkpoint, read_erasure
from mm.erasure.sites import text_layers

FAMILY = "stable-diffusion"


@pytest.fixture
def pipe():
    return tiny_pipeline_of(FAMILY)


def changes(pipe, rank: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A change of the given rank for each text-reading layer."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for path, layer in text_layers(pipe).items():
        n, d = layer.weight.shape
        made[path] = 0.3 * torch.randn(n, rank, generator=g) @ torch.randn(rank, d, generator=g)
    return made


def drawn_with_weights(pipe, deltas) -> torch.Tensor:
    """The picture of the model whose weights are changed by hand."""
    layers = text_layers(pipe)
    for path, delta in deltas.items():
        layers[path].weight.data += delta
    picture = draw_with(FAMILY, pipe)
    for path, delta in deltas.items():
        layers[path].weight.data -= delta
    return picture


@pytest.mark.parametrize(("rank", "kind"), [(2, "lowrank"), (16, "dense")])
@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_a_partial_checkpoint_is_read(pipe, tmp_path, rank, kind, prefix):
    """As UCE's script writes it ("unet." in front), and ESD's (the UNet's own names)."""
    deltas = changes(pipe, rank)
    wanted, base = drawn_with_weights(tiny_pipeline_of(FAMILY), deltas), draw_with(FAMILY, pipe)
    layers = text_layers(pipe)
    new = {f"{prefix}{p.removeprefix('unet.')}.weight": (layers[p].weight + d).contiguous() for p, d in deltas.items()}
    save_file(new, tmp_path / "uce.safetensors")
    patch = read_erasure(tmp_path / "uce.safetensors", pipe)
    assert {e.kind for e in patch.entries.values()} == {kind}
    assert set(patch.entries) == set(deltas)
    patch.apply(pipe)
    assert torch.allclose(draw_with(FAMILY, pipe), wanted, atol=2e-3)
    patch.undo(pipe)
    assert torch.equal(draw_with(FAMILY, pipe), base)


def test_lecos_lora_is_read(pipe, tmp_path):
    """kohya's layout: `lora_unet_` and underscores, alpha beside the two factors."""
    g, file, deltas = torch.Generator().manual_seed(1), {}, {}
    for path, layer in text_layers(pipe).items():
        n, d = layer.weight.shape
        down, up = torch.randn(4, d, generator=g), 0.1 * torch.randn(n, 4, generator=g)
        name = "lora_unet_" + path.removeprefix("unet.").replace(".", "_")
        file |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
        deltas[path] = 0.5 * up @ down
    save_file(file, tmp_path / "leco.safetensors")
    wanted = drawn_with_weights(tiny_pipeline_of(FAMILY), deltas)
    patch = read_erasure(tmp_path / "leco.safetensors", pipe)
    patch.apply(pipe)
    assert patch.method == "leco"
    assert torch.allclose(draw_with(FAMILY, pipe), wanted, atol=2e-3)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", ["lowrank", "rotation"])
def test_an_export_draws_the_same_with_diffusers_own_loader(pipe, tmp_path, layout, kind):
    if kind == "lowrank":
        made = {p: torch.linalg.svd(d, full_matrices=False) for p, d in changes(pipe, 3).items()}
        entries = {
            p: Entry(kind="lowrank", tensors={"up": (u[:, :3] * s[:3]).contiguous(), "down": v[:3].contiguous()})
            for p, (u, s, v) in made.items()
        }
    else:
        sizes = {p: len(x.weight) for p, x in text_layers(pipe).items()}
        turn = {p: torch.linalg.qr(torch.eye(n) + 0.1 * torch.ones(n, n).tril(-1))[0] for p, n in sizes.items()}
        entries = {p: Entry(kind="rotation", tensors={"rotation": r.contiguous()}) for p, r in turn.items()}
    patch = Patch(entries=entries, method="uce", name="no-fox")
    file = tmp_path / "lora.safetensors"
    written = export(patch, file, layout, target=pipe)
    assert {e.kind for e in written.entries.values()} == {"lowrank"}
    with pytest.warns(UserWarning, match="does not say which model"):
        patch.apply(pipe)
    wanted = draw_with(FAMILY, pipe)
    other = tiny_pipeline_of(FAMILY)
    base = draw_with(FAMILY, other)
    other.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    assert torch.allclose(draw_with(FAMILY, other), wanted, atol=2e-3)
    assert not torch.allclose(wanted, base, atol=2e-3)


def test_a_patch_as_a_partial_checkpoint_and_back(pipe, tmp_path):
    entries = {p: Entry(kind="dense", tensors={"delta": d}) for p, d in changes(pipe, 16).items()}
    save_file(dict(partial_checkpoint(Patch(entries=entries), pipe)), tmp_path / "p.safetensors")
    again = read_erasure(tmp_path / "p.safetensors", pipe)
    for path, entry in again.entries.items():
        assert torch.allclose(entry.tensors["delta"], entries[path].tensors["delta"], atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"unet.nothing.weight": torch.ones(2, 2)}, "fit no layer"),
        ({"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.ones(2, 2)}, "in the model"),
    ],
)
def test_files_that_do_not_fit(pipe, tmp_path, tensors, message):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        read_erasure(tmp_path / "x.safetensors", pipe)


def test_a_file_without_a_change(pipe, tmp_path):
    path, layer = next(iter(text_layers(pipe).items()))
    save_file({f"{path}.weight": layer.weight.detach().clone()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="nothing is erased"):
        read_erasure(tmp_path / "x.safetensors", pipe)
