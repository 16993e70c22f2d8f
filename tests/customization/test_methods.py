"""Each method learns, leaves the model as it was, and its patch does what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from subject_pictures import subject_folder
from tiny_pipelines import SIDE, draw_with, tiny_pipeline_of

from mm.core.errors import UserError
from mm.customization.batches import encode
from mm.customization.customize import customize
from mm.customization.data import read_folder
from mm.customization.learned import write_textual_inversion
from mm.customization.methods.orthogonal import basis
from mm.customization.methods.registry import METHODS
from mm.customization.objectives.protocol import objective_of
from mm.layers.base_hash import base_hash

FAST: dict[str, Any] = {
    "steps": 8, "batch_size": 3, "size": SIDE, "preview_every": 8, "preserved": (), "preserve": 0.0,
    "learning_rate": 2e-2, "row_rate": 1.0,
}  # fmt: skip
WORD: dict[str, Any] = {key: value for key, value in FAST.items() if key != "learning_rate"}  # for words alone
KINDS: dict[str, set[str]] = {
    "dreambooth": {"lowrank"}, "class-diffusion": {"lowrank", "rows"}, "custom-diffusion": {"dense", "rows"},
    "textual-inversion": {"rows"}, "detex": {"rows"}, "orthogonal": {"lowrank"}, "lora": {"lowrank"}, "dora": {"dora"},
    "paca": {"lowrank"}, "s2ft": {"lowrank"}, "eva": {"lowrank"}, "adalora": {"lowrank"},
    "stydeco": {"lowrank", "rows"},
    "oft": {"oft"}, "lokr": {"kron", "kron_product"}, "loha": {"hadamard"}, "shira": {"sparse"},
}  # fmt: skip


def _fast(method: str) -> dict[str, Any]:
    return WORD if method == "textual-inversion" else FAST


def _state(pipe: Any) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": t.clone() for n in ("unet", "text_encoder") for k, t in pipe.components[n].state_dict().items()}


@torch.no_grad()
def _error(pipe: Any, folder: Path) -> float:
    """The error on the pictures at the noise of a preview, as the config says: seed 0 plus 17, eight levels."""
    objective = objective_of(pipe, SIDE)
    examples = read_folder(folder, name="<mug>", noun="fox")
    latents, _ = encode(objective, examples)
    chosen = [i % len(examples) for i in range(8)]
    noise = torch.randn(latents[chosen].shape, generator=torch.Generator().manual_seed(17))
    levels = objective.fixed_levels(8)
    condition = objective.encode_prompts([examples[i].caption for i in chosen])
    given = objective.predict(objective.noised(latents[chosen], noise, levels), levels, condition)
    return float((given - objective.target(latents[chosen], noise, levels)).square().mean())


@pytest.mark.parametrize("method", METHODS)
def test_a_method(method: str, tmp_path: Path) -> None:
    pipe, folder = tiny_pipeline_of("stable-diffusion"), subject_folder(tmp_path / "data")
    before, words, base = _state(pipe), len(pipe.tokenizer), _error(pipe, folder)
    made_for = base_hash(pipe.unet)
    kind = "style" if method == "stydeco" else "subject"
    learned = customize(pipe, folder, name="<mug>", noun="fox", method=method, kind=kind, **_fast(method))
    after = _state(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert len(pipe.tokenizer) == words
    assert not any(type(m).__module__.startswith("peft") for m in pipe.unet.modules())
    assert {entry.kind for entry in learned.entries.values()} == KINDS[method]
    assert learned.report["error"] < 1.0
    assert learned.base == made_for
    if method == "detex":  # trained with each picture's own words, which the patch leaves out
        assert len(learned.settings["tokens"]) == 1
        return
    learned.apply(pipe)
    assert _error(pipe, folder) / base == pytest.approx(learned.report["error"], rel=2e-3)
    learned.undo(pipe)
    assert all(torch.equal(before[key], tensor) for key, tensor in _state(pipe).items())
    assert len(pipe.tokenizer) == words


def test_adalora_takes_directions_away_and_resumes(tmp_path: Path) -> None:
    """The average rank falls to the one asked for; a run in two parts ends in the same values."""
    folder = subject_folder(tmp_path / "data")
    long = FAST | {"steps": 12, "preview_every": 12, "save_every": 5, "rank": 4, "layers": "attention"}
    whole = customize(tiny_pipeline_of("stable-diffusion"), folder, name="<mug>", method="adalora", **long)
    ranks = [len(entry.tensors["down"]) for entry in whole.entries.values()]
    assert sum(ranks) / len(ranks) == pytest.approx(4, abs=0.5)
    assert len(set(ranks)) > 1 and max(ranks) <= 6

    def stop(share: float, text: str) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    place = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        customize(tiny_pipeline_of("stable-diffusion"), folder, name="<mug>", method="adalora", work=place,
                  samples=(), progress=stop, **long)  # fmt: skip
    again = customize(
        tiny_pipeline_of("stable-diffusion"), folder, name="<mug>", method="adalora", work=place, samples=(), **long
    )
    for path, entry in whole.entries.items():
        assert torch.equal(entry.tensors["down"], again.entries[path].tensors["down"]), path


@pytest.mark.parametrize("method", ["dora", "lokr", "loha", "oft"])
def test_the_small_file_of_a_tuner_is_exact(method: str, tmp_path: Path) -> None:
    """peft's own tensors, read again, give the picture of the whole changes."""
    from mm.adapters.formats import read_lora

    pipe, folder = tiny_pipeline_of("stable-diffusion"), subject_folder(tmp_path / "data")
    small = {"block": 8} if method == "oft" else {"rank": 2}
    learned = customize(pipe, folder, name="sks thing", method=method, **FAST, **small)
    file = tmp_path / "small.safetensors"
    learned.write(file)
    learned.apply(pipe)
    whole = draw_with("stable-diffusion", pipe, prompt="sks thing")
    again = tiny_pipeline_of("stable-diffusion")
    read_lora(file, again).apply(again)
    assert torch.allclose(whole, draw_with("stable-diffusion", again, prompt="sks thing"), atol=2e-3)


def test_a_textual_inversion_loads_in_plain_diffusers(tmp_path: Path) -> None:
    for name in ("stable-diffusion", "stable-diffusion-xl"):
        pipe, folder = tiny_pipeline_of(name), subject_folder(tmp_path / name)
        learned = customize(pipe, folder, name="<mug>", method="textual-inversion", **WORD)
        files = write_textual_inversion(learned, tmp_path / f"{name}.safetensors")
        learned.apply(pipe)
        ours = draw_with(name, pipe, prompt="a <mug>")
        other = tiny_pipeline_of(name)
        for file, end in zip(files, ("", "_2"), strict=False):
            parts = {"text_encoder": other.components[f"text_encoder{end}"],
                     "tokenizer": other.components[f"tokenizer{end}"]}  # fmt: skip
            row = load_file(file)["<mug>"]
            other.load_textual_inversion(row, token="<mug>", **parts)
        assert torch.allclose(ours, draw_with(name, other, prompt="a <mug>"), atol=1e-3)
        assert not torch.allclose(ours, draw_with(name, tiny_pipeline_of(name), prompt="a <mug>"), atol=1e-3)


def test_slots_of_the_basis_are_orthogonal() -> None:
    rows = basis("unet.some.layer", 48)
    assert torch.allclose(rows @ rows.T, torch.eye(48), atol=1e-5)
    assert torch.equal(rows, basis("unet.some.layer", 48))
    assert not torch.equal(rows, basis("unet.other.layer", 48))


@pytest.mark.parametrize("method", ["paca", "s2ft"])
def test_only_the_chosen_rows_and_columns_change(method: str, tmp_path: Path) -> None:
    """PaCA: few columns of each weight; S2FT: few channels, the same at both ends of a block."""
    pipe, folder = tiny_pipeline_of("stable-diffusion-3"), subject_folder(tmp_path / "data")
    short = FAST | {"steps": 2, "preview_every": 2, "rank": 4}
    learned = customize(pipe, folder, name="sks thing", method=method, **short)
    changed = {}
    for path, entry in learned.entries.items():
        delta = (entry.tensors["up"].float() @ entry.tensors["down"].float()).abs()
        rows, columns = delta.amax(1).nonzero().flatten(), delta.amax(0).nonzero().flatten()
        changed[path] = (rows.tolist(), columns.tolist())
        if method == "paca" or path.endswith(("to_out.0", "to_add_out", "net.2")):
            assert len(columns) <= 4 < delta.shape[1]
        else:
            assert len(rows) <= 4 < delta.shape[0]
    if method == "s2ft":
        block = "transformer.transformer_blocks.0"
        assert changed[f"{block}.ff.net.0.proj"][0] == changed[f"{block}.ff.net.2"][1]
        assert changed[f"{block}.attn.to_q"][0] == changed[f"{block}.attn.to_k"][0]
        assert changed[f"{block}.attn.to_v"][0] == changed[f"{block}.attn.to_out.0"][1]


def test_eva_starts_where_the_inputs_vary_most(tmp_path: Path) -> None:
    """Rows span the leading directions of a layer's inputs, found apart by a whole decomposition."""
    from mm.customization.methods.eva import Eva, _batches, _predicted, directions
    from mm.customization.methods.protocol import Job

    pipe, folder = tiny_pipeline_of("stable-diffusion"), subject_folder(tmp_path / "data")
    objective = objective_of(pipe, SIDE)
    examples = read_folder(folder, name="sks", noun="")
    settings = {**Eva.defaults, "rank": 2, "rho": 1.0}
    job = Job(objective=objective, examples=examples, name="sks", noun="", kind="subject", settings=settings, seed=0)
    found = directions(job)
    path = next(p for p in found if p.endswith("attn1.to_q"))
    seen: list[torch.Tensor] = []
    handle = pipe.unet.get_submodule(path.removeprefix("unet.")).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, -2))
    )
    with torch.no_grad():
        for batch in _batches(job):
            _predicted(objective, batch)
    handle.remove()
    inputs = torch.cat(seen)
    spread = inputs - inputs.mean(0)
    most = torch.linalg.svdvals(spread)[:2].square().sum()
    mine = (spread @ torch.linalg.qr(found[path].T)[0]).square().sum()
    assert 0.93 * most < mine <= 1.001 * most


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    pipe, folder = tiny_pipeline_of("stable-diffusion"), subject_folder(tmp_path / "data")
    with pytest.raises(UserError, match="needs the subject's class"):
        customize(pipe, folder, name="<mug>", method="class-diffusion", **FAST)
    with pytest.raises(UserError, match="stydeco learns styles, and the kind is 'subject'"):
        customize(pipe, folder, name="<mug>", method="stydeco", **FAST)
    with pytest.raises(UserError, match="redraw is 0;"):
        customize(pipe, folder, name="<mug>", kind="style", method="stydeco", redraw=0, **FAST)
    with pytest.raises(UserError, match="slot is 99"):
        customize(pipe, folder, name="<mug>", method="orthogonal", slot=99, **FAST)
    with pytest.raises(UserError, match="layers is 'some'"):
        customize(pipe, folder, name="<mug>", layers="some", **FAST)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["eva", "shira"])
def test_our_model_in_bfloat16(method: str, tmp_path: Path) -> None:
    """Its denoiser holds layers that read text, and its weights are not of the trained values' type."""
    import mm

    pipe = mm.TextToImagePipeline.from_pretrained("mm-tiny").to(torch.bfloat16)
    short = FAST | {
        "steps": 1,
        "batch_size": 1,
        "size": 128,
        "preview_every": 1,
        "rank": 2,
        "layers": "text",
        "companions": 0,
    }
    learned = customize(pipe, subject_folder(tmp_path / "data", 2), name="<mug>", method=method, **short)
    assert {entry.kind for entry in learned.entries.values()} <= KINDS[method] | {"rows"}
    assert all(bool(entry.tensors["values"].any()) for entry in learned.entries.values() if entry.kind == "sparse")
    learned.save(tmp_path / "learned.safetensors")
    assert (tmp_path / "learned.safetensors").stat().st_size < 1 << 20
