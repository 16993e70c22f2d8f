"""What 4 bits cost mm-tiny: every method against the 16-bit pictures, from the same seeds.

    python benchmarks/quantized_generate.py [--model mm-tiny] [--prompts 24] [--judged 8] [--json FILE]

Design choices
- The prompts are tuning prompts, never the reporting ones; calibration has sentences of its own. PSNR is over pictures
  of all prompts; the compose score is judged on the same pictures, and its change is paired picture by picture, with a
  bootstrap interval. Of so few pictures it says little, so the default is judged once more on `--judged` pictures of
  every tuning prompt, resampled by prompt.
- Peers get the same linear layers that mm quantizes (mm.families): bitsandbytes NF4, sdnq with its SVD, torchao.
  They are optional and installed apart (see benchmarks/linear.py); one that is not here is listed with its reason.
- Size: bits a weight of the quantized layers, everything kept counted (scales, branches, smoothing).
- LoRAs: real ones, trained for a minute to draw one object for another's name; put on the 4-bit model as they are,
  against baking each into the 16-bit model and quantizing that. One alone decides little: five weights' versions gave
  five answers.

This script does not measure speed; `benchmarks/linear.py` does.
"""

from __future__ import annotations

import argparse
import copy
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mm
from mm.adapters.patch import Entry, Patch
from mm.core.files import write_json
from mm.core.statistics import paired_change
from mm.evaluation.prompts import COMPOSE_TUNE, load_prompts
from mm.evaluation.verdicts import verdicts
from mm.families import find_sites
from mm.layers.linear import Branch
from mm.layers.surgery import branched, swap
from mm.quantization.folders import judged_change
from mm.quantization.numerics import group_scales, round_to_nearest, rounded_inputs
from mm.world.calibration import captions
from mm.world.judge import Judge
from mm.world.tasks import satisfies

Pipe = Any
PLACES = ("on grass", "at night", "in the snow", "on the beach", "", "in the sky")
LORAS = (("cat", "fox"), ("tree", "house"), ("star", "fish"))
PARTS = ("trunk", "velocity_decoder", "code_head")
NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
)  # fmt: skip


def low_sites(pipe: Pipe) -> list[tuple[nn.Module, str]]:
    """The layers that all methods quantize."""
    return [
        (getattr(pipe, part), s.path)
        for part in PARTS
        for s in find_sites(getattr(pipe, part))
        if s.precision != "keep"
    ]


def ours(**settings: Any) -> Callable[[Pipe], float]:
    """mm.quantize with these settings."""

    def run(pipe: Pipe) -> float:
        config = mm.SVDQuantConfig(**settings)
        prompts = None if config.data_free else captions(32)
        report = mm.quantize(pipe, config, calibration=prompts, progress=False)
        weights = sum(layer.bytes_before // 2 for layer in report.layers)
        return 8 * sum(layer.bytes_after for layer in report.layers) / weights

    return run


class Rounded(nn.Module):
    """Round to nearest: 4-bit weights in groups of 64, inputs rounded as they come."""

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        super().__init__()
        scales = group_scales(layer.weight, 4, layer.weight.dtype)
        self.weight = round_to_nearest(layer.weight, scales, 4).dense().to(layer.weight.dtype)
        self.bias, self.bits = layer.bias, bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer with rounded weights and inputs."""
        x = rounded_inputs(x.float(), self.bits, 64 if self.bits == 4 else 0).to(x.dtype)
        return nn.functional.linear(x, self.weight, self.bias)


def replaced(make: Callable[[nn.Linear], nn.Module], bits: float) -> Callable[[Pipe], float]:
    """Every low layer replaced by what `make` gives."""

    def run(pipe: Pipe) -> float:
        for root, path in low_sites(pipe):
            layer = root.get_submodule(path)
            assert isinstance(layer, nn.Linear)
            swap(root, path, make(layer))
        return bits

    return run


def nf4(layer: nn.Linear) -> nn.Module:
    """NF4 weights in blocks of 64 (Dettmers et al. 2023, arXiv 2305.14314), inputs in 16 bits."""
    flat = layer.weight.detach().float().reshape(-1, 64)
    peak = flat.abs().amax(1, keepdim=True)
    nearest = (flat / peak)[..., None].sub(NF4).abs().argmin(-1)
    layer.weight.data = (NF4[nearest] * peak).reshape(layer.weight.shape).to(layer.weight.dtype)
    return layer


def sdnq(layer: nn.Linear) -> nn.Module:
    """sdnq's 4-bit layer with its SVD."""
    from sdnq.quantizer import sdnq_post_load_quant  # type: ignore[import-not-found]

    rank = min(32, min(layer.weight.shape) // 20)
    settings = {"weights_dtype": "int4", "group_size": 64, "use_svd": True, "svd_rank": rank}
    return sdnq_post_load_quant(nn.Sequential(layer), minimum_allowed_numel=0, **settings)[0]


def torchao(layer: nn.Linear) -> nn.Module:
    """torchao's 4-bit weights in groups of 64."""
    import torchao.quantization as q  # type: ignore[import-not-found]

    model = nn.Sequential(layer)
    q.quantize_(model, q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(64)))
    return model[0]


METHODS: dict[str, Callable[[Pipe], float]] = {
    "mm W4A8 (default)": ours(),
    "mm W4A8, no GPTQ": ours(gptq=False),
    "mm W4A8, data-free": ours(data_free=True),
    "mm W8A8": ours(bits=8),
    "mm auto, half the size": ours(bits="auto", size_budget=0.5),
    "mm W4A4": ours(activation_bits=4),
    "nearest W4A4": replaced(lambda layer: Rounded(layer, 4), 4.25),
    "nearest W4A8": replaced(lambda layer: Rounded(layer, 8), 4.25),
    "NF4 weights only": replaced(nf4, 4.25),
    "sdnq int4 + SVD": replaced(sdnq, 6.4),
    "torchao int4": replaced(torchao, 4.25),
}


def draw(pipe: Pipe, prompts: list[str], mode: str = "flow") -> torch.Tensor:
    """Two uint8 pictures a prompt, from fixed seeds."""
    made = []
    for start in range(0, len(prompts), 8):
        part = prompts[start : start + 8]
        seeds = [torch.Generator().manual_seed(1000 * (start + i) + k) for i in range(len(part)) for k in range(2)]
        images = pipe(part, num_images_per_prompt=2, generator=seeds, mode=mode, output_type="pt").images
        made.append((images * 255).round().to(torch.uint8))
    return torch.cat(made)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over pictures, in dB."""
    squares = ((a.float() - b.float()) / 255).square().flatten(1).mean(1).clamp_min(1e-10)
    return float((-10 * squares.log10()).mean())


def change(before: list[bool], after: list[bool], draws: int = 2000) -> tuple[float, float, float]:
    """Mean change of paired verdicts with a 95 % bootstrap interval, in points."""
    mean, low, high = paired_change(before, after, range(len(before)), draws)
    return 100 * mean, 100 * low, 100 * high


def train_lora(pipe: Pipe, name: str, other: str, steps: int) -> Patch:
    """A rank-4 LoRA on the trunk's readings of text: `name` learns to mean what `other` means."""
    trunk, rng = pipe.trunk, random.Random(0)
    torch.manual_seed(0)
    paths = [s.path for s in find_sites(trunk) if s.role in ("cross_k", "cross_v")]
    pairs = {p: (nn.Parameter(torch.randn(4, 256) * 0.05), nn.Parameter(torch.zeros(256, 4))) for p in paths}
    entries = {f"trunk.{p}": Entry(kind="lowrank", tensors={"down": d, "up": u}) for p, (d, u) in pairs.items()}
    for path, (down, up) in pairs.items():
        branched(trunk, path).attach(Branch(name="new", down=down, up=up))
    learner = torch.optim.AdamW([t for pair in pairs.values() for t in pair], 3e-3)
    for _ in range(steps):
        words = [f"a {{}} {rng.choice(PLACES)}".strip() for _ in range(8)]
        given, meant = (
            pipe.text_tokenizer([w.format(noun) for w in words], padding=True, return_tensors="pt")
            for noun in (name, other)
        )
        latents, sigma = torch.randn(8, 16, 8, 8).to(trunk.dtype), torch.rand(8) * 0.5 + 0.5
        with torch.no_grad():
            for path in paths:
                branched(trunk, path).set_scale("new", 0.0)
            goal = trunk(latents, sigma, trunk.encode_text(meant.input_ids, meant.attention_mask.bool()))
            for path in paths:
                branched(trunk, path).set_scale("new", 1.0)
        got = trunk(latents, sigma, trunk.encode_text(given.input_ids, given.attention_mask.bool()))
        loss = nn.functional.mse_loss(got.float(), goal.float())
        learner.zero_grad()
        loss.backward()
        learner.step()
    for path in paths:
        branched(trunk, path).detach("new")
    for entry in entries.values():
        entry.tensors.update({k: t.detach() for k, t in entry.tensors.items()})
    return Patch(entries=entries, name=f"{name}-to-{other}")


def lora_row(load: Callable[[], Pipe], name: str, other: str, steps: int) -> dict[str, float]:
    """PSNR to the 16-bit model with the LoRA: attached to 4 bits, against baked and quantized."""
    places = ("{}", "{} on grass", "red {} at night", "{} and a car", "{} in the snow")
    prompts = [f"a {place.format(name)}" for place in places]
    pipe = load()
    patch = train_lora(pipe, name, other, steps)
    plain = draw(pipe, prompts)
    patch.apply(pipe)
    wanted = draw(pipe, prompts)
    attached, baked = load(), load()
    ours()(attached)
    patch.apply(attached)
    patch.bake(baked)
    ours()(baked)
    return {
        "LoRA's own effect": psnr(plain, wanted),
        "attached to the 4-bit model": psnr(wanted, draw(attached, prompts)),
        "baked, then quantized": psnr(wanted, draw(baked, prompts)),
    }


def judged_default(load: Callable[[], Pipe], each: int) -> dict[str, Any]:
    """The default's compose score against 16 bits on `each` pictures of every tuning prompt, in points."""
    quantized = load()
    ours()(quantized)
    found = judged_change(verdicts(load(), each=each), verdicts(quantized, each=each), each)
    return {name: value if name == "pictures" else 100 * value for name, value in found.items()}


def main() -> None:
    """Measures every method and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mm-tiny")
    parser.add_argument("--prompts", type=int, default=24, help="tuning prompts, two pictures each")
    parser.add_argument("--judged", type=int, default=8, help="pictures of each tuning prompt judged; 0 for none")
    parser.add_argument("--lora-steps", type=int, default=60)
    parser.add_argument("--only", nargs="*", help="methods by name")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    every = load_prompts(COMPOSE_TUNE)
    prompts = every[:: max(1, len(every) // options.prompts)][: options.prompts]
    judge, base = Judge.from_pretrained(), mm.TextToImagePipeline.from_pretrained(options.model)
    base.set_progress_bar_config(disable=True)

    def load() -> Pipe:
        pipe = mm.TextToImagePipeline(**{n: copy.deepcopy(c) for n, c in base.components.items()})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def judged(pictures: torch.Tensor) -> list[bool]:
        twice = [p for p in prompts for _ in range(2)]
        return [satisfies(r, p.wanted).ok for r, p in zip(judge.read(pictures), twice, strict=True)]

    rows: dict[str, Any] = {}
    texts = [p.text for p in prompts]
    wanted = draw(base, texts)
    right = judged(wanted)
    print(f"16 bits: compose {100 * sum(right) / len(right):.1f} on {len(right)} pictures\n")
    print("| method | bits a weight | PSNR to 16 bits, dB | compose, change in points (95 %) |\n|---|---|---|---|")
    for name, method in METHODS.items():
        if options.only and name not in options.only:
            continue
        try:
            pipe = load()
            bits = method(pipe)
            pictures = draw(pipe, texts)
        except Exception as error:
            rows[name] = {"absent": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}
            print(f"| {name} | not here: {rows[name]['absent']} | | |", flush=True)
            continue
        mean, low, high = change(right, judged(pictures))
        rows[name] = {"bits": bits, "psnr": psnr(wanted, pictures), "change": mean, "low": low, "high": high}
        print(f"| {name} | {bits:.2f} | {rows[name]['psnr']:.2f} | {mean:+.1f} [{low:+.1f}, {high:+.1f}] |", flush=True)
    judged_all = judged_default(load, options.judged) if options.judged else {}
    if judged_all:
        interval = "{before:.1f} -> {after:.1f}, {change:+.1f} [{low:+.1f}, {high:+.1f}]".format(**judged_all)
        print(f"\ndefault, {judged_all['pictures']} pictures: {interval}", flush=True)
    loras = {f"{a} to {b}": lora_row(load, a, b, options.lora_steps) for a, b in LORAS if options.lora_steps}
    for name, found in loras.items():
        print(f"LoRA {name}, to 16 bits with it: " + ", ".join(f"{k} {v:.2f} dB" for k, v in found.items()), flush=True)
    if options.json:
        counts = {"prompts": len(prompts), "pictures": len(right)}
        write_json(options.json, {"rows": rows, "loras": loras, "judged": judged_all, **counts})


if __name__ == "__main__":
    main()
