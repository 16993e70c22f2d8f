"""Where a pipeline's weights are: on the device, or waiting on the CPU until they are used."""

from __future__ import annotations

from typing import Any, Literal, get_args

from mm.core.errors import UserError
from mm.engine import memory

Offload = Literal["auto", "none", "model", "group"]


def check_offload(offload: str, device: str) -> None:
    """Raises UserError for a way of offloading that there is not, or that does nothing on the device."""
    if offload not in get_args(Offload):
        raise UserError(f"offload is {offload!r}; give {', '.join(get_args(Offload))}")
    if device == "cpu" and offload not in ("auto", "none"):
        raise UserError(
            f"offload is {offload!r} and the device is the CPU, where all weights are already; leave it out"
        )


def place(pipe: Any, device: str, offload: Offload) -> str:
    """Moves a pipeline to its device, or sets up its offload; says which, empty for the CPU."""
    if device == "cpu":
        pipe.to("cpu")
        return ""
    import torch

    needed, largest = sizes(pipe)
    chosen, why = offload, "as asked for"
    if offload == "auto":
        free = torch.cuda.mem_get_info()[0] if device.startswith("cuda") else memory.free_memory()
        chosen, why = memory.choose_offload(needed, largest, free)
    if chosen == "none":
        pipe.to(device)
    elif chosen == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level")
    return f"offload: {chosen}, {why}"


def sizes(pipe: Any) -> tuple[int, int]:
    """Bytes of all components of a pipeline, and of the largest one."""
    each = [
        sum(t.numel() * t.element_size() for t in (*part.parameters(), *part.buffers()))
        for part in pipe.components.values()
        if hasattr(part, "parameters") and hasattr(part, "buffers")
    ]
    return sum(each), max(each, default=0)
