"""Device and compute type: the one place that decides where a model runs and in which type its arithmetic is done.

Design choices
- A CPU gets bfloat16 only where it has instructions for it (AVX512-BF16, AMX, Arm's bf16): elsewhere torch's bfloat16
  products take seven times as long as float32. float16 has fast arithmetic on no CPU that torch serves.
- `ATEN_CPU_CAPABILITY` and `ONEDNN_MAX_CPU_ISA` cap what torch uses, and so they cap what is chosen here.
- The stored type of a model is kept where the device computes in it; a type is only ever widened to float32, so that
  nothing of the weights is lost.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# oneDNN's names of instruction sets that do bfloat16 products; "ALL" and "DEFAULT" are no cap.
_ONEDNN_BF16 = ("ALL", "DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10_1", "AVX10_2")
_AMPERE = 8  # the first compute capability with bfloat16 arithmetic


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Where a model runs and in which type it computes, with the reason as one line.

    Attributes:
        device: torch's name of it, "cuda", "mps" or "cpu".
        dtype: what a 16-bit model computes in there.
        reason: why this type.
    """

    device: str
    dtype: torch.dtype
    reason: str


def choose() -> Choice:
    """The device that a command picks by itself, and the type in which a 16-bit model computes on it."""
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major >= _AMPERE:
            return Choice(device="cuda", dtype=torch.bfloat16, reason=f"sm_{major}{minor} computes in bfloat16")
        old = f"sm_{major}{minor} has no bfloat16 arithmetic"
        return Choice(device="cuda", dtype=torch.float16, reason=f"{old}, but float16")
    if torch.backends.mps.is_available():
        return Choice(device="mps", dtype=torch.float16, reason="Apple's GPUs compute in float16")
    why_not = lacks_bfloat16()
    if why_not is None:
        return Choice(device="cpu", dtype=torch.bfloat16, reason="this CPU has bfloat16 arithmetic")
    return Choice(device="cpu", dtype=torch.float32, reason=f"{why_not}: bfloat16 takes longer than float32")


def lacks_bfloat16() -> str | None:
    """Why torch has no fast bfloat16 products on this CPU; None where it has them."""
    import torch

    found = torch.cpu.get_capabilities()
    if not any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")):
        return "this CPU has no bfloat16 arithmetic"
    if found.get("architecture") in ("x86_64", "AMD64") and not torch.backends.cpu.get_cpu_capability().startswith(
        "AVX512"
    ):
        return f"torch uses {torch.backends.cpu.get_cpu_capability()} here (ATEN_CPU_CAPABILITY)"
    cap = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL").upper()
    if not cap.startswith(_ONEDNN_BF16):
        return f"oneDNN is held at {cap} (ONEDNN_MAX_CPU_ISA)"
    return None


def compute_type(stored: torch.dtype | None, choice: Choice | None = None) -> torch.dtype:
    """The type in which a model stored in `stored` computes without losing anything of its weights.

    Args:
        stored: type of the model's tensors; None where it is not known, which counts as float32.
        choice: the device; by default the one that `choose` picks.

    Returns:
        `stored` where the device has arithmetic for it, else float32.
    """
    import torch

    if stored not in (torch.bfloat16, torch.float16):
        return torch.float32
    choice = choice or choose()
    if choice.device == "cpu":
        return stored if stored == choice.dtype else torch.float32
    if stored == torch.bfloat16 and choice.dtype != torch.bfloat16:
        return torch.float32
    return stored


def place(pipe: Any, choice: Choice | None = None) -> Any:
    """Moves a pipeline or module to the chosen device; parts in a type that is slow there become float32.

    Args:
        pipe: anything with `to`; a pipeline's parts are its `components`.
        choice: the device; by default the one that `choose` picks.

    Returns:
        What `pipe.to` returns: the pipeline itself.
    """
    choice = choice or choose()
    for part in getattr(pipe, "components", {"": pipe}).values():
        widen(part, choice)
    return pipe.to(choice.device)


def widen(part: Any, choice: Choice | None = None) -> None:
    """Makes a module float32 where it is stored in a type that the device has no arithmetic for."""
    import torch

    if not isinstance(part, torch.nn.Module):
        return
    stored = main_type(part)
    if stored is not None and compute_type(stored, choice) != stored:
        torch.nn.Module.to(part, torch.float32)


def main_type(module: torch.nn.Module) -> torch.dtype | None:
    """The type of most of a module's floating-point numbers; None where it holds none."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda kind: sizes[kind]) if sizes else None
