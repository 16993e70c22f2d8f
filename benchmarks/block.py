"""A whole transformer block at 4 bits against torch and OpenVINO: `python benchmarks/block.py --json runs/block.json`.

A single block of FLUX.1 (width 3072, 24 heads) and a transformer block of SDXL (width 1280, 20 heads) are built with
random weights, quantized without data, and timed in turn in one run, as in `benchmarks/linear.py`. OpenVINO's blocks
are traced, and compressed to int4 in groups of 64 by nncf; it is installed apart (`pip install openvino nncf`).

`--render FILE ...` prints the tables of earlier runs.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import logging
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from linear import TYPES, native_type, seconds
from torch import nn

import mm
from mm.kernels import cpu

RANK = 32
WORDS = {"FLUX single block": 512, "SDXL transformer block": 77}
Inputs = dict[str, Any]


class FluxBlock(nn.Module):
    """A single block of FLUX; it takes and returns plain tensors, so that it can be traced."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

        self.block = FluxSingleTransformerBlock(dim=3072, num_attention_heads=24, attention_head_dim=128)

    def forward(self, x_BTD: torch.Tensor, c_BSD: torch.Tensor, temb_BD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of picture tokens, text tokens and the step's embedding."""
        return self.block(x_BTD, encoder_hidden_states=c_BSD, temb=temb_BD)

    @staticmethod
    def inputs(tokens: int) -> tuple[torch.Tensor, ...]:
        """Random ones."""
        return torch.randn(1, tokens, 3072), torch.randn(1, WORDS["FLUX single block"], 3072), torch.randn(1, 3072)


class SdxlBlock(nn.Module):
    """A transformer block of SDXL's middle."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.attention import BasicTransformerBlock

        self.block = BasicTransformerBlock(1280, 20, 64, cross_attention_dim=2048, activation_fn="geglu")

    def forward(self, x_BTD: torch.Tensor, c_BSD: torch.Tensor) -> torch.Tensor:
        """Of picture tokens and the prompt's embeddings."""
        out: torch.Tensor = self.block(x_BTD, encoder_hidden_states=c_BSD)
        return out

    @staticmethod
    def inputs(tokens: int) -> tuple[torch.Tensor, ...]:
        """Random ones."""
        return torch.randn(1, tokens, 1280), torch.randn(1, WORDS["SDXL transformer block"], 2048)


BLOCKS: dict[str, Callable[[], Any]] = {"FLUX single block": FluxBlock, "SDXL transformer block": SdxlBlock}


def ours(block: nn.Module) -> nn.Module:
    """The block at 4 bits with branches, quantized without data."""
    made = copy.deepcopy(block)
    mm.quantize(made, mm.SVDQuantConfig(rank=RANK, data_free=True), progress=False)
    return made


def openvino(block: nn.Module, inputs: tuple[torch.Tensor, ...], bits: int, dtype: torch.dtype) -> Callable[..., Any]:
    """OpenVINO's block in its own 16 or 32 bits, or int4."""
    import nncf  # type: ignore[import-not-found]
    import openvino as ov  # type: ignore[import-not-found]

    nncf.set_log_level(logging.ERROR)
    model = ov.convert_model(copy.deepcopy(block).float(), example_input=tuple(x.float() for x in inputs))
    if bits == 4:
        with redirect_stdout(io.StringIO()):  # its progress bars
            mode = nncf.CompressWeightsMode.INT4_SYM
            model = nncf.compress_weights(model, mode=mode, group_size=64, ratio=1.0, all_layers=True)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    values = {i: x.float().numpy() for i, x in enumerate(inputs)}
    return lambda _: request.infer(values, share_inputs=True, share_outputs=True)


@torch.no_grad()
def measure(name: str, tokens: int, dtype: torch.dtype, rounds: int, absent: dict[str, str]) -> dict[str, Any]:
    """Seconds of every method on one block."""
    torch.manual_seed(0)
    block = BLOCKS[name]().eval().requires_grad_(False)
    inputs = tuple(x.to(dtype) for x in block.inputs(tokens))
    steps: dict[str, Any] = {}
    small, plain = ours(block.to(dtype)), block.to(dtype)
    steps["torch"] = [lambda _: plain(*inputs)]
    steps["mm, 4 bits and branches"] = [lambda _: small(*inputs)]
    for bits in (16, 4):
        method = f"OpenVINO {'int4' if bits == 4 else 'own type'}"
        try:
            steps[method] = [openvino(block, inputs, bits, dtype)]
            steps[method][0](None)
        except Exception as error:  # a peer may fail in any way; the others are still worth timing
            steps.pop(method, None)
            absent[method] = f"{type(error).__name__}: {' '.join(str(error).split())[:140]}"
    layers = sum(type(m).__name__ == "BranchedLinear" for m in small.modules())
    return {"block": name, "tokens": tokens, "layers": layers, "seconds": seconds(steps, inputs[0], rounds, 0.0)}


def table(report: dict[str, Any]) -> str:
    """Times as fast as torch."""
    names = list(dict.fromkeys(n for row in report["rows"] for n in row["seconds"] if n != "torch"))
    lines = [
        f"| block | tokens | torch {report['dtype']}, ms | " + " | ".join(names) + " |",
        "|---" * (3 + len(names)) + "|",
    ]
    for row in report["rows"]:
        base = row["seconds"]["torch"]
        cells = [f"{base / row['seconds'][n]:.2f}" if n in row["seconds"] else "" for n in names]
        lines.append(f"| {row['block']} | {row['tokens']} | {1000 * base:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--block", action="append", choices=list(BLOCKS), help="default: both")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024], help="of the picture")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["auto", *TYPES], default="auto", help="of torch's block and of the inputs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--render", type=Path, nargs="+", metavar="JSON", help="print the tables of earlier runs")
    given = parser.parse_args()
    if given.render:
        print("\n\n".join(table(json.loads(file.read_text())) for file in given.render))
        return
    dtype, absent = native_type() if given.dtype == "auto" else given.dtype, {}
    report: dict[str, Any] = {
        "dtype": dtype, "isa": cpu.instruction_set(), "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "rows": [], "absent": absent,
    }  # fmt: skip
    for name in given.block or list(BLOCKS):
        for tokens in given.tokens:
            report["rows"].append(measure(name, tokens, TYPES[dtype], given.rounds, absent))
    print(table(report))
    for method, reason in absent.items():
        print(f"not here: {method} ({reason})")
    if given.json is not None:
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
