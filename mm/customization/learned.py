"""`Learned`: the patch that customization gives, and the files it is written to.

Design choices
- mm's own file holds everything: layers, new words, report. Where only low-rank layers were learned, the file is
  diffusers' layout by default, which other programs load.
- LoRA files say what they are in their metadata (`mm.customization.file_metadata`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mm.adapters.entry import Entry
from mm.adapters.formats.peft_layout import factors_of_peft, peft_type
from mm.adapters.formats.writer import lora_tensors, write_adapter
from mm.adapters.patch import Patch
from mm.core.checks import check_path
from mm.core.errors import UserError
from mm.core.files import write_bytes, write_files
from mm.core.safe_tensors import ordered, tensor_bytes
from mm.customization.file_metadata import hashes_of, lora_metadata, settings_by_part

Layout = Literal["auto", "mm", "diffusers", "kohya", "comfyui", "peft"]
BRINGING_WORDS = ("textual-inversion", "custom-diffusion", "class-diffusion", "detex", "stydeco")
WHOLE = {"loha": ("diffusers",), "lokr": ("diffusers",), "oft": ("diffusers",), "shira": ("diffusers", "peft")}
LAYOUTS = ("auto", "mm", "diffusers", "kohya", "comfyui", "peft")
_CLIPS = {"tokenizer": "clip_l", "tokenizer_2": "clip_g"}  # keys of A1111's embeddings


def check_layout(layout: str, method: str = "", *, word: bool = False) -> None:
    """Checks before the work that a layout can hold what a method will learn.

    Args:
        layout: "auto" or one of `LAYOUTS`.
        method: its name; "" where nothing is learned.
        word: the name gets a row of its own with any method, since the model reads no new word in pieces.

    Raises:
        UserError: for a layout that there is not, and for one that does not hold it.
    """
    if layout not in LAYOUTS:
        raise UserError(f"the layout is {layout!r}; there are {', '.join(LAYOUTS)}")
    if layout in ("auto", "mm"):
        return
    if word or method in BRINGING_WORDS:
        raise UserError(
            f"the layout is {layout!r}, which holds no new word, and {method or 'the adapter'} brings one here; give "
            "--layout mm or leave it out"
        )
    if layout in WHOLE.get(method, ()):
        raise UserError(
            f"the layout is {layout!r}, which does not hold what {method} learns; give another, or leave it out"
        )


@dataclass(kw_only=True)
class Learned(Patch):
    """What was learned.

    Attributes:
        family: of the model; empty where it is not known, as of files of mm that were merged.
    """

    family: str = ""

    def layout(self) -> Layout:
        """The layout that `write` takes by itself: diffusers' where it holds all that was learned."""
        kinds = {entry.kind for entry in self.entries.values()}
        if not self.settings.get("tokens") and peft_type(self.entries):
            try:
                self._in_one_file()
            except UserError:  # a form of it that is none of peft's
                return "mm"
            return "peft"
        if not self.settings.get("tokens") and kinds == {"dora"} and {e.scale for e in self.entries.values()} == {1.0}:
            return "diffusers"
        plain = kinds == {"lowrank"} and not any(entry.scope for entry in self.entries.values())
        return "diffusers" if plain and self.family not in ("", "mm-tiny") else "mm"

    def write(self, path: str | Path, layout: Layout = "auto", *, target: Any = None) -> None:
        """Writes the file, whole or not at all. One that is there is replaced.

        Args:
            path: the file. Layout "peft" writes `adapter_config.json` beside it; "auto" writes one file in any case.
            layout: "mm" holds everything; the others are those of `mm.write_lora`.
            target: the pipeline, for layouts that call layers by other names.

        Raises:
            UserError: for what a layout cannot hold.
        """
        check_layout(layout)
        chosen = self.layout() if layout == "auto" else layout
        if chosen == "mm":
            self.save(path)
            return
        if self.settings.get("tokens"):
            raise UserError(
                f"a LoRA file holds no new word, and this adapter brings {self.settings['tokens'][0]['token']!r}; "
                "write layout 'mm', or the word with write_textual_inversion"
            )
        config: str | None = None
        said: dict[str, Any] = {}
        if layout == "auto" and chosen == "peft":
            tensors, said = self._in_one_file()
        else:
            tensors, config = lora_tensors(self, chosen, target)  # type: ignore[arg-type]
            if chosen == "diffusers":  # others have alphas, beside which diffusers refuses it, or a file of settings
                said = settings_by_part(tensors)
        meta = lora_metadata(self, self.family, tensors, said)
        data = tensor_bytes(tensors, meta)
        write_adapter(path, ordered(data, hashes_of(data)), config)

    def _in_one_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by peft's names with the component before them, and peft's settings by component."""
        parts: dict[str, dict[str, Entry]] = {}
        for path, entry in self.entries.items():
            component, _, below = path.partition(".")
            parts.setdefault(component, {})[below] = entry
        tensors: dict[str, Tensor] = {}
        settings: dict[str, Any] = {}
        for component, entries in parts.items():
            made, said = factors_of_peft(entries)
            tensors |= {f"{component}.{name}": tensor for name, tensor in made.items()}
            settings |= {f"{component}.{key}": value for key, value in said.items()}
        return tensors, settings


def write_textual_inversion(
    patch: Patch, path: str | Path, layout: Literal["diffusers", "a1111"] = "diffusers"
) -> list[Path]:
    """Writes the new words of a patch as textual-inversion files.

    Args:
        patch: with words.
        path: the file. In diffusers' layout each text encoder has its own, with the tokenizer's number in its name.
            Files that are there are replaced, all of them or none.
        layout: "diffusers", which `load_textual_inversion` reads: the word is the key. "a1111", which A1111's web UI
            and ComfyUI read: one file, whose name is the word in prompts there.

    Returns:
        The files.

    Raises:
        UserError: for a patch without words, for what the layout does not hold, and for a place where a file cannot
            be; nothing is written then.
    """
    check_path("the file of the textual inversion", path)
    tokens = patch.settings.get("tokens", ())
    if layout not in ("diffusers", "a1111"):
        raise UserError(f"the layout is {layout!r}; there are diffusers, a1111")
    if not tokens:
        raise UserError(f"patch {patch.name!r} brings no new word, so there is no textual inversion to write")
    if layout == "a1111":
        return [_write_a1111(patch, tokens, Path(path))]
    files, target = {}, Path(path)
    for tokenizer in dict.fromkeys(item["tokenizer"] for item in tokens):
        mine = [item for item in tokens if item["tokenizer"] == tokenizer]
        tensors: dict[str, Tensor] = {}
        for item in mine:
            tensors[item["token"]] = _row_1D(patch, item)
        suffix = tokenizer.removeprefix("tokenizer")
        file = target if not suffix else target.with_name(f"{target.stem}{suffix}{target.suffix}")
        files[file] = tensor_bytes(tensors, {"format": "pt"})
    write_files(files)
    return list(files)


def _row_1D(patch: Patch, item: dict[str, Any]) -> Tensor:
    """The row (1, D) of a word."""
    entry = patch.entries[item["embedding"]]
    place = int(torch.nonzero(entry.tensors["ids"] == int(item["id"]))[0])
    return entry.tensors["rows"][place][None].float()


def _write_a1111(patch: Patch, tokens: list[dict[str, Any]], path: Path) -> Path:
    words = list(dict.fromkeys(item["token"] for item in tokens))
    if len(words) > 1:
        raise UserError(f"an embedding of A1111 is one word, and {patch.name!r} brings {', '.join(words)}")
    other = next((item for item in tokens if not item["embedding"].endswith("token_embedding")), None)
    if other is not None:
        raise UserError(
            f"an embedding of A1111 has rows of CLIP's text encoders, and {words[0]} has one of {other['tokenizer']}; "
            "write layout 'diffusers'"
        )
    rows = {_CLIPS[item["tokenizer"]]: _row_1D(patch, item) for item in tokens}
    tensors = rows if len(rows) > 1 else {"emb_params": next(iter(rows.values()))}
    write_bytes(path, tensor_bytes(tensors, {"format": "pt"}))
    return path
