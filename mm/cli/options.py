"""Options that several commands share: each is named, explained and checked here once.

Design choices
- `--lora` and `--patch` are two names of one option: the contents of a file say what it is, and the order of the
  command line is the order of applying, across both.
- What an option stands for is checked before a model is loaded, as far as the model is not needed for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from mm.core.errors import UserError
from mm.core.files import check_new
from mm.core.paths import expanded, resolve_model


class DrawingMode(StrEnum):
    """How a model with several modes draws."""

    flow = "flow"
    codes = "codes"


class Bits(StrEnum):
    """Bits of the weights."""

    four = "4"
    eight = "8"
    sixteen = "16"


class OffloadTo(StrEnum):
    """Where weights are that are not in use."""

    auto = "auto"
    none = "none"
    model = "model"
    group = "group"


class Dtype(StrEnum):
    """The type that a model computes in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _gone(given: bool) -> None:
    if given:
        raise typer.BadParameter("it was replaced by --bits 4")


def _place(context: typer.Context, path: Path | None) -> Path | None:
    """The path of a report, which is checked before anything is computed for it. `--force` is read before it."""
    if path is not None:
        check_new(path, force=bool(context.params.get("force")))
    return path


def _place_beside_grid(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None and path.suffix.lower() == ".png":
        raise UserError(f"{path} ends in .png, as the picture grid beside the report does; give a name such as x.json")
    _place(context, path)
    _place(context, None if path is None else path.with_suffix(".png"))
    return path


JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", callback=_place, help="Also write it here.")]
ReportOption = Annotated[
    Path | None,
    typer.Option("--json", callback=_place_beside_grid, help="Write the report here, and a picture grid beside it."),
]
ForceOption = Annotated[bool, typer.Option("--force", is_eager=True, help="Replace a file that exists.")]
MODEL_HELP = "An embedded model, a folder, a .safetensors checkpoint, or a hub name."
ModelOption = Annotated[str, typer.Option("--model", help=MODEL_HELP)]
BaseOption = Annotated[
    str | None,
    typer.Option(help="For a .safetensors checkpoint: the model that gives configs and the parts that the file lacks."),
]
BitsOption = Annotated[
    Bits | None,
    typer.Option(
        "--bits",
        help="4 (or 8): low-bit weights, made at the first call and kept; pictures are drawn singly. Default: the "
        "weights as they are.",
    ),
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", "--patch", metavar="FILE[:SCALE]", help="A LoRA or patch; may be repeated, applied in this order."
    ),
]
SizeOption = Annotated[
    str | None, typer.Option("--size", metavar="WxH", help="Pixels, for example 1024x768 (default: the model's).")
]
NegativeOption = Annotated[str | None, typer.Option("--negative", help="What to avoid.")]
SchedulerOption = Annotated[
    str | None, typer.Option("--scheduler", help="Another sampler: a diffusers class, or a name such as euler.")
]
OffloadOption = Annotated[OffloadTo, typer.Option("--offload", help="Where weights wait that are not in use.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="The type that the model computes in.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="An argument of the pipeline's call; may be repeated."),
]
ModeOption = Annotated[
    DrawingMode | None, typer.Option("--mode", help="For models with several modes: flow matching, or codes.")
]
StepsOption = Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps (default: the model's).")]
GuidanceOption = Annotated[
    float | None, typer.Option(min=0, max=100, help="How strictly words are followed; 1 = off (default: the model's).")
]
StrictOption = Annotated[
    bool | None,
    typer.Option(
        "--strict/--no-strict",
        help="Refuse a prompt with words that are not understood (mm-tiny); by default they are named and left out.",
    ),
]
BestOfOption = Annotated[
    int | None,
    typer.Option(
        min=1, max=64,
        help="Draw again, so often at most, until the model itself sees in the picture what was asked for (mm-tiny; "
        "default: 1).",
    ),
]  # fmt: skip
ApartOption = Annotated[
    bool, typer.Option("--apart", help="Each adapter draws its subject in a place of its own: docs/customization.md.")
]
StandInOption = Annotated[
    list[str] | None,
    typer.Option(
        "--stand-in", metavar="WORD=THING",
        help="What the base draws in the place of an adapter's subject, for --apart; may be repeated.",
    ),
]  # fmt: skip
RefineOption = Annotated[
    float | None,
    typer.Option(
        min=0, max=1,
        help="Share of the noise from which subjects that are drawn --apart are drawn again at the picture's size; "
        "0: not at all. Default: 0.6.",
    ),
]  # fmt: skip
FastOption = Annotated[bool, typer.Option("--fast", help="Leave out work that changes a picture little: docs/fast.md.")]
FastSetOption = Annotated[
    list[str] | None,
    typer.Option("--fast-set", metavar="NAME=VALUE", help="One setting of --fast; may be repeated."),
]
QuantizedOption = Annotated[bool, typer.Option("--quantized", hidden=True, callback=_gone)]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """What a model is loaded with."""

    model: str = "mm-tiny"
    bits: Bits | None = None
    adapters: list[str] | None = None
    offload: OffloadTo = OffloadTo.auto
    dtype: Dtype = Dtype.auto
    base: str | None = None

    def engine(self, adapters: list[tuple[Path, float]] | None = None, bits: int | None = None) -> Any:
        """Loads the model and says on stderr what was chosen.

        Args:
            adapters: where none are given on the command line: those of a picture that is drawn again.
            bits: the same.

        Raises:
            UserError: for a wrong adapter, before anything is loaded; or a model that cannot be loaded.
        """
        from mm.cli.running import loaded

        files = [adapter(text) for text in self.adapters or ()] or adapters or []
        if not expanded(self.model).is_file():
            resolve_model(self.model)  # a wrong name fails before seconds of imports
        return loaded(
            self.model,
            bits=int(self.bits) if self.bits is not None else bits,
            adapters=files,
            offload=self.offload.value,
            dtype=self.dtype.value,
            base=self.base,
        )


def family_of_model(model: str) -> Any:
    """The family of a model that lies here, before it is loaded; None for one that is not known by its folder."""
    from mm.families.folders import family_at

    if expanded(model).is_file():
        return None
    where = resolve_model(model)
    return family_at(where) if isinstance(where, Path) else None


def check_world(model: str, modes: Sequence[str]) -> None:
    """Raises UserError for a model that does not draw the world, by the modes in which it draws."""
    if "flow" not in modes:
        raise UserError(
            f"{model} is no model of mm's world, which the prompts and the judge of mm eval are about; the report of "
            "mm quantize compares its pictures before and after"
        )


def adapter(text: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE as file and scale; a folder stands for the file that peft or diffusers saved in it.

    Raises:
        UserError: where there is no such file, or the scale is no finite number.
    """
    from mm.core.adapter_files import adapter_file
    from mm.engine.attaching import parsed

    path, scale = parsed(text)
    return adapter_file(path), scale


def size(text: str | None) -> tuple[int, int] | None:
    """WxH, or one number for a square, as (width, height). Raises UserError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*([0-9]{1,5})\s*(?:[xX×*,]\s*([0-9]{1,5}))?\s*", text)
    if found is None:
        raise UserError(f"size is {text!r}; give width and height in pixels, for example 1024x768")
    return int(found[1]), int(found[2] or found[1])


def given(context: typer.Context, *names: str) -> list[str]:
    """Those of some options that stand on the command line, as they are written there: "--prompts"."""
    sources = {name: context.get_parameter_source(name) for name in names}
    found = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    return [f"--{name.replace('_', '-')}" for name in found]


def apart(chosen: bool, given: list[str] | None) -> bool | dict[str, str] | None:
    """`Draw.apart` of --apart and --stand-in, each of which suffices; None where neither is given."""
    if not given:
        return chosen or None
    from mm.engine.requests import stand_ins

    return stand_ins(given, "--stand-in")


def fast(chosen: bool, given: list[str] | None) -> bool | dict[str, Any] | None:
    """`Draw.fast` of --fast and --fast-set, each of which suffices; None where neither is given."""
    return settings(given, "--fast-set", "threshold=0.98") if given else chosen or None


def settings(given: list[str] | None, option: str = "--set", example: str = "clip_skip=1") -> dict[str, Any]:
    """NAME=VALUE as a dictionary; values are JSON (`--set clip_skip=1`), and anything else is text.

    Args:
        given: as on the command line.
        option: its name, in messages.
        example: of a value.

    Raises:
        UserError: for an option without a name or value.
    """
    made: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise UserError(f"{option} is {text!r}; give NAME=VALUE, for example {option} {example}")
        try:
            made[name.strip()] = json.loads(value)
        except ValueError:
            made[name.strip()] = value
    return made


def scheduler(name: str | None, can: Any) -> str | None:
    """The scheduler class that a name means for a model. Raises UserError with those that it takes."""
    from mm.engine.settings import scheduler_named

    if name is None:
        return None
    found = scheduler_named(name, can)
    if found is None:
        raise UserError(f"scheduler is {name!r}; {can.model} takes {', '.join(can.schedulers) or 'only its own'}")
    return found
