"""Merging: sums are exact, the other methods follow their formulae, and what cannot be merged is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from subject_pictures import subject_folder
from tiny_pipelines import SIDE, draw_with, tiny_pipeline_of
from typer.testing import CliRunner

from mm.adapters.entry import Entry
from mm.adapters.patch import Patch
from mm.cli import app
from mm.core.errors import UserError
from mm.customization.customize import customize
from mm.customization.file_metadata import lora_metadata
from mm.customization.learned import Learned
from mm.customization.merging.combining import cut, decoupled_orthogonal, orthogonalized
from mm.customization.merging.files import read_adapter
from mm.customization.merging.merge import merge, shared
from mm.customization.methods.orthogonal import basis

N, K = 12, 16


def _patch(seed: int, *, rank: int = 2, kind: str = "lowrank", down: torch.Tensor | None = None, **more: Any) -> Patch:
    made = torch.Generator().manual_seed(seed)
    if kind == "lowrank":
        low = torch.randn(rank, K, generator=made) if down is None else down
        tensors = {"down": low, "up": torch.randn(N, rank, generator=made)}
    else:
        tensors = {"delta": torch.randn(N, K, generator=made)}
    entries = {"unet.a": Entry(kind=kind, tensors=tensors, scale=0.5)}  # type: ignore[arg-type]
    return Patch(entries=entries, name=f"p{seed}", base="x", **more)


def _delta(patch: Patch) -> torch.Tensor:
    entry = patch.entries["unet.a"]
    if entry.kind == "dense":
        return entry.scale * entry.tensors["delta"]
    return entry.scale * entry.tensors["up"].float() @ entry.tensors["down"].float()


def test_a_sum_is_exact() -> None:
    one, other = _patch(1), _patch(2)
    made = merge([one, other], weights=[0.7, -1.5])
    assert torch.allclose(_delta(made), 0.7 * _delta(one) - 1.5 * _delta(other), atol=1e-5)
    assert len(made.entries["unet.a"].tensors["down"]) == 4
    assert made.report["overlap"] == {"p1 and p2": 1}
    assert made.report["largest_loss"] == 0
    mixed = merge([one, _patch(3, kind="dense")])
    assert mixed.entries["unet.a"].kind == "dense"
    assert torch.allclose(_delta(mixed), _delta(one) + _delta(_patch(3, kind="dense")), atol=1e-5)


def test_the_file_of_a_merge_says_all_names_and_nothing_empty() -> None:
    one, other, third = (_patch(k, settings={"name": name}) for k, name in enumerate(("<mug>", "<owl>", "")))
    made = merge([merge([one, other]), third])
    assert isinstance(made, Learned)
    meta = lora_metadata(made, made.family, {}, {})
    assert meta["modelspec.trigger_phrase"] == "<mug>, <owl>"
    assert json.loads(meta["ss_tag_frequency"]) == {"<mug>": {}, "<owl>": {}}
    assert "modelspec.resolution" not in meta and all(meta.values())


def test_ties_by_hand() -> None:
    """Of each change the larger half stays, each place takes its majority's sign, those that agree are averaged."""
    one, other = _patch(1, kind="dense"), _patch(2, kind="dense")
    made = _delta(merge([one, other], method="ties", density=0.5))
    kept = []
    for delta in (_delta(one), _delta(other)):
        least = delta.abs().flatten().sort(descending=True).values[N * K // 2 - 1]
        kept.append(torch.where(delta.abs() >= least, delta, 0))
    sign = (kept[0] + kept[1]).sign()
    agree = [torch.where((d.sign() == sign) & (sign != 0), d, 0) for d in kept]
    count = sum((a != 0).float() for a in agree)
    assert torch.allclose(made, (agree[0] + agree[1]) / count.clamp_min(1), atol=1e-5)


def test_dare_keeps_the_mean_and_depends_on_its_seed() -> None:
    patches = [_patch(1, kind="dense"), _patch(2, kind="dense")]
    runs = [_delta(merge(patches, method="dare", seed=seed)) for seed in range(400)]
    wanted = _delta(patches[0]) + _delta(patches[1])
    assert (torch.stack(runs).mean(0) - wanted).abs().mean() < 0.1 * wanted.abs().mean()
    assert torch.equal(runs[0], _delta(merge(patches, method="dare", seed=0)))
    assert not torch.equal(runs[0], runs[1])


def test_directions_become_orthogonal_and_stay_near() -> None:
    made = torch.Generator().manual_seed(0)
    common = torch.randn(N, K, generator=made)
    rows = [torch.nn.functional.normalize(common + torch.randn(N, K, generator=made), dim=1) for _ in range(3)]
    moved = orthogonalized(rows)
    before = (rows[0] * rows[1]).sum(1).abs().mean()
    after = torch.cosine_similarity(moved[0], moved[1], dim=1).abs().mean()
    assert after < 0.2 * before
    assert all((torch.cosine_similarity(a, b, dim=1) > 0.6).all() for a, b in zip(rows, moved, strict=True))
    apart = [torch.zeros(N, K) for _ in range(2)]
    apart[0][:, 0], apart[1][:, 1] = 2.0, 4.0
    # Already orthogonal: directions stay, and both get the mean of the norms.
    merged = decoupled_orthogonal(apart, [1.0, 1.0], 0.5, 0)
    assert torch.allclose(merged[:, :2], torch.full((N, 2), 3.0))


def test_a_cut_is_the_best_product() -> None:
    delta = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    down, up, lost = cut(delta, 3)
    sizes = torch.linalg.svdvals(delta)
    assert (delta - up @ down).norm() == pytest.approx(float(sizes[3:].norm()), rel=1e-4)
    assert lost == pytest.approx(float(sizes[3:].norm() / sizes.norm()), rel=1e-4)
    made = merge([_patch(1), _patch(2)], method="do", rank=2)
    assert len(made.entries["unet.a"].tensors["down"]) == 2
    assert made.report["largest_loss"] > 0


def test_orthogonal_asks_for_subspaces_of_their_own() -> None:
    rows = basis("unet.a", K)
    one, other = _patch(1, down=rows[:2]), _patch(2, down=rows[2:4])
    assert shared(rows[:2], rows[2:4]) < 1e-5
    assert shared(rows[:2], rows[1:3]) == pytest.approx(1, abs=1e-4)
    made = merge([one, other], method="orthogonal")
    assert torch.allclose(_delta(made), _delta(one) + _delta(other), atol=1e-5)
    with pytest.raises(UserError, match=r"share directions in unet\.a"):
        merge([one, _patch(3, down=rows[1:3])], method="orthogonal")


def test_what_cannot_be_merged() -> None:
    token = {"token": "<mug>", "tokenizer": "tokenizer", "embedding": "e", "id": 3}
    words = [_patch(k, settings={"tokens": [token]}) for k in (1, 2)]
    other = _patch(4)
    other.base = "another"
    for patches, options, message in (
        ([_patch(1)], {}, "two or more"),
        ([_patch(1), _patch(2)], {"method": "magic"}, "no way of merging 'magic'"),
        ([_patch(1), _patch(2)], {"weights": [1.0]}, "1 weight for 2"),
        ([_patch(1), _patch(2)], {"method": "ties", "density": 0.0}, "density is 0.0"),
        ([_patch(1), other], {}, "2 different models"),
        (words, {}, "both bring the word"),
    ):
        with pytest.raises(UserError, match=message):
            merge(patches, **options)  # type: ignore[arg-type]


def test_two_subjects_in_one_file(tmp_path: Path) -> None:
    """Words that had the same row get rows of their own; the file draws what both patches draw, one on the other."""
    pipe = tiny_pipeline_of("stable-diffusion")
    fast: dict[str, Any] = {
        "steps": 3, "batch_size": 2, "size": SIDE, "preview_every": 3, "preserved": (), "learning_rate": 2e-2,
        "method": "class-diffusion", "noun": "fox",
    }  # fmt: skip
    files = []
    for name in ("mug", "cat"):
        learned = customize(pipe, subject_folder(tmp_path / name, 2), name=f"<{name}>", **fast)
        files.append(tmp_path / f"{name}.safetensors")
        learned.write(files[-1])
    patches = [Patch.load(file) for file in files]
    assert patches[0].settings["tokens"][0]["id"] == patches[1].settings["tokens"][0]["id"]
    out = tmp_path / "both.safetensors"
    done = CliRunner().invoke(app, ["merge", *map(str, files), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "layers in common" in done.output
    for patch in patches:
        patch.apply(pipe)
    prompt = "a <mug> and a <cat>"
    wanted = draw_with("stable-diffusion", pipe, prompt=prompt)
    other = tiny_pipeline_of("stable-diffusion")
    Patch.load(out).apply(other)
    assert torch.allclose(wanted, draw_with("stable-diffusion", other, prompt=prompt), atol=2e-3)
    again = CliRunner().invoke(app, ["merge", *map(str, files), "-o", str(out)])
    assert again.exit_code == 1


def _rows_patch(seed: int, row: int, token: str = "") -> Patch:
    tensors = {"ids": torch.tensor([row]), "rows": torch.full((1, 4), float(seed))}
    item = {"token": token, "tokenizer": "tokenizer", "embedding": "text_encoder.e", "id": row}
    settings = {"tokens": [item]} if token else {}
    entries = {"text_encoder.e": Entry(kind="rows", tensors=tensors)}
    return Patch(entries=entries, name=f"w{seed}", base="x", settings=settings)


def test_a_layout_without_words_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    for k, file in enumerate(files):
        _rows_patch(k, k, f"<w{k}>").save(file)
    monkeypatch.setattr("mm.customization.merging.merge.merge", lambda *_, **__: pytest.fail("merged first"))
    out = tmp_path / "both.safetensors"
    done = CliRunner().invoke(app, ["merge", *map(str, files), "-o", str(out), "--layout", "diffusers"])
    assert done.exit_code == 1 and "which holds no new word" in done.output and not out.exists()


def test_rows_are_not_added_up() -> None:
    """One row cannot be two, and a word has no strength; both were merged into files that could not be read."""
    with pytest.raises(UserError, match="two adapters change row 7"):
        merge([_rows_patch(1, 7), _rows_patch(2, 7)])
    both = merge([_rows_patch(1, 7, "<a>"), _rows_patch(2, 7, "<b>")]).entries["text_encoder.e"]
    assert both.tensors["ids"].tolist() == [7, 8]
    with pytest.raises(UserError, match=r"'w2' brings words alone, .* its weight is 0\.5"):
        merge([_rows_patch(1, 7, "<a>"), _rows_patch(2, 7, "<b>")], weights=[1.0, 0.5])


def test_convolutions_are_merged_by_the_method_too() -> None:
    """Their kernels are rows of a matrix; a plain sum was taken in the place of every method."""
    deltas = [torch.randn(N, 4, 2, 2, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]

    def of(shape: tuple[int, ...]) -> list[Patch]:
        entries = [{"unet.a": Entry(kind="dense", tensors={"delta": d.reshape(shape)})} for d in deltas]
        return [Patch(entries=e, name=f"p{k}", base="x") for k, e in enumerate(entries)]

    for method in ("ties", "do", "dare"):
        flat = _delta(merge(of((N, 16)), method=method))
        assert torch.equal(_delta(merge(of((N, 4, 2, 2)), method=method)), flat.view(N, 4, 2, 2)), method
    assert not torch.allclose(flat, sum(deltas).flatten(1))


def _lokr(seed: int) -> Patch:
    made = torch.Generator().manual_seed(seed)
    tensors = {"first": torch.randn(3, 4, generator=made), "second": torch.randn(4, 4, generator=made)}
    return Patch(entries={"unet.a": Entry(kind="kron", tensors=tensors)}, name=f"p{seed}", base="x")


def test_a_rank_cuts_changes_of_whole_weights_too() -> None:
    """It was refused with "no layer can have more than 0", or beside a LoRA had no effect."""
    for other in (_lokr(2), _patch(3)):
        whole = merge([_lokr(1), other], method="ties")
        made = merge([_lokr(1), other], method="ties", rank=5)
        down, up, lost = cut(_delta(whole), 5)
        assert whole.entries["unet.a"].kind == "dense"
        assert made.entries["unet.a"].tensors["down"].shape == (5, K)
        assert torch.allclose(_delta(made), up @ down, atol=1e-2)
        assert made.report["largest_loss"] == pytest.approx(lost, abs=1e-3)
        assert lost > 0.01
    with pytest.raises(UserError, match="rank is 13, and no layer of the adapters can have more than 12"):
        merge([_lokr(1), _lokr(2)], method="ties", rank=13)


def test_a_dora_of_magnitudes_alone_changes_something() -> None:
    tensors = {"down": torch.ones(1, K), "up": torch.zeros(N, 1), "magnitude": torch.ones(N)}
    dora = Patch(entries={"unet.b": Entry(kind="dora", tensors=tensors)}, name="scaled", base="x")
    assert set(merge([dora, _patch(1)]).entries) == {"unet.a", "unet.b"}


def test_the_base_and_the_layout_of_a_merge() -> None:
    """The base is that of any that says it; where the family is not known, mm's own file holds all."""
    one, other = _patch(1), _patch(2)
    one.base = ""
    with pytest.warns(UserWarning, match="does not say which model"):
        made = merge([one, other])
    assert made.base == "x" and made.layout() == "mm"


def test_files_that_mm_wrote_for_other_programs_need_no_model(tmp_path: Path) -> None:
    """Their names are those of the model, and they say which one; the first example of the docs is such a call."""
    from mm.cli import app

    files = []
    for seed in (1, 2):
        made = Learned(
            entries=_patch(seed).entries, base="x", family="stable-diffusion-xl", name=f"p{seed}",
            settings={"name": f"<p{seed}>", "rank": 2},
        )  # fmt: skip
        files.append(tmp_path / f"{seed}.safetensors")
        made.write(files[-1])
        read = read_adapter(files[-1])
        assert torch.allclose(_delta(read), _delta(made)) and isinstance(read, Learned)
        assert (read.base, read.family, read.settings["name"]) == ("x", "stable-diffusion-xl", f"<p{seed}>")
    out = tmp_path / "both.safetensors"
    done = CliRunner().invoke(app, ["merge", *map(str, files), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert torch.allclose(_delta(read_adapter(out)), _delta(_patch(1)) + _delta(_patch(2)), atol=1e-5)
    tensors = {"unet.a.lora_A.weight": torch.ones(2, K), "unet.a.lora_B.weight": torch.ones(N, 2)}
    save_file(tensors, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="a LoRA of another program, that only its model explains; give the model"):
        read_adapter(tmp_path / "foreign.safetensors")
    Learned(entries=_patch(4).entries, base="x").write(tmp_path / "kohya.safetensors", "kohya")
    with pytest.raises(UserError, match="a LoRA in a layout or of a kind that only its model explains"):
        read_adapter(tmp_path / "kohya.safetensors")
