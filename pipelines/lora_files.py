"""LoRA files of a pipeline: found on disk or on the hub, read as tensors, and written, with diffusers' arguments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FILE = "pytorch_lora_weights.safetensors"
_HUB = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")


def lora_tensors(
    source: str | Path | Mapping[str, Tensor],
    *,
    weight_name: str = FILE,
    prefix: str | None = None,
    subfolder: str | None = None,
    use_safetensors: bool | None = True,
    as_source: bool = False,
    **hub: Any,
) -> Any:
    """The tensors of a LoRA file by name, as they are stored.

    Args:
        source: A file, a folder or a hub name holding `weight_name`, or tensors by name.
        weight_name: The file of a folder.
        prefix: Only tensors below this name are taken, and the name is removed; None takes all.
        subfolder: Where in a folder or on the hub the file lies.
        use_safetensors: False would read pickles, which is refused.
        as_source: Return the file's path where no tensor needs to be renamed: its metadata count, too.
        **hub: Options of a download from the hub, as in diffusers.

    Raises:
        UserError: Where there is no such file, an option is unknown, or `prefix` names no tensor.
    """
    if unknown := sorted(set(hub) - set(_HUB)):
        raise UserError(
            f"unknown argument {unknown[0]!r}; known are prefix, subfolder, use_safetensors, {', '.join(_HUB)}"
        )
    if use_safetensors is False:
        raise UserError("use_safetensors=False would load pickled weights, which can run code; leave it out")
    found = source if isinstance(source, Mapping) else find_file(source, weight_name, subfolder, hub)
    if as_source and prefix is None:
        return found
    from mm.adapters.formats.source import load

    tensors = dict(load(found).tensors)
    if prefix is None:
        return tensors
    chosen = {key.removeprefix(f"{prefix}."): t for key, t in tensors.items() if key.startswith(f"{prefix}.")}
    if not chosen:
        raise UserError(f"no tensor of the LoRA begins with {prefix!r}; its first is {next(iter(tensors), 'none')!r}")
    return chosen


def find_file(source: str | Path, weight_name: str, subfolder: str | None, hub: Mapping[str, Any]) -> Path:
    """The file of a LoRA; from the hub where there is no such path."""
    path = Path(source)
    path = path / (subfolder or "") / weight_name if path.is_dir() else path
    if path.is_file():
        return path
    parts = str(source).split("/")
    if not path.exists() and len(parts) == 2 and all(parts) and path.suffix != ".safetensors":
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(str(source), weight_name, subfolder=subfolder, **hub))
        except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ValueError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"no LoRA at {path}, and the hub gave none: {first[:200]}") from error
    raise UserError(f"no LoRA at {path}; give a .safetensors file or a folder holding {weight_name}")


class _OnClassOrObject:
    """A method that diffusers' scripts call on the class, with tensors, and others on a pipeline, with a name."""

    def __get__(self, pipe: Any, owner: Any = None) -> Any:
        def save(*args: Any, **kwargs: Any) -> Path:
            return _save(pipe, *args, **kwargs)

        save.__doc__ = _save.__doc__
        return save


def _save(
    pipe: Any,
    save_directory: str | Path,
    adapter_name: str | None = None,
    *,
    weight_name: str | None = FILE,
    trunk_lora_layers: Mapping[str, Tensor] | None = None,
    transformer_lora_layers: Mapping[str, Tensor] | None = None,
    unet_lora_layers: Mapping[str, Tensor] | None = None,
    is_main_process: bool = True,
    save_function: Any = None,
    safe_serialization: bool = True,
    trunk_lora_adapter_metadata: Mapping[str, Any] | None = None,
    transformer_lora_adapter_metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a LoRA in diffusers' layout to a folder.

    Args:
        save_directory: The folder. A file that is there is replaced, as a whole.
        adapter_name: A loaded adapter of the pipeline; by default the only one.
        weight_name: The file.
        trunk_lora_layers: Tensors of the trunk to write instead, as peft's `get_peft_model_state_dict` gives them.
        transformer_lora_layers: The same under diffusers' name for the denoiser.
        unet_lora_layers: The same.
        is_main_process: False writes nothing (a process of several that train).
        save_function: `save_function(tensors, file)` writes instead.
        safe_serialization: False would write a pickle, which is refused.
        trunk_lora_adapter_metadata: peft's settings of the tensors (alpha, rank), kept in the file.
        transformer_lora_adapter_metadata: The same under diffusers' name.

    Returns:
        The file.
    """
    if not safe_serialization:
        raise UserError("safe_serialization=False would write a pickle, which can run code; leave it out")
    path = Path(save_directory) / (weight_name or FILE)
    given = [x for x in (trunk_lora_layers, transformer_lora_layers, unet_lora_layers) if x is not None]
    if len(given) > 1 or (given and adapter_name is not None):
        raise UserError("give an adapter's name or the tensors of one component, not several of them")
    if not is_main_process:
        return path
    if given:
        return _write_tensors(
            path, given[0], trunk_lora_adapter_metadata or transformer_lora_adapter_metadata, save_function
        )
    if pipe is None:
        raise UserError("nothing to save: call this on a pipeline with a loaded adapter, or give trunk_lora_layers")
    from mm.adapters.formats import write_lora

    loaded = list(pipe._adapters.by_name)
    if adapter_name is None and len(loaded) > 1:
        raise UserError(f"{len(loaded)} adapters are loaded ({', '.join(loaded)}); say which with adapter_name")
    [adapter] = pipe._known([adapter_name] if adapter_name is not None else loaded[:1] or ["default_0"])
    write_lora(adapter.patch, path)
    return path


def _write_tensors(
    path: Path, layers: Mapping[str, Tensor], metadata: Mapping[str, Any] | None, save_function: Any
) -> Path:
    """Tensors of the trunk under its name, written as a whole or not at all."""
    import json

    from mm.core.files import write_bytes
    from mm.core.safe_tensors import tensor_bytes

    named = {
        key if key.startswith("trunk.") else f"trunk.{key}": t.detach().cpu().contiguous() for key, t in layers.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    if save_function is not None:
        save_function(named, str(path))
        return path
    kept = {f"trunk.{key}": value for key, value in (metadata or {}).items()}
    header = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(kept, sort_keys=True)} if kept else {})
    write_bytes(path, tensor_bytes(named, header))
    return path


save_lora_weights = _OnClassOrObject()
