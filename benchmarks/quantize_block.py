"""Seconds that SVDQuant's full search takes for a block of FLUX, at its real size with random weights.

    python benchmarks/quantize_block.py --json runs/quantize_block.json

One double and one single block of FLUX.1 (width 3072, 24 heads) are built, calibrated with random tokens over a few
timesteps and quantized with the default settings; the cost of all 19 + 38 blocks is their weighted sum, as blocks are
quantized one after the other. Random weights cost what trained ones do: no step of the search stops on their values,
but for the branch's turns, whose number is printed.

This script does not measure quality.
"""

from __future__ import annotations

import argparse
import resource
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

import mm
from mm.core.files import write_json

DOUBLE, SINGLE = 19, 38


def block(double: int, single: int) -> FluxTransformer2DModel:
    """FLUX with so many blocks, random bf16 weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    # The position encoding's axes are no parameters, and meta's are gone.
    model.pos_embed = type(model.pos_embed)(theta=10000, axes_dim=[16, 56, 56])
    return model


def calls(tokens: int, words: int, steps: int) -> list[dict[str, Any]]:
    """Keyword arguments of the transformer, over the timesteps."""
    out = []
    for i in range(steps):
        generator = torch.Generator().manual_seed(i)

        def noise(*shape: int, of: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(shape, generator=of).to(torch.bfloat16)

        side = int(tokens**0.5)
        places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).view(-1, 2)
        out.append(
            {
                "hidden_states": noise(1, side * side, 64),
                "encoder_hidden_states": noise(1, words, 4096),
                "pooled_projections": noise(1, 768),
                "timestep": torch.tensor([1 - i / steps], dtype=torch.bfloat16),
                "guidance": torch.tensor([3.5], dtype=torch.bfloat16),
                "img_ids": torch.cat([torch.zeros(side * side, 1), places.float()], 1),
                "txt_ids": torch.zeros(words, 3),
            }
        )
    return out


def measure(double: int, single: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and layers of one kind of block."""
    model = block(double, single)
    with torch.no_grad():
        report = mm.quantize(
            model, mm.SVDQuantConfig(rank=args.rank), calibration=calls(args.tokens, args.words, args.steps)
        )
    changed = [layer for layer in report.layers if layer.bits != 16]
    turns = [layer.turns for layer in changed if layer.turns]
    return {
        "seconds": report.seconds,
        "layers": len(changed),
        "ratio": round(report.ratio, 3),
        "turns": round(sum(turns) / max(len(turns), 1), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=256, help="picture tokens of a calibration call")
    parser.add_argument("--words", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="calibration calls, over the timesteps")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--kinds", nargs="+", choices=("single", "double"), default=["single", "double"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    for name in args.kinds:
        row = rows[name] = measure(int(name == "double"), int(name == "single"), args)
        print(f"{name}: {row['seconds']:.0f} s for {row['layers']} layers ({row['ratio']:.2f} times smaller, "
              f"{row['turns']} turns of the branch)", flush=True)  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    report = rows | {"peak_gib": round(peak, 2), "threads": torch.get_num_threads(), "rank": args.rank}
    report |= {"tokens": args.tokens + args.words, "calls": args.steps}
    if len(rows) == 2:
        whole = DOUBLE * rows["double"]["seconds"] + SINGLE * rows["single"]["seconds"]
        report["flux_hours"] = round(whole / 3600, 2)
        print(f"all of FLUX (19 + 38 blocks): {whole / 3600:.1f} h")
    print(f"peak memory {peak:.1f} GiB")
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
