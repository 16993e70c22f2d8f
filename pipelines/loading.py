"""Whether a model folder is whole and sound: checked before anything is built, and again once it is loaded.

Design choices
- diffusers only logs a tensor that a file lacks, and leaves the new random one in place: a model that loads, and draws
  something else. Here it raises, with the component and the first names.
- The index, every config and the headers of the weights are read first. A component is built without weights, within
  the limits of what its file holds, and its tensors are compared by name, shape and kind; then diffusers loads it.
- A folder names classes. Only those that the pipeline takes are imported, never a module that a file asks for.
- Several pipelines live in one folder (drawing, reading, editing); each takes the components that it needs.
- Local folders are checked: what comes from the hub has been checked against its hash on the way.
"""

from __future__ import annotations

import importlib
import inspect
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import PreTrainedTokenizerBase

from mm.core.build_limit import build_empty
from mm.core.errors import UserError, shown
from mm.core.files import read_regular
from mm.core.model_files import MAX_NUMBER, check_loaded, check_sizes, check_tensors, largest_size, weight_headers
from mm.core.part_files import only_variant
from mm.core.safe_json import Fields, parse_json, read_object

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")
_TOKENIZER_BYTES = 64 << 20
_TEXT_STEP = 32  # prompts are padded to a multiple of it (`mm.pipelines.prompts`)
MAX_WEIGHT = 1e6
MAX_SETTING = 10_000_000  # in configs of transformers, whose lengths of context reach a million
_LIBRARIES = ("diffusers", "transformers")


class SharedFolderMixin:
    """For pipelines that share one folder: what belongs to the others is passed over in silence."""

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """The folder's index without the parts that this pipeline does not take."""
        config = super().load_config(*args, **kwargs)  # type: ignore[misc]
        takes = set(inspect.signature(cls.__init__).parameters)

        def own(index: dict[str, Any]) -> dict[str, Any]:
            return {k: x for k, x in index.items() if k.startswith("_") or k in takes or not isinstance(x, list)}

        return (own(config[0]), *config[1:]) if isinstance(config, tuple) else own(config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Path | str, **kwargs: Any) -> Any:
        """Loads a pipeline as diffusers does; a local folder is checked before and after.

        Args:
            pretrained_model_name_or_path: a folder (a `Path`), or a hub name.
            **kwargs: as for diffusers; components among them are taken as they are.

        Returns:
            The pipeline.

        Raises:
            UserError: where a folder is incomplete, damaged or holds values that are not finite.
        """
        where = pretrained_model_name_or_path
        if not isinstance(where, Path):
            return super().from_pretrained(where, **kwargs)  # type: ignore[misc]
        if kwargs.get("variant") is None and where.is_dir():
            kwargs["variant"] = only_variant(where)
        check_folder(cls, where, kwargs)
        try:
            pipe = super().from_pretrained(where, **kwargs)  # type: ignore[misc]
        except UserError:
            raise
        except Exception as error:  # what tokenizers and schedulers raise for damaged files is of any type
            raise UserError(f"the model in {where} cannot be loaded ({_line(error)}); copy or save it again") from error
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module) and name not in kwargs:
                check_loaded(part, where / name, MAX_WEIGHT)
            elif isinstance(part, PreTrainedTokenizerBase) and name not in kwargs:
                check_tokenizer(part, where / name, getattr(pipe, "trunk", None))
            elif isinstance(part, SchedulerMixin) and name not in kwargs:
                check_scheduler(part, where / name)
        check_together(pipe.components, where)
        return pipe


def check_folder(pipeline: type, where: Path, given: Mapping[str, Any]) -> None:
    """Raises UserError unless every component that a pipeline takes is whole in a folder.

    Args:
        pipeline: the pipeline's class; its `__init__` names the components and their classes.
        where: the folder, with a `model_index.json`.
        given: options of `from_pretrained`; components among them do not come from the folder.
    """
    index = Fields(read_object(where / "model_index.json", "model index"), str(where / "model_index.json"))
    hints = typing.get_type_hints(pipeline.__init__)  # type: ignore[misc]
    for name, parameter in inspect.signature(pipeline.__init__).parameters.items():  # type: ignore[misc]
        if name == "self" or name in given or parameter.kind is parameter.VAR_KEYWORD:
            continue
        entry = index.raw.get(name)
        if entry in (None, [None, None]):
            if parameter.default is parameter.empty:
                index.wrong(name, "a list of a module and a class")
            continue
        found = _class(index, name, entry, _classes(hints.get(name, object)))
        _check_component(found, where / name, given.get("variant"))


def check_transformers_folder(kind: Any, where: Path, variant: str | None = None) -> None:
    """Raises UserError unless a folder in transformers' layout is whole: JSON files, headers, and sizes in its config.

    Args:
        kind: the class of transformers that will load it. Names of tensors are left to that: it renames some.
        where: the folder.
        variant: as for `from_pretrained`.
    """
    _read_json_files(where)
    config_file = where / "config.json"
    settings, stored = read_object(config_file), weight_headers(where, variant)
    check_sizes({k: x for k, x in settings.items() if k != "vocabulary_map"}, MAX_SETTING, config_file)
    values = sum(header.numel for header in stored.values())

    def make() -> Any:
        with torch.device("meta"):
            return kind(kind.config_class.from_dict(settings))

    build_empty(make, len(stored), values, str(config_file))


def check_tokenizer(tokenizer: Any, where: Path, trunk: Any) -> None:
    """Raises UserError where a loaded tokenizer does not work, or has words that a trunk has no rows for."""
    try:
        made = tokenizer(["two red cats", ""], padding=True, truncation=True, return_tensors="pt")
        most = max(int(made["input_ids"].max()), len(tokenizer) - 1)
    except Exception as error:  # what damaged settings of a tokenizer lead to is of any type
        raise UserError(f"the tokenizer in {where} does not work ({_line(error)}); copy or save it again") from error
    rows = getattr(getattr(trunk, "config", None), "vocabulary_size", None)
    if rows is not None and most >= rows:
        raise UserError(f"the tokenizer in {where} has {most + 1} tokens, but the trunk has rows for {rows}")


def check_together(parts: Mapping[str, Any], where: Path) -> None:
    """Raises UserError where loaded parts of a model disagree in what one hands to the other."""
    trunk, autoencoder = parts.get("trunk"), parts.get("autoencoder")
    if trunk is None:
        return
    if trunk.config.max_text < _TEXT_STEP:
        raise UserError(f"{where / 'trunk'}: max_text is {trunk.config.max_text}; prompts take at least {_TEXT_STEP}")
    wanted = {
        ("velocity_decoder", "feature_width"): trunk.config.width,
        ("code_head", "feature_width"): trunk.config.width,
    }
    wanted |= {(name, "latent_channels"): trunk.config.latent_channels for name in ("velocity_decoder", "autoencoder")}
    if autoencoder is not None:
        wanted["autoencoder", "sample_size"] = trunk.config.latent_size * autoencoder.scale_factor
    for (name, key), value in wanted.items():
        found = getattr(getattr(parts.get(name), "config", None), key, value)
        if found != value:
            raise UserError(
                f"{where / name}: {key} is {found}, but the trunk needs {value}; copy or save the model again"
            )


def check_scheduler(scheduler: Any, where: Path) -> None:
    """Raises UserError where a loaded scheduler gives no usable steps."""
    try:
        steps, counts, none = list[float](), [], torch.zeros(1, 1, 2, 2)
        for count in (1, 2):
            twin = type(scheduler).from_config(scheduler.config)
            twin.set_timesteps(count)
            steps += [*twin.timesteps.tolist(), *(twin.sigmas.tolist() if hasattr(twin, "sigmas") else ())]
            counts.append(len(twin.timesteps) >= count)
            twin.step(none, twin.timesteps[0], none)
    except Exception as error:  # what damaged settings lead to is of any type
        raise UserError(f"the scheduler in {where} does not work ({_line(error)}); copy or save it again") from error
    if not all(counts) or not all(abs(step) <= MAX_WEIGHT for step in steps):
        raise UserError(f"the scheduler in {where} gives the steps {shown(steps)}; copy or save it again")


def _fits(value: object, hint: Any) -> bool:
    """Whether a JSON value is of an annotated type; annotations that JSON has no values for fit."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if hint in (bool, str, types.NoneType):
        return isinstance(value, hint)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list) and all(_fits(x, parts[0]) for x in value)
    return True


def _classes(hint: Any) -> tuple[type, ...]:
    """The classes of an annotation, without None."""
    return tuple(x for x in (typing.get_args(hint) or (hint,)) if isinstance(x, type) and x is not type(None))


def _class(index: Fields, name: str, entry: object, wanted: Collection[type]) -> type:
    """The class that the index names, which must be one that the pipeline takes."""
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
        index.wrong(name, "a list of a module and a class")
    module, kind = entry
    for known in wanted:
        if kind == known.__name__ and module == known.__module__:
            return known
    if module in _LIBRARIES and _NAME.fullmatch(kind):
        found = getattr(importlib.import_module(module), kind, None)
        if isinstance(found, type) and issubclass(found, tuple(wanted)):
            return found
    index.wrong(name, f"a {' or '.join(known.__name__ for known in wanted)}; other classes are passed to the call")


def _check_component(kind: type, folder: Path, variant: str | None) -> None:
    """Checks the files of one component."""
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; copy or save the model again")
    _read_json_files(folder)
    if (folder / "scheduler_config.json").exists():
        _check_scheduler(Fields(read_object(folder / "scheduler_config.json"), str(folder / "scheduler_config.json")))
    if not issubclass(kind, torch.nn.Module):
        return
    config_file = folder / "config.json"
    config = read_object(config_file, "config")
    stored = weight_headers(folder, variant)
    settings = {k: x for k, x in config.items() if k != "quantization_config"}
    if kind.__module__.startswith("mm."):
        known = set(inspect.signature(kind.__init__).parameters) - {"self"}
        fields = Fields({k: x for k, x in settings.items() if not k.startswith("_")}, str(config_file))
        fields.only(sorted(known))
        for key, hint in typing.get_type_hints(kind.__init__).items():
            if key in fields.raw and not _fits(fields.raw[key], hint):
                fields.wrong(key, f"{getattr(hint, '__name__', hint)}".removeprefix("typing."))
    check_sizes(settings, largest_size(stored), config_file)
    values = sum(header.numel for header in stored.values())
    if "quantization_config" in config:
        values *= 4  # two integers a byte, and what is not stored at all
    model = build_empty(lambda: kind.from_config(settings), len(stored), values, str(config_file))  # type: ignore[attr-defined]
    if "quantization_config" in config:
        _prepare(model, config["quantization_config"], config_file)
    check_tensors(model, stored, folder)


def _read_json_files(folder: Path) -> None:
    """Raises UserError where a JSON file of a folder is damaged."""
    for path in sorted(folder.glob("*.json")):
        parse_json(read_regular(path, "JSON file", most=_TOKENIZER_BYTES), str(path), most=_TOKENIZER_BYTES)


def _prepare(model: torch.nn.Module, settings: object, config_file: Path) -> None:
    """Puts empty quantized layers where a config says that they are."""
    from mm.quantization.config import SVDQuantConfig
    from mm.quantization.layout import prepare

    fields = Fields(settings, str(config_file), "quantization_config")
    fields.choice("quant_method", (SVDQuantConfig.METHOD,))
    try:
        config = SVDQuantConfig.from_dict(fields.raw)
    except (TypeError, ValueError, re.error) as error:
        raise UserError(f"{config_file}: quantization_config is not readable ({_line(error)})") from error
    prepare(model, config.layers, None)


def _check_scheduler(fields: Fields) -> None:
    """Raises UserError for sizes that a scheduler would make endless tables of."""
    check_sizes(fields.raw, MAX_NUMBER, fields.source)
    if "num_train_timesteps" in fields.raw:
        fields.whole("num_train_timesteps", 1, MAX_NUMBER)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
