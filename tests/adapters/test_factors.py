"""Adapters of whole weights keep their factors, and do exactly what their papers' formulae and peft's layers do."""

from __future__ import annotations

import copy

import pytest
import torch
from lora_cases import TO_K, TO_Q, same
from lora_families import fresh, noise, pipeline_of, run
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file, save_file

import mm
from mm.adapters.entry import Entry
from mm.adapters.factors import rows_of, whole_change
from mm.adapters.patch import Patch
from mm.core.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
N, K = 24, 32
CONFIGS = {
    "dora": LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=["to_q", "to_k"], init_lora_weights=False),
    "loha": LoHaConfig(r=2, alpha=4, target_modules=["to_q", "to_k"], init_weights=False),
    "lokr": LoKrConfig(r=2, alpha=4, target_modules=["to_q", "to_k"], init_weights=False, decompose_factor=4),
    "oft": OFTConfig(r=0, oft_block_size=8, target_modules=["to_q", "to_k"], use_cayley_neumann=False),
}
KINDS = {"dora": "dora", "loha": "hadamard", "lokr": "kron_product", "oft": "oft"}


def entry_of(kind: str) -> Entry:
    """An entry of random factors for a weight (24, 32)."""
    shapes = {
        "hadamard": {"w1_a": (N, 2), "w1_b": (2, K), "w2_a": (N, 3), "w2_b": (3, K)},
        "kron": {"first": (4, 8), "second": (6, 4)}, "kron_product": {"first": (4, 8), "up": (6, 2), "down": (2, 4)},
        "sparse": {"values": (5,)}, "dora": {"down": (2, K), "up": (N, 2), "magnitude": (N,)},
        "oft": {"skew": (4, 28)}, "output_blocks": {"blocks": (3, 8, 8)},
    }[kind]  # fmt: skip
    tensors = {name: noise(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    if kind == "sparse":
        tensors |= {"indices": torch.tensor([0, 40, 41, 700, N * K - 1]), "size": torch.tensor([N, K])}
    if kind == "oft":
        tensors |= {"terms": torch.tensor([0])}
    return Entry(kind=kind, tensors=tensors)  # type: ignore[arg-type]


def by_hand(entry: Entry, weight: torch.Tensor) -> torch.Tensor:
    """The change as the papers write it, value by value or by whole matrices."""
    t = entry.tensors
    if entry.kind == "hadamard":
        return (t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"])
    if entry.kind in ("kron", "kron_product"):
        second = t["second"] if entry.kind == "kron" else t["up"] @ t["down"]
        rows = [torch.cat([a * second for a in row], 1) for row in t["first"]]
        return torch.cat(rows)
    if entry.kind == "sparse":
        made = torch.zeros(N, K)
        for index, value in zip(t["indices"].tolist(), t["values"].tolist(), strict=True):
            made[index // K, index % K] = value
        return made
    if entry.kind == "dora":
        merged = weight + t["up"] @ t["down"]
        return torch.stack([m * row / row.norm() for m, row in zip(t["magnitude"], merged, strict=True)]) - weight
    if entry.kind == "output_blocks":
        return torch.block_diag(*t["blocks"]) @ weight
    upper = torch.zeros(K, K)
    for g, row in enumerate(t["skew"].tolist()):
        for i in range(8):
            for j in range(i + 1, 8):
                upper[8 * g + i, 8 * g + j] = row.pop(0)
    q, eye = upper - upper.T, torch.eye(K)
    return weight @ ((eye - q) @ torch.linalg.inv(eye + q)).T - weight


WHOLE_KINDS = ("hadamard", "kron", "kron_product", "sparse", "dora", "oft", "output_blocks")


@pytest.mark.parametrize("kind", WHOLE_KINDS)
def test_the_change_is_that_of_the_paper(kind: str) -> None:
    entry, weight = entry_of(kind), noise(N, K, seed=9)
    torch.testing.assert_close(whole_change(entry, weight), by_hand(entry, weight))


@pytest.mark.parametrize("kind", WHOLE_KINDS)
def test_on_a_layer_it_scales_adds_up_and_comes_off(kind: str) -> None:
    root = torch.nn.Sequential(torch.nn.Linear(K, N))
    before = root[0].weight.detach().clone()
    entry, other = entry_of(kind), noise(N, K, seed=8)
    change = by_hand(entry, before)
    Patch(entries={"0": Entry(kind="dense", tensors={"delta": other})}, name="other").apply(root)
    patch = Patch(entries={"0": Entry(kind=entry.kind, tensors=entry.tensors, scale=0.5)}, name="whole")
    patch.apply(root)
    torch.testing.assert_close(root[0].weight, before + other + 0.5 * change)
    patch.scale(root, -1.0)
    torch.testing.assert_close(root[0].weight, before + other - 0.5 * change)
    patch.undo(root)
    torch.testing.assert_close(root[0].weight, before + other, rtol=0, atol=0)


@pytest.mark.parametrize("kind", WHOLE_KINDS)
def test_rows_of_factors_are_rows_of_the_change(kind: str) -> None:
    entry, weight = entry_of(kind), noise(N, K, seed=9)
    cut = rows_of(entry, 6, 12)
    if kind in ("sparse", "output_blocks"):
        assert cut is None and rows_of(entry, 0, N) is entry
        return
    assert cut is not None
    torch.testing.assert_close(whole_change(cut, weight[6:18]), by_hand(entry, weight)[6:18])
    assert (rows_of(entry, 5, 12) is None) == kind.startswith("kron")


@pytest.mark.parametrize("kind", WHOLE_KINDS)
def test_a_file_holds_the_factors(kind: str, tmp_path) -> None:
    patch = Patch(entries={"0": entry_of(kind)}, name="whole")
    patch.save(tmp_path / "whole.safetensors")
    read = Patch.load(tmp_path / "whole.safetensors").entries["0"]
    assert read.kind == kind
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in patch.entries["0"].tensors.items())


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("hadamard", {"w2_b": torch.ones(2, K)}, "rank 3 in w2_a"),
        ("hadamard", {"w2_a": torch.ones(N + 1, 3)}, "which are not multiplied"),
        ("kron_product", {"down": torch.ones(3, 4)}, "rank 2 in up"),
        ("dora", {"magnitude": torch.ones(N - 1)}, "23 magnitudes for 24 outputs"),
        ("output_blocks", {"blocks": torch.ones(3, 8, 7)}, "not square"),
        ("oft", {"skew": torch.ones(4, 27)}, "27 values a block"),
        ("oft", {"terms": torch.tensor([65])}, "terms"),
        ("oft", {"terms": torch.tensor([0, 0])}, "terms"),
        ("sparse", {"indices": torch.tensor([0, 1, 2, 3, N * K])}, "indices 0 to 768 in a weight of"),
        ("sparse", {"indices": torch.tensor([0, 1, 2, 3, 3])}, "the same index twice"),
        ("sparse", {"values": torch.ones(4)}, "5 indices for 4 values"),
        ("sparse", {"indices": torch.tensor([0, 1, 2, 3, -1])}, "indices -1 to 3"),
    ],
)  # fmt: skip
def test_factors_that_do_not_belong_together_are_refused(kind: str, changed, message: str, tmp_path) -> None:
    entry = entry_of(kind)
    patch = Patch(entries={"0": Entry(kind=entry.kind, tensors=entry.tensors | changed)})
    root = torch.nn.Sequential(torch.nn.Linear(K, N))
    with pytest.raises(UserError, match=message):
        patch.apply(root)
    patch.save(tmp_path / "whole.safetensors")
    with pytest.raises(UserError, match=message):
        Patch.load(tmp_path / "whole.safetensors")


@pytest.mark.parametrize("kind", WHOLE_KINDS)
def test_a_layer_of_another_shape_is_refused(kind: str) -> None:
    root = torch.nn.Sequential(torch.nn.Linear(K + 8, N + 8))
    before = root[0].weight.detach().clone()
    with pytest.raises(UserError, match="0 of 1 layer of patch 'patch' fit this model; not: 0"):
        Patch(entries={"0": entry_of(kind)}).apply(root)
    assert torch.equal(root[0].weight, before)


# ---- files of peft --------------------------------------------------------------------------------------------------


def of_peft(method: str):
    """A model with a random adapter of peft, and the adapter's tensors by name."""
    twin = get_peft_model(fresh("FLUX"), copy.deepcopy(CONFIGS[method]))
    for seed, (name, parameter) in enumerate(twin.named_parameters()):
        if "magnitude" in name:
            parameter.data = parameter.data * (1 + 0.2 * noise(*parameter.shape, seed=seed))
        elif parameter.requires_grad:
            parameter.data = 0.3 * noise(*parameter.shape, seed=seed)
    return twin


@pytest.mark.parametrize("method", KINDS)
def test_a_file_of_peft_keeps_its_factors_and_acts_as_there(method: str, tmp_path) -> None:
    twin, model = of_peft(method), fresh("FLUX")
    twin.save_pretrained(str(tmp_path))
    patch = mm.read_lora(tmp_path, model)
    assert {entry.kind for entry in patch.entries.values()} == {KINDS[method]}
    before = run("FLUX", model)
    patch.apply(model)
    same(model, twin.eval())
    assert not torch.allclose(run("FLUX", model), before, atol=1e-2)
    patch.save(tmp_path / "mm.safetensors")
    dense = sum(4 * model.get_submodule(path).weight.numel() for path in patch.entries)
    assert sum(x.numel() * x.element_size() for x in load_file(tmp_path / "mm.safetensors").values()) < dense / 1.5


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("family", ["SD 1.5", "FLUX"])
def test_what_was_read_is_written_in_lycoris_names(family: str, method: str, layout: str, tmp_path) -> None:
    model = fresh(family)
    pipe = pipeline_of(family, model)
    wrapped = get_peft_model(copy.deepcopy(model), copy.deepcopy(CONFIGS[method]))
    for seed, (name, parameter) in enumerate(wrapped.named_parameters()):
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data = 0.3 * noise(*parameter.shape, seed=seed)
    wrapped.save_pretrained(str(tmp_path))
    patch = mm.read_lora(tmp_path, pipe)
    patch.apply(pipe)
    want = run(family, model)
    patch.undo(pipe)
    file = tmp_path / "other.safetensors"
    mm.write_lora(patch, file, layout, target=pipe)  # type: ignore[arg-type]
    ends = {key.partition(".")[2] if layout == "kohya" else key.rpartition(".")[2] for key in load_file(file)}
    marks = {"dora": "dora_scale", "loha": "hada_w1_a", "lokr": "lokr_w1", "oft": "diff"}
    whole = family == "FLUX"  # whose q, k and v are one layer there
    assert ("diff" if whole else marks[method]) in ends
    again = mm.read_lora(file, pipe)
    again.apply(pipe)
    torch.testing.assert_close(run(family, model), want, atol=1e-4, rtol=1e-4)


def test_a_fused_layer_of_another_program_keeps_factors_of_its_parts() -> None:
    model, twin = fresh("FLUX"), fresh("FLUX")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    factors = {"w1_a": noise(96, 2), "w1_b": noise(2, 32, seed=1), "w2_a": noise(96, 2, seed=2),
               "w2_b": noise(2, 32, seed=3)}  # fmt: skip
    patch = mm.read_lora({f"{stem}.hada_{name}": tensor for name, tensor in factors.items()}, model)
    assert {entry.kind for entry in patch.entries.values()} == {"hadamard"} and len(patch.entries) == 3
    change = (factors["w1_a"] @ factors["w1_b"]) * (factors["w2_a"] @ factors["w2_b"])
    attention = twin.transformer_blocks[0].attn
    for k, layer in enumerate((attention.to_q, attention.to_k, attention.to_v)):
        layer.weight.data += change[32 * k : 32 * k + 32]
    patch.apply(model)
    same(model, twin)
    lokr = mm.read_lora({f"{stem}.lokr_w1": noise(2, 4), f"{stem}.lokr_w2": noise(48, 8)}, fresh("FLUX"))
    assert {entry.kind for entry in lokr.entries.values()} == {"dense"}  # 48 rows at once are not cut at 32


# ---- 4 bits and merging ---------------------------------------------------------------------------------------------


def test_a_loha_is_exactly_a_product_of_its_rank_squared() -> None:
    entry = entry_of("hadamard")
    entry = Entry(kind="hadamard", tensors=entry.tensors, scale=0.5)
    cut = Patch(entries={"0": entry}).truncated(6)
    t = cut.entries["0"].tensors
    torch.testing.assert_close(t["up"] @ t["down"], 0.5 * by_hand(entry, torch.zeros(N, K)), atol=1e-4, rtol=1e-4)
    assert cut.report["truncated"]["0"] < 1e-5


@pytest.mark.parametrize("kind", ["dora", "oft", "output_blocks"])
def test_a_change_of_the_weights_asks_for_the_model(kind: str) -> None:
    root = torch.nn.Sequential(torch.nn.Linear(K, N))
    patch = Patch(entries={"0": entry_of(kind)})
    with pytest.raises(UserError, match="give the model too"):
        patch.truncated(4)
    made = patch.truncated(N, root).entries["0"].tensors
    want = by_hand(entry_of(kind), root[0].weight.detach())
    torch.testing.assert_close(made["up"] @ made["down"], want, atol=1e-4, rtol=1e-4)
    dense = patch.expanded(root).entries["0"]
    torch.testing.assert_close(dense.tensors["delta"], want)


def test_merging_adds_the_changes_up(tmp_path) -> None:
    root = torch.nn.Sequential(torch.nn.Linear(K, N))
    weight = root[0].weight.detach()
    kinds = ("dora", "hadamard", "sparse")
    patches = [Patch(entries={"0": entry_of(kind)}, name=kind, base="x") for kind in kinds]
    with pytest.raises(UserError, match="give the model"):
        mm.merge(patches)
    made = mm.merge(patches, pipe=root, weights=[1.0, 0.5, 2.0]).entries["0"]
    want = sum(w * by_hand(entry_of(kind), weight) for w, kind in zip((1.0, 0.5, 2.0), kinds, strict=True))
    torch.testing.assert_close(made.tensors["delta"], want)
    apart = mm.merge([patches[0], Patch(entries={"1": entry_of("kron")}, name="kron", base="x")], weights=[0.5, 1.0])
    assert (apart.entries["0"].kind, apart.entries["0"].scale, apart.entries["1"].kind) == ("dora", 0.5, "kron")


def test_a_lycoris_file_keeps_factors_with_its_alpha(tmp_path) -> None:
    model, twin = fresh("FLUX"), fresh("FLUX")
    stem = "lycoris_transformer_blocks_0_attn_"
    tensors = {f"{stem}to_q.lokr_w1": noise(4, 4), f"{stem}to_q.lokr_w2_a": noise(8, 2, seed=1),
               f"{stem}to_q.lokr_w2_b": noise(2, 8, seed=2), f"{stem}to_q.alpha": torch.tensor(1.0),
               f"{stem}to_k.lokr_w1": noise(4, 4, seed=3), f"{stem}to_k.lokr_w2": noise(8, 8, seed=4)}  # fmt: skip
    save_file(tensors, tmp_path / "lokr.safetensors")
    patch = mm.read_lora(tmp_path / "lokr.safetensors", model)
    assert (patch.entries[TO_Q].kind, patch.entries[TO_K].kind) == ("kron_product", "kron")
    attention = twin.transformer_blocks[0].attn
    second = noise(8, 2, seed=1) @ noise(2, 8, seed=2)
    attention.to_q.weight.data += 0.5 * torch.kron(noise(4, 4), second)
    attention.to_k.weight.data += torch.kron(noise(4, 4, seed=3), noise(8, 8, seed=4))
    patch.apply(model)
    same(model, twin)
