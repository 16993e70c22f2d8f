"""`mm doctor`: what this machine offers, what is slow, and why.

Design choices:
- Everything is looked up now: a module that is there, a flag the CPU names, a file that lies in weights/. Versions come
  from the installed metadata, so that only torch is imported (it alone knows the devices).
- `report` is plain data for `--json` and for bug reports; `lines` is its text form.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

import mm
from mm.cli import options as shared
from mm.core import devices, files
from mm.core import threads as waiting
from mm.core.paths import embedded_models, weights_dir

_PACKAGES = (
    *("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "safetensors", "tokenizers"),
    *("open-clip-torch", "vector-quantize-pytorch", "torchmetrics", "gradio", "numpy", "pillow", "triton", "xformers"),
    "ray",
)
_OPTIONAL = {"triton", "xformers", "ray"}
# What our arithmetic can use, of all that a CPU names: x86 flags, then Arm's
_FEATURES = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve"),
)

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: mm doctor --json doctor.json    mm doctor mm-tiny")
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="A model: its memory at 16 and 4 bits, and how it would be loaded.")
    ] = None,
    json_file: shared.JsonOption = None,
    force: shared.ForceOption = False,
) -> None:
    """Reports device, CPU features, kernels, versions and weights, and what is slow and why; or about a model.

    No weights are loaded.
    """
    if model is not None:
        _of_model(model, json_file)
        return
    facts = report()
    if json_file is not None:
        files.write_json(json_file, facts)
    print("\n".join(lines(facts)))


def _of_model(model: str, json_file: Path | None) -> None:
    """Prints what a model needs, by the headers of its files."""
    from dataclasses import asdict

    from mm.engine.advice import advice

    found = advice(model)
    if json_file is not None:
        files.write_json(json_file, asdict(found))
    print("\n".join(found.lines()))


def report() -> dict[str, Any]:
    """Everything that the command prints, as JSON-ready data."""
    facts: dict[str, Any] = {
        "mm": mm.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": device(),
        "cpu": cpu(),
        "threads": threads(),
        "kernels": kernels(),
        "versions": {name: version(name) for name in _PACKAGES},
        "weights": weights(),
    }
    return {**facts, "notes": list(notes(facts))}


def device() -> dict[str, Any]:
    """The device a command picks by itself, and every GPU that torch sees."""
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    chosen = devices.choose()
    return {
        "default": chosen.device,
        "computes_in": str(chosen.dtype).removeprefix("torch."),
        "why": chosen.reason,
        "gpus": [{"name": gpu.name, "gib": round(gpu.total_memory / 2**30, 1)} for gpu in gpus],
        "torch_built_for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU",
    }


def cpu() -> dict[str, Any]:
    """Cores this process may use, torch's threads, and the features that matter, as far as the system names them."""
    import torch

    named = _cpu_flags()
    return {
        "name": _cpu_field("model name") or platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": [feature for feature in _FEATURES if feature in named],
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
    }


def threads() -> dict[str, Any]:
    """How OpenMP's threads wait, and how busy the machine is."""
    busy = waiting.load()
    return {"waiting": waiting.policy(), "load": busy[0] if busy else None, "cores": busy[1] if busy else None}


def _cpu_field(key: str) -> str:
    """A field of Linux' /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    rows = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return next((row.partition(":")[2].strip() for row in rows if row.partition(":")[0].strip() == key), "")


def _cpu_flags() -> set[str]:
    return {*_cpu_field("flags").split(), *_cpu_field("Features").split()}


def kernels() -> dict[str, bool]:
    """Which backends of mm.kernels are ready on this machine."""
    from mm.kernels import backends

    return {name: state == "ready" for name, state in backends().items()}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def weights() -> dict[str, Any]:
    """Embedded folders with their size; `models` are those that a pipeline can be loaded from."""
    root = weights_dir()
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    sizes = {path.name: sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) for path in folders}
    return {"folder": str(root), "models": embedded_models(), "bytes": sizes}


def notes(facts: dict[str, Any]) -> Iterator[str]:
    """What is slow or missing here, why, and what would help."""
    machine, processor, versions = facts["device"], facts["cpu"], facts["versions"]
    if machine["default"] == "cpu":
        why = (
            "this torch is built for the CPU; for a GPU install torch's CUDA build"
            if machine["torch_built_for"] == "CPU"
            else "torch is built for CUDA, but sees no GPU (driver? CUDA_VISIBLE_DEVICES?)"
        )
        yield f"Everything runs on the CPU: {why}."
        yield from _cpu_notes(processor)
        if versions["xformers"]:
            yield "xformers has no CPU kernels: attention goes through torch's own."
    else:
        if not versions["xformers"]:
            yield "xformers is absent: attention goes through torch's own. `pip install 'mm-gen[xformers]'` adds it."
        if not versions["triton"]:
            yield "triton is absent, so torch.compile has no GPU backend: `pip install 'mm-gen[triton]'`."
    yield from _thread_notes(facts["threads"])
    if not any(facts["kernels"].values()):
        yield "mm.kernels holds no backend: linear layers run through torch's own."
    if not facts["weights"]["models"]:
        yield f"No embedded model in {facts['weights']['folder']}: pass --model a folder or a hub name."
    absent = [name for name, found in versions.items() if found is None and name not in _OPTIONAL]
    if absent:
        yield f"Missing packages: {', '.join(absent)}. `pip install mm-gen` again brings them."


def _thread_notes(found: dict[str, Any]) -> Iterator[str]:
    if found["load"] is not None and found["load"] > found["cores"]:
        yield (
            f"The machine is busy: {found['load']:.1f} processes want {found['cores']} cores, so that all of this "
            "takes longer."
        )


def _cpu_notes(processor: dict[str, Any]) -> Iterator[str]:
    features = set(processor["features"])
    if processor["threads"] < processor["cores"]:
        yield f"torch uses {processor['threads']} of {processor['cores']} cores: see OMP_NUM_THREADS."
    if not features:
        return  # the system does not say, so nothing is printed of it
    if not features & {"avx512_fp16", "asimdhp"}:
        yield "This CPU has no float16 arithmetic: float16 is many times slower than float32; use bfloat16 or float32."
    if not features & {"avx512_bf16", "amx_bf16", "bf16"}:
        yield "This CPU has no bfloat16 arithmetic: bfloat16 saves memory here, no time."
    if not features & {"avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp"}:
        yield "This CPU has no 8-bit dot product (VNNI): 8- and 4-bit layers save memory here, no time."


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The report for a reader."""
    machine, processor, stored = facts["device"], facts["cpu"], facts["weights"]
    yield f"mm        {facts['mm']}, Python {facts['python']}, {facts['system']}"
    gpus = ", ".join(f"{gpu['name']} ({gpu['gib']} GiB)" for gpu in machine["gpus"])
    yield f"device    {machine['default']}{gpus and f': {gpus}'}; torch is built for {machine['torch_built_for']}"
    yield f"type      {machine['computes_in']}: {machine['why']}"
    yield f"cpu       {processor['name']}, {processor['cores']} cores, {processor['threads']} threads"
    yield f"features  {' '.join(processor['features']) or 'not known here'}; torch uses {processor['torch_uses']}"
    busy = facts["threads"]
    load = "" if busy["load"] is None else f"; load {busy['load']:.1f} on {busy['cores']} cores"
    yield f"threads   {busy['waiting']}{load}"
    yield f"kernels   {', '.join(name for name, found in facts['kernels'].items() if found) or 'none'}"
    sizes = [f"{name} {size / 2**20:.1f} MiB" for name, size in stored["bytes"].items()]
    yield f"weights   {', '.join(sizes) or 'none'} in {stored['folder']}"
    yield "versions  " + ", ".join(f"{name} {found or 'absent'}" for name, found in facts["versions"].items())
    yield from (f"note      {note}" for note in facts["notes"])
