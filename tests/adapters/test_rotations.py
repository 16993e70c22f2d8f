"""OFT files of peft, kohya's scripts and LyCORIS: the weight is turned as there, or the file is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import mm
from mm.adapters.formats.reader import read_lora
from mm.core.errors import UserError

WIDE = 24


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 2 * WIDE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_k(torch.tanh(self.to_q(x)))


def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


def _saved(folder: Path, **settings: Any) -> torch.Tensor:
    """A folder of peft's with a random OFT, and what peft makes of an input with it."""
    config = peft.OFTConfig(target_modules=["to_q", "to_k"], r=0, oft_block_size=8, **settings)
    model = peft.get_peft_model(block(), config)
    for name, value in model.named_parameters():
        if "oft_R" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 2 * WIDE).view(2, WIDE))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [{"use_cayley_neumann": False}, {"use_cayley_neumann": False, "block_share": True},
     *({"use_cayley_neumann": True, "num_cayley_neumann_terms": n} for n in (1, 2, 3, 4, 5, 7))],
)  # fmt: skip
def test_peft_turns_the_inputs(settings: dict[str, Any], tmp_path: Path) -> None:
    wanted, model = _saved(tmp_path, **settings), block()
    x = torch.linspace(-1, 1, 2 * WIDE).view(2, WIDE)
    with torch.no_grad():
        plain = model(x)
        patch = read_lora(tmp_path, model)
        patch.apply(model)
        assert torch.allclose(model(x), wanted, atol=2e-3)
        assert torch.allclose(wanted, plain, atol=1e-3) == (settings.get("num_cayley_neumann_terms") == 1)
        patch.undo(model)
        assert torch.equal(model(x), plain)
    assert patch.method == "oft"


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_does_not_say_how_it_turns_is_refused(tmp_path: Path) -> None:
    _saved(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="settings do not say how it is meant"):
        read_lora(tmp_path, block())


def _cayley(blocks: torch.Tensor, most: float | None) -> torch.Tensor:
    """Independent of mm: block by block, with an explicit inverse, as one matrix."""
    skew = [b - b.T for b in blocks]
    norm = torch.stack(skew).square().sum().sqrt()
    if most is not None and norm > most:
        skew = [q * most / norm for q in skew]
    eye = torch.eye(blocks.shape[1])
    return torch.block_diag(*[(eye + q) @ torch.inverse(eye - q) for q in skew])


@pytest.mark.parametrize(
    ("prefix", "alpha", "bound"),
    [("oft_unet_", 0.01, True), ("oft_unet_", 10.0, True), ("lycoris_", 0.01, True), ("lycoris_", 0.0, False),
     ("lycoris_", None, False)],
)  # fmt: skip
def test_kohya_and_lycoris_turn_the_outputs(prefix: str, alpha: float | None, bound: bool) -> None:
    model = block()
    weight = model.to_k.weight.detach().clone()
    blocks = 0.2 * torch.randn(6, 8, 8, generator=torch.Generator().manual_seed(1))
    tensors = {f"{prefix}to_k.oft_blocks": blocks}
    if alpha is not None:
        tensors[f"{prefix}to_k.alpha"] = torch.tensor(alpha)
    rotation = _cayley(blocks, 2 * WIDE * alpha if bound and alpha is not None else None)
    wanted = rotation.T @ weight
    if prefix == "lycoris_":
        scale = torch.linspace(0.5, 1.5, 2 * WIDE).view(-1, 1)
        tensors["lycoris_to_k.rescale"], wanted = scale, scale * wanted
    patch = read_lora(tensors, model)
    patch.apply(model)
    assert torch.allclose(model.to_k.weight, wanted, atol=2e-3)
    assert not torch.allclose(wanted, weight, atol=1e-2)
    patch.undo(model)
    assert torch.equal(model.to_k.weight, weight)


@pytest.mark.filterwarnings("ignore")
def test_a_layer_of_4_bits_refuses_it_or_takes_the_nearest_lora(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.ModuleDict({"to_q": nn.Linear(128, 128), "to_k": nn.Linear(128, 128)})
    mm.quantize(model, mm.SVDQuantConfig(rank=4, data_free=True), progress=False)
    layer = model["to_k"]
    assert layer.bits == 4
    before = layer.effective_weight().detach().clone()
    tensors = {"to_k.oft_blocks": 0.05 * torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(1))}
    with pytest.raises(UserError, match="to_k is OFT: it changes the whole weight of to_k, which has 4-bit"):
        read_lora(tensors, model)
    patch = read_lora(tensors, model, truncate_to=128)
    assert "truncated 1 dense entries to rank 128" in capsys.readouterr().out
    patch.apply(model)
    wanted = _cayley(tensors["to_k.oft_blocks"], None).T @ before
    moved, left = (wanted - before).norm(), (layer.effective_weight() - wanted).norm()
    assert left < 0.4 * moved


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"to_k.oft_blocks": torch.zeros(3, 8, 8)}, "has shape \\(3, 8, 8\\), and to_k has 48 outputs"),
        ({"to_k.oft_blocks": torch.zeros(6, 8, 8), "to_k.lora_A.weight": torch.zeros(2, WIDE)}, "several adapters"),
        ({"to_k.oft_blocks": torch.zeros(6, 8, 8), "to_k.rescale": torch.ones(3)}, "to_k has 48 outputs"),
        ({"to_k.rescale": torch.ones(48)}, "to_k"),
        ({"to_k.oft_r": torch.zeros(6, 8, 8)}, "orthogonal adapter of another kind"),
    ],
)
def test_tensors_that_do_not_fit(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_lora(tensors, block())
