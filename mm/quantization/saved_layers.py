"""The kinds of quantized layers as config.json names them, checked before a model is changed by them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.core.errors import UserError, shown
from mm.core.safe_json import Fields
from mm.core.safe_tensors import read_header
from mm.layers.linear import ActivationRule

SOURCE = "the quantization_config of the saved model"
MAX_RANK = 65_536


@dataclass(frozen=True, kw_only=True)
class SavedKind:
    """Layers quantized with the same settings. bits: of weights. rank: of the branch. paths: of the layers."""

    bits: int
    rank: int
    smooth: bool
    bias: bool
    activation: ActivationRule
    paths: tuple[str, ...]


def saved_kinds(kinds: Sequence[object]) -> list[SavedKind]:
    """Checks what `describe` wrote.

    Args:
        kinds: the values under `layers` in a quantization_config.

    Returns:
        The kinds in the same order.

    Raises:
        UserError: where a key is missing, unknown or of a wrong type, or a path is given twice; with key and value.
    """
    made = [_kind(Fields(raw, SOURCE, f"layers[{i}]")) for i, raw in enumerate(kinds)]
    seen: set[str] = set()
    for kind in made:
        for path in kind.paths:
            if path in seen:
                raise UserError(f"{SOURCE} gives the layer {shown(path)} twice; quantize the model again")
            seen.add(path)
    return made


def _kind(fields: Fields) -> SavedKind:
    fields.only(("bits", "rank", "smooth", "bias", "activation", "paths"))
    rule = fields.fields("activation")
    rule.only(("bits", "group", "unsigned", "shift"))
    try:
        activation = ActivationRule(
            bits=rule.whole("bits", 4, 16),
            group=rule.whole("group", 0, 64),
            unsigned=rule.flag("unsigned"),
            shift=rule.number("shift", -1e6, 1e6),
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{SOURCE}: {rule.at}: {error}") from error
    return SavedKind(
        bits=fields.choice("bits", (4, 8)),
        rank=fields.whole("rank", 0, MAX_RANK),
        smooth=fields.flag("smooth"),
        bias=fields.flag("bias"),
        activation=activation,
        paths=tuple(fields.texts("paths")),
    )


def check_stored(layers: Iterable[tuple[str, Any]], files: Sequence[str | Path]) -> None:
    """Raises UserError where a quantized layer has a tensor that the files lack.

    A library would fill it with memory that nobody wrote. transformers renames what stands before a layer's own name
    (with and without a head, old and new layouts), so names are counted by their last two parts.

    Args:
        layers: paths and quantized layers.
        files: the safetensors files that are about to be loaded.
    """
    stored = names_in(files)
    wanted = [f"{path}.{name}" for path, layer in layers for name in layer.state_dict()]
    lacking = Counter(map(_end, wanted)) - Counter(map(_end, stored))
    for name in wanted:
        if name not in stored and _end(name) in lacking:
            raise UserError(f"{shown(name, 120)} of the quantized model is in none of its files; quantize it again")


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def names_in(files: Sequence[str | Path]) -> set[str]:
    """The names of all tensors in safetensors files; those of other kinds are passed over."""
    return {name for file in files if Path(file).suffix == ".safetensors" for name in read_header(file).tensors}


def all_plain(kinds: Sequence[object], stored: Collection[str]) -> bool:
    """Whether files that should hold these quantized layers hold plain weights for all of them.

    Making a model from the config of a quantized one copies its quantization settings into a model with plain weights.

    Args:
        kinds: the values under `layers` in a quantization_config.
        stored: names of the stored tensors.
    """
    paths = [path for kind in saved_kinds(kinds) for path in kind.paths]
    return all(f"{path}.weight" in stored and f"{path}.qweight" not in stored for path in paths)


def plain_notice(model: object) -> str:
    """What is said where a model is loaded at 16 bits though its config says otherwise."""
    return f"the config of this {type(model).__name__} names 4-bit layers and its weights are plain; loaded at 16 bits"
