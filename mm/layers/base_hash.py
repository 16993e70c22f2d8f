"""The hash of a model's 16-bit tensors, by which a patch recognizes the model it was made for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mm.layers.offloading import stored
from mm.layers.originals import kept_bias, original_weight
from mm.layers.surgery import clean, of_tuner, tuner_paths, unwrapped


def base_hash(root: nn.Module) -> str:
    """Hash of a model's 16-bit tensors, without the patches and adapters that are on it.

    Args:
        root: the model; compiled, offloaded and peft-wrapped models give the hash of the plain one.

    Returns:
        The hash of what the model was quantized from, or of its own tensors where it is not quantized.
    """
    root = unwrapped(root)
    kept = getattr(root, "mm_base_hash", None)
    if kept:
        return str(kept)
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(root), key=lambda pair: pair[0]):
        digest.update(name.encode())
        digest.update(str(tuple(tensor.shape)).encode())
        values = tensor.detach().to("cpu", torch.bfloat16) if tensor.is_floating_point() else tensor.detach().cpu()
        digest.update(values.flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What `state_dict` holds of the model itself: no adapters, weights before patches, offloaded values."""
    originals = {
        tensor.data_ptr(): original
        for module in root.modules()
        for name, kept in (("weight", original_weight), ("bias", kept_bias))
        if (original := kept(module)) is not None and (tensor := stored(module, name)) is not None
    }
    state = root.state_dict()
    wrapped = tuner_paths(root)
    for path, module in root.named_modules(remove_duplicate=False):
        for own in (*module._parameters, *module._buffers):
            name = f"{path}.{own}".strip(".")
            if name not in state or ".lora_" in name or of_tuner(name, wrapped):
                continue
            tensor = stored(module, own) if state[name].device.type == "meta" else state[name]
            assert tensor is not None
            yield clean(name), originals.get(tensor.data_ptr(), tensor)
