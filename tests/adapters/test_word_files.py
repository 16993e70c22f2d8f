"""Textual-inversion files of all forms: read, they do what diffusers does with them; what does not fit is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import draw_with, tiny_pipeline_of
from tiny_text_encoders import WIDTH

import mm
from mm.adapters.entry import Entry
from mm.adapters.patch import Patch
from mm.core.errors import UserError
from mm.customization.learned import write_textual_inversion
from mm.customization.merging.merge import merge
from mm.engine.attaching import attach, detach

pytestmark = pytest.mark.filterwarnings("ignore:patch")


def _rows(count: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def _theirs(family: str, rows: torch.Tensor, prompt: str, token: str = "<x>") -> torch.Tensor:
    other = tiny_pipeline_of(family)
    other.load_textual_inversion(rows, token=token)
    return draw_with(family, other, prompt=prompt)


@pytest.mark.parametrize(("form", "count"), [("diffusers", 1), ("a1111", 3), ("loaded", 2)])
def test_one_text_encoder(form: str, count: int, tmp_path: Path) -> None:
    """The word is the key, the file's name, or the name in a dictionary that torch has loaded."""
    pipe, rows, file = tiny_pipeline_of("stable-diffusion"), _rows(count), tmp_path / "<x>.safetensors"
    plain = draw_with("stable-diffusion", pipe, prompt="a <x> on grass")
    source: Any = file
    if form == "loaded":
        source = {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "<x>", "step": 100}
    else:
        save_file({"<x>" if form == "diffusers" else "emb_params": rows}, file)
    patch = mm.read_lora(source, pipe)
    assert patch.method == "textual-inversion"
    assert [item["token"] for item in patch.settings["tokens"]] == ["<x>", "<x>_1", "<x>_2"][:count]
    patch.apply(pipe)
    ours = draw_with("stable-diffusion", pipe, prompt="a <x> on grass")
    assert torch.allclose(ours, _theirs("stable-diffusion", rows, "a <x> on grass"), atol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-3)
    patch.undo(pipe)
    assert torch.equal(draw_with("stable-diffusion", pipe, prompt="a <x> on grass"), plain)


@pytest.mark.parametrize("form", ["", "bundle_emb.<x>."])
def test_two_text_encoders_in_one_file(form: str, tmp_path: Path) -> None:
    """`clip_l` and `clip_g`, as A1111, Forge and ComfyUI keep SDXL's; alone, or beside the layers of a LoRA."""
    pipe, one, two = tiny_pipeline_of("stable-diffusion-xl"), _rows(seed=1), _rows(seed=2)
    tensors = {f"{form}clip_l": one, f"{form}clip_g": two}
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    if form:
        stem = f"lora_unet_{layer.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": torch.ones(2, 64), f"{stem}.lora_up.weight": torch.ones(64, 2)}
    file = tmp_path / "<x>.safetensors"
    save_file(tensors, file)
    patch = mm.read_lora(file, pipe)
    assert {entry.kind for entry in patch.entries.values()} == ({"rows", "lowrank"} if form else {"rows"})
    patch.apply(pipe)
    for end, rows in (("", one), ("_2", two)):
        tokenizer, encoder = pipe.components[f"tokenizer{end}"], pipe.components[f"text_encoder{end}"]
        row = encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<x>")]
        assert torch.equal(row, rows[0])
    patch.undo(pipe)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """In A1111's form, of one and of two text encoders; T5 has no place there."""
    for family, ends in (("stable-diffusion", ("",)), ("stable-diffusion-xl", ("", "_2"))):
        pipe = tiny_pipeline_of(family)
        tokens, entries = [], {}
        for k, end in enumerate(ends):
            encoder = pipe.components[f"text_encoder{end}"]
            found = encoder.get_input_embeddings()
            path = next(f"text_encoder{end}.{p}" for p, module in encoder.named_modules() if module is found)
            tokens.append({"token": "<mug>", "tokenizer": f"tokenizer{end}", "embedding": path, "id": 7})
            entries[path] = Entry(kind="rows", tensors={"ids": torch.tensor([7]), "rows": _rows(seed=k)})
        patch = Patch(entries=entries, settings={"tokens": tokens})
        (file,) = write_textual_inversion(patch, tmp_path / "<mug>.safetensors", "a1111")
        assert set(load_file(file)) == ({"clip_l", "clip_g"} if len(ends) > 1 else {"emb_params"})
        read = mm.read_lora(file, pipe)
        assert all(torch.equal(e.tensors["rows"], read.entries[p].tensors["rows"]) for p, e in entries.items())
    with pytest.raises(UserError, match="there are diffusers, a1111"):
        write_textual_inversion(patch, tmp_path / "x.safetensors", "other")  # type: ignore[arg-type]
    (tmp_path / "both_2.safetensors").mkdir()  # the second encoder's file
    with pytest.raises(UserError, match=r"both_2\.safetensors is a folder"):
        write_textual_inversion(patch, tmp_path / "both.safetensors")
    assert not (tmp_path / "both.safetensors").exists()
    (t5,) = [dict(tokens[0], embedding="text_encoder_2.shared", tokenizer="tokenizer_2")]
    wrong = Patch(entries={"text_encoder_2.shared": next(iter(entries.values()))}, settings={"tokens": [t5]})
    with pytest.raises(UserError, match="rows of CLIP's text encoders"):
        write_textual_inversion(wrong, tmp_path / "x.safetensors", "a1111")


def test_words_go_on_by_file_and_merge(tmp_path: Path) -> None:
    pipe, files = tiny_pipeline_of("stable-diffusion"), []
    for k, name in enumerate(("easy", "dark art")):
        files.append(tmp_path / f"{name}.safetensors")
        save_file({"emb_params": _rows(2, seed=k)}, files[-1])
    name, line = attach(pipe, files[0])
    assert line.endswith("1 of 1 layer, scale 1, word easy") and "easy" in pipe.tokenizer.get_vocab()
    detach(pipe, [name])
    assert "easy" not in pipe.tokenizer.get_vocab()
    both = merge([mm.read_lora(file, pipe, name=file.stem) for file in files])
    both.save(tmp_path / "both.safetensors")
    name, line = attach(pipe, tmp_path / "both.safetensors")
    assert line.endswith("scale 1, word easy, word dark_art")
    detach(pipe, [name])
    read = Patch.load(tmp_path / "both.safetensors")
    assert [item["token"] for item in read.settings["tokens"]] == ["easy", "easy_1", "dark_art", "dark_art_1"]
    read.apply(pipe)
    row = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.convert_tokens_to_ids("dark_art_1")]
    assert torch.equal(row, _rows(2, seed=1)[1])


@pytest.mark.parametrize(
    ("family", "source", "message"),
    [
        ("stable-diffusion", {"<x>": torch.ones(1, WIDTH + 1)}, r"rows of 17 values, and no text encoder"),
        ("stable-diffusion", {"clip_g": torch.ones(1, WIDTH)}, r"clip_g of \"lora\" has rows of 16 values"),
        ("stable-diffusion", {"<x>": torch.ones(76, WIDTH)}, "has 76 rows; at most 75"),
        ("stable-diffusion-3", {"<x>": torch.ones(2, WIDTH)}, "reads one row a word"),
        ("stable-diffusion", {"a b": torch.ones(1, WIDTH)}, "no word that a prompt can hold"),
        ("stable-diffusion", {"<x>": torch.full((1, WIDTH), torch.nan)}, "NaN"),
    ],
)  # fmt: skip
def test_words_that_do_not_fit(family: str, source: dict[str, torch.Tensor], message: str) -> None:
    pipe = tiny_pipeline_of(family)
    with pytest.raises(UserError, match=message):
        mm.read_lora(source, pipe)
    with pytest.raises(UserError, match="a textual inversion, which needs a pipeline"):
        mm.read_lora({"<x>": _rows()}, pipe.text_encoder)
