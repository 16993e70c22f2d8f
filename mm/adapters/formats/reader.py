"""`read_lora`: a LoRA file of another program as a patch for the model at hand, all of it or an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mm.adapters.factors import WHOLE
from mm.adapters.formats.assemble import Part, entries_of
from mm.adapters.formats.kinds import Change, change_of
from mm.adapters.formats.layouts import Parts, grouped, is_lora
from mm.adapters.formats.names import Names, Piece
from mm.adapters.formats.settings import Strengths
from mm.adapters.formats.source import Source, load
from mm.adapters.formats.words import split_words, word_entries
from mm.adapters.patch import Entry, Patch
from mm.adapters.patch_file import META
from mm.core.adapter_files import adapter_name
from mm.core.checks import check_path, check_text, whole
from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.core.safe_tensors import read_header
from mm.layers.linear import BranchedLinear
from mm.layers.surgery import locate, roots_of, submodule

MOST = 10**6  # of a rank


def read_lora(
    source: str | Path | Mapping[str, Tensor],
    target: Any,
    *,
    name: str | None = None,
    truncate_to: int | None = None,
) -> Patch:
    """A LoRA, DoRA, LoHa, LoKr, OFT or textual inversion of another program as a patch for a model.

    Args:
        source: a safetensors file, a folder that peft or diffusers saved, or tensors by key, in the layout of peft,
            diffusers, kohya, LyCORIS, ComfyUI or XLabs; new words in the forms of `mm.adapters.formats.words`.
        target: the module or pipeline it is for; its layers say what the file's names stand for.
        name: of the patch; by default the name of the file without its suffix, or of the folder; "lora" for tensors.
        truncate_to: a rank to which changes of whole weights of linear layers (DoRA, LoHa, LoKr, OFT) are cut down;
            what is lost is printed. Layers of 4-bit weights need it. Without it such changes are exact.

    Returns:
        A patch whose entries are all of the file's tensors.

    Raises:
        UserError: where a key of the file is not understood, is for no layer of this model, or does not fit it.
    """
    _check_call(source, target, name, truncate_to)
    given = load(source)
    try:
        return _patch(given, target, given.name if name is None else name, truncate_to)
    except UserError as error:
        if isinstance(source, Mapping):
            raise
        raise UserError(f"{given.label}: {error}") from error  # one of several files, perhaps


def _patch(given: Source, target: Any, name: str, truncate_to: int | None) -> Patch:
    """All tensors of a source as a patch."""
    odd = not any(map(is_lora, given.tensors))
    words, tensors = split_words(given.tensors, given.word or name, odd)
    modules = grouped(tensors)
    rows, tokens = word_entries(words, target)
    places = _places(modules, target)
    strengths = Strengths(settings=given.settings)
    parts: list[Part] = []
    for module, own in modules.items():
        change = change_of(module, own, places[module], strengths)
        _check_bits(module, change, places[module], truncate_to)
        parts += [Part(module=module, piece=piece, change=change) for piece in places[module]]
    entries = entries_of(parts) | rows
    kinds = sorted({part.change.kind.lower() for part in parts} | ({"textual-inversion"} if rows else set()))
    total = len(given.tensors)
    patch = Patch(
        entries=entries,
        name=name,
        method="+".join(kinds) if kinds != ["lora"] else "lora",
        settings={"source": given.label, "alpha": "as in the file" if _has_alpha(given) else "none: in full"}
        | ({"tokens": tokens} if tokens else {})
        | ({"name": given.trigger} if given.trigger else {}),
        base=given.base,
        report={"file": f"{total} of {counted(total, 'tensor')} of the file"},
    )
    return patch if truncate_to is None else _truncated(patch, target, truncate_to)


def words_of_file(path: str | Path) -> list[str]:
    """The words that an adapter file adds to a tokenizer, without a model.

    Args:
        path: a patch of mm, or a LoRA or textual inversion of another program.

    Returns:
        The token strings; a word of several rows stands for itself and `WORD_1`, `WORD_2` and so on.

    Raises:
        UserError: for any other file.
    """
    if META in read_header(path, "adapter").metadata:
        return [str(item["token"]) for item in Patch.load(path).settings.get("tokens", ())]
    given = load(path)
    words, _ = split_words(given.tensors, given.word, not any(map(is_lora, given.tensors)))
    found: list[str] = []
    for word, parts in words.items():
        rows = max(1 if tensor.ndim == 1 else len(tensor) for tensor in parts.values())
        found += [word, *(f"{word}_{number}" for number in range(1, rows))]
    return found


def subject_of_file(path: str | Path) -> tuple[str, str]:
    """What the patch of an adapter file is called, and what its subject is called in prompts, without a model.

    Args:
        path: a patch of mm, or an adapter of another program.

    Returns:
        The two, the second one "" where the file does not say so.

    Raises:
        UserError: for any other file.
    """
    if META in read_header(path, "adapter").metadata:
        patch = Patch.load(path)
        return patch.name, str(patch.settings.get("name") or "")
    return adapter_name(Path(path)), load(path).trigger


def _check_call(source: object, target: Any, name: object, truncate_to: int | None) -> None:
    """Raises UserError for arguments of wrong types, or a rank below 1."""
    if truncate_to is not None:
        whole("truncate_to", truncate_to, 1, MOST)
    if name is not None:
        check_text("name", name)
    if not isinstance(source, Mapping):
        check_path("the LoRA", source)
    roots_of(target)  # raises for what is no model


def _has_alpha(given: Source) -> bool:
    return any(key.endswith("alpha") for key in (*given.tensors, *given.settings))


def _places(modules: Mapping[str, Parts], target: Any) -> dict[str, tuple[Piece, ...]]:
    names = Names(target)
    found = {module: names.find(module) for module in modules}
    unknown = [module for module, pieces in found.items() if pieces is None]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            f"{len(found) - len(unknown)} of {counted(len(found), 'LoRA layer')} are in this model; "
            f"not: {', '.join(unknown[:3])}{more}"
        )
    return {module: pieces for module, pieces in found.items() if pieces is not None}


def _check_bits(module: str, change: Change, pieces: Sequence[Piece], truncate_to: int | None) -> None:
    """Raises where a change of a whole weight meets a quantized one."""
    if not change.of_weight or truncate_to is not None:
        return
    for piece in pieces:
        if isinstance(piece.layer, BranchedLinear) and piece.layer.bits != 16:
            raise UserError(
                f"{module} is {change.kind}: it changes the whole weight of {piece.path}, which has "
                f"{piece.layer.bits}-bit weights here; give truncate_to=RANK to take the nearest LoRA (what is lost "
                "is printed). The commands take the patch that mm.read_lora(FILE, MODEL, truncate_to=RANK).save(...) "
                "writes"
            )


def _truncated(patch: Patch, target: Any, rank: int) -> Patch:
    """Changes of linear layers' weights cut down to a rank; those of convolutions and norms stay."""
    roots = roots_of(target)

    def linear(path: str, entry: Entry) -> bool:
        spot = locate(roots, path)
        return entry.kind in WHOLE and spot is not None and isinstance(submodule(*spot), nn.Linear)

    cut = {path: entry for path, entry in patch.entries.items() if linear(path, entry)}
    if not cut:
        return patch
    made = Patch(entries=cut, name=patch.name).truncated(rank, target)
    patch.entries |= made.entries
    patch.report |= made.report
    return patch
