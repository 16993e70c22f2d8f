"""LoHa, LoKr and OFT that were read are written again in peft's layout, and peft computes the same with them."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_cases import TO_K, TO_Q
from lora_families import FAMILIES, fresh, noise, pipeline_of, run
from peft import LoHaConfig, LoKrConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import mm
from mm.adapters.entry import Entry
from mm.adapters.patch import Patch
from mm.core.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoHa": (LoHaConfig, {"r": 2, "alpha": 3}),
    "LoHa of several ranks": (
        LoHaConfig, {"r": 2, "alpha": 3, "rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_q": 5}},
    ),
    "LoKr of products": (LoKrConfig, {"r": 1, "alpha": 3, "decompose_factor": 4}),
    "LoKr whole": (LoKrConfig, {"r": 64, "alpha": 48, "decompose_factor": 4}),
    "LoKr by itself": (LoKrConfig, {"r": 2, "alpha": 3, "decompose_both": True}),
    "OFT": (OFTConfig, {"r": 0, "oft_block_size": 8, "use_cayley_neumann": False}),
    "OFT of a series": (
        OFTConfig, {"r": 0, "oft_block_size": 8, "use_cayley_neumann": True, "num_cayley_neumann_terms": 4},
    ),
    "OFT of one shared block": (
        OFTConfig, {"r": 0, "oft_block_size": 4, "block_share": True, "use_cayley_neumann": False},
    ),
}  # fmt: skip


def _wrapped(family: str, name: str) -> Any:
    kind, settings = CONFIGS[name]
    model = get_peft_model(fresh(family), kind(target_modules=["to_q", "to_k"], **copy.deepcopy(settings)))
    for seed, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data = 0.3 * noise(*parameter.shape, seed=seed)
    return model.eval()


@pytest.mark.parametrize("family", ["SD 1.5", "SDXL", "FLUX"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_read_is_written_again(family: str, name: str, tmp_path: Path) -> None:
    wrapped = _wrapped(family, name)
    wrapped.save_pretrained(str(tmp_path / "peft"))
    want = run(family, wrapped)
    patch = mm.read_lora(tmp_path / "peft", fresh(family))
    mm.write_lora(patch, tmp_path / "mm" / "adapter_model.safetensors", "peft")
    by_peft = run(family, PeftModel.from_pretrained(fresh(family), str(tmp_path / "mm")).eval())
    torch.testing.assert_close(by_peft, want, atol=1e-4, rtol=1e-4)
    assert float((by_peft - run(family, fresh(family))).abs().max()) > 1e-3
    old, new = (load_file(tmp_path / place / "adapter_model.safetensors") for place in ("peft", "mm"))
    assert set(old) == set(new) or name == "LoKr by itself"  # whose first factor is written as one matrix
    assert all(torch.equal(old[key], new[key]) for key in set(old) & set(new))
    again = mm.read_lora(tmp_path / "mm", fresh(family))
    for path, entry in patch.entries.items():
        other = again.entries[path]
        assert (other.kind, other.scale) == (entry.kind, pytest.approx(entry.scale))
        assert all(torch.equal(other.tensors[part], tensor) for part, tensor in entry.tensors.items())


def test_blocks_of_several_sides_keep_the_one_setting(tmp_path: Path) -> None:
    root = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Linear(12, 8))
    wrapped = get_peft_model(
        root, OFTConfig(r=0, oft_block_size=8, target_modules=["0", "1"], use_cayley_neumann=False)
    )
    wrapped.save_pretrained(str(tmp_path))
    plain = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Linear(12, 8))
    patch = mm.read_lora(tmp_path, plain)
    assert {len(entry.tensors["skew"]) for entry in patch.entries.values()} == {4, 2}
    mm.write_lora(patch, tmp_path / "again" / "adapter_model.safetensors", "peft")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["oft_block_size"] == 8
    PeftModel.from_pretrained(plain, str(tmp_path / "again"))


def _loha(ranks: tuple[int, int]) -> Entry:
    shapes = {"w1_a": (8, ranks[0]), "w1_b": (ranks[0], 8), "w2_a": (8, ranks[1]), "w2_b": (ranks[1], 8)}
    return Entry(kind="hadamard", tensors={name: noise(*shape) for name, shape in shapes.items()})


def _oft(rows: int, side: int, **more: Any) -> Entry:
    tensors = {"skew": noise(rows, side * (side - 1) // 2), "terms": torch.tensor([more.pop("terms", 0)])}
    return Entry(kind="oft", tensors=tensors, **more)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((_loha((2, 3)),), "two ranks"),
        ((_oft(2, 4, scale=0.5),), "several, or another scale"),
        ((_oft(2, 4), _oft(2, 4, terms=5)), "several, or another scale"),
        ((_oft(4, 8), _oft(16, 2)), "several, or another scale"),
        ((Entry(kind="kron", tensors={"first": noise(4, 2), "second": noise(4, 8)}),), "no such rule"),
    ],
)
def test_what_peft_does_not_hold_is_refused(entries: tuple[Entry, ...], message: str, tmp_path: Path) -> None:
    patch = Patch(entries={str(number): entry for number, entry in enumerate(entries)})
    with pytest.raises(UserError, match=message):
        mm.write_lora(patch, tmp_path / "adapter_model.safetensors", "peft")
    assert not list(tmp_path.iterdir())


# ---- rotations of outputs, by LyCORIS' names -------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [False, True])
def test_turned_outputs_are_written_as_blocks_again(rescale: bool, tmp_path: Path) -> None:
    pipe = pipeline_of("SD 1.5", fresh("SD 1.5"))
    paths = [path for path in FAMILIES["SD 1.5"].linears if path.endswith(("to_q", "to_k"))][:2]
    tensors = {}
    for seed, path in enumerate(paths):
        outputs = pipe.unet.get_submodule(path).out_features
        tensors[f"lora_unet_{path.replace('.', '_')}.oft_blocks"] = noise(outputs // 4, 4, 4, seed=seed)
        if rescale:
            tensors[f"lora_unet_{path.replace('.', '_')}.rescale"] = 1.2 * torch.ones(outputs, 1)
    patch = mm.read_lora(tensors, pipe)
    mm.write_lora(patch, tmp_path / "again.safetensors", "kohya", target=pipe)
    ends = {key.rpartition(".")[2] for key in load_file(tmp_path / "again.safetensors")}
    assert ends == ({"diff"} if rescale else {"oft_blocks"})
    patch.apply(pipe)
    want = run("SD 1.5", pipe.unet)
    patch.undo(pipe)
    other = dataclasses.replace(mm.read_lora(tmp_path / "again.safetensors", pipe), name="again")
    other.apply(pipe)
    torch.testing.assert_close(run("SD 1.5", pipe.unet), want, atol=1e-4, rtol=1e-4)


def test_two_of_each_kind_on_one_layer_commute() -> None:
    model = fresh("FLUX")
    before = {path: model.get_submodule(path).weight.detach().clone() for path in (TO_Q, TO_K)}
    entries = (_loha_of(32), _oft(4, 8), Entry(kind="dora", tensors={"down": noise(2, 32), "up": noise(32, 2, seed=1),
               "magnitude": noise(32, seed=2)}))  # fmt: skip
    patches = [Patch(name=f"patch {k}", entries={TO_Q: entry}) for k, entry in enumerate(entries)]
    found = []
    for order in itertools.permutations(patches):
        for patch in order:
            patch.apply(model, 0.5)
        found.append(model.get_submodule(TO_Q).weight.detach().clone())
        for patch in order:
            patch.undo(model)
        assert all(torch.equal(model.get_submodule(path).weight, weight) for path, weight in before.items())
    assert not torch.allclose(found[0], before[TO_Q], atol=1e-2)
    for weight in found[1:]:
        torch.testing.assert_close(weight, found[0])


def _loha_of(side: int) -> Entry:
    shapes = {"w1_a": (side, 2), "w1_b": (2, side), "w2_a": (side, 2), "w2_b": (2, side)}
    return Entry(
        kind="hadamard", tensors={name: noise(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    )
