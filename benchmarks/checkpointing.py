"""Memory and time of a training step with and without gradient checkpointing: `python benchmarks/checkpointing.py`.

A FLUX-shaped transformer of random weights; low-rank terms on its attention are trained. Memory is what a step keeps
for the gradient, beside the weights; each time is the least of `--rounds` alternated ones.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import diffusers
import torch

import mm  # noqa: F401  (families, and the threads' wait policy)
from mm.erasure.gradients import LowRank, gradients
from mm.families import find_sites
from mm.layers.checkpointing import checkpointed
from mm.layers.surgery import submodule


def transformer(width: int, double: int, single: int) -> Any:
    """A FLUX transformer of random weights, in float32."""
    heads = width // 128
    made = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=double, num_single_layers=single, num_attention_heads=heads, attention_head_dim=128,
        joint_attention_dim=512, pooled_projection_dim=256, guidance_embeds=True,
    )  # fmt: skip
    return made.requires_grad_(False).eval()


def step(model: Any, terms: LowRank, given: dict[str, Any], again: bool) -> tuple[float, int]:
    """Seconds of a step, and the bytes that it keeps."""
    seen: dict[int, int] = {}
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *terms.parameters)}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    started = time.perf_counter()
    with checkpointed([model], again) as inputs:
        with terms.on(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**given, return_dict=False)[0].square().mean()
        gradients(loss, terms)
    kept = sum(size for place, size in seen.items() if place not in weights)
    return time.perf_counter() - started, kept + inputs.bytes


def main() -> None:
    """Prints both, and their ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=768, help="FLUX.1: 3072")
    parser.add_argument("--double", type=int, default=4, help="double blocks; FLUX.1: 19")
    parser.add_argument("--single", type=int, default=8, help="single blocks; FLUX.1: 38")
    parser.add_argument("--tokens", type=int, default=1024, help="of the picture; 1024 are 512 x 512 pixels")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    model = transformer(asked.width, asked.double, asked.single)
    layers = {s.path: submodule(model, s.path) for s in find_sites(model) if s.role.startswith("attn")}
    terms = LowRank(layers, rank=8)
    ids = torch.zeros(asked.tokens, 3)
    given = {
        "hidden_states": torch.randn(1, asked.tokens, 64), "encoder_hidden_states": torch.randn(1, 64, 512),
        "pooled_projections": torch.randn(1, 256), "timestep": torch.tensor([0.5]), "guidance": torch.ones(1),
        "img_ids": ids, "txt_ids": torch.zeros(64, 3),
    }  # fmt: skip
    found: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
    for _ in range(asked.rounds):
        for again, runs in found.items():
            runs.append(step(model, terms, given, again))
    (plain, kept), (slower, less) = (min(found[again]) for again in (False, True))
    print(f"kept {kept / 2**20:.0f} MiB, checkpointed {less / 2**20:.0f} MiB: {kept / less:.1f} times less")
    print(f"a step {plain:.2f} s, checkpointed {slower:.2f} s: {slower / plain:.2f} times as long")


if __name__ == "__main__":
    main()
