"""Low-rank training of mm-tiny on given pictures: relearning of an erased concept, and a user's LoRA on top of it.

The loss is that of flow matching, as in training: x = (1 - s) clean + s noise, velocity = noise - clean.

Legend: B pictures, C latent channels, H = W latents a side.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mm.adapters.patch import Patch
from mm.erasure.gradients import LowRank, descend
from mm.layers.base_hash import base_hash
from mm.layers.surgery import linears
from mm.pipelines.prompt_encoding import tokenize

LAYERS = r"(text_layers|picture_layers)\.\d+\.(attn\.to_[qkv]|attn\.to_out|to_[kv]_pic|ff\.(up|down))"


def train_lora(
    pipe: Any,
    pictures: Tensor,
    prompts: Sequence[str],
    *,
    steps: int = 100,
    rank: int = 8,
    rate: float = 2e-3,
    batch: int = 8,
    seed: int = 0,
    name: str = "user-lora",
) -> Patch:
    """A LoRA of the trunk, trained on the model as it is now, patches included.

    Args:
        pipe: of mm-tiny.
        pictures: uint8 (B, 3, 128, 128).
        prompts: one a picture.
        steps: of AdamW.
        rank: of each layer's term.
        rate: learning rate.
        batch: pictures a step.
        seed: of noise, order and start.
        name: of the patch.
    """
    clean = encoded(pipe, pictures)
    ids, mask = tokenize(list(prompts), pipe.text_tokenizer, clean.device)
    layers = {f"trunk.{path}": layer for path, layer in linears(pipe.trunk) if re.fullmatch(LAYERS, path)}
    terms = LowRank(layers, rank, seed)
    optimizer = torch.optim.AdamW(terms.parameters, lr=rate, weight_decay=0.0)
    g = torch.Generator().manual_seed(seed)
    losses = []
    with torch.enable_grad(), terms.on():
        for _ in range(steps):
            rows = torch.randint(len(clean), (min(batch, len(clean)),), generator=g).to(clean.device)
            noise = torch.randn(len(rows), *clean.shape[1:], generator=g).to(clean.device)
            sigma = torch.sigmoid(torch.randn(len(rows), generator=g)).to(clean.device)
            s = sigma.view(-1, 1, 1, 1)
            noisy = (1 - s) * clean[rows] + s * noise
            cache = pipe.trunk.encode_text(ids[rows], mask[rows])
            features = pipe.trunk(noisy, sigma, cache, "flow")
            velocity = pipe.velocity_decoder(noisy, sigma, features).float()
            loss = (velocity - (noise - clean[rows])).square().mean()
            # the last text layer's own output is read by no picture
            grads = torch.autograd.grad(loss, terms.parameters, materialize_grads=True)
            descend(optimizer, terms.parameters, grads)
            losses.append(float(loss.detach()))
    report = {"steps": steps, "first_loss": losses[0], "last_loss": sum(losses[-10:]) / len(losses[-10:])}
    return Patch(entries=terms.entries(), method="lora", base=base_hash(pipe.trunk), name=name, report=report)


@torch.no_grad()
def encoded(pipe: Any, pictures: Tensor) -> Tensor:
    """Latents (B, C, H, W) of uint8 pictures."""
    pixels = pictures.to(pipe.device).float() / 127.5 - 1
    return pipe.autoencoder.encode(pixels.to(pipe.autoencoder.dtype)).float()


@torch.no_grad()
def inverted(pipe: Any, clean_BCHW: Tensor, steps: int) -> Tensor:
    """The noise from which the flow under the empty prompt leads to given latents: Euler steps from sigma 0 to 1."""
    ids, mask = tokenize([""], pipe.text_tokenizer, clean_BCHW.device)
    cache = pipe.trunk.encode_text(ids, mask).repeat(len(clean_BCHW))
    x = clean_BCHW
    levels = torch.linspace(0, 1, steps + 1, device=x.device)
    for low, high in itertools.pairwise(levels):
        sigma = low.expand(len(x))
        features = pipe.trunk(x, sigma, cache, "flow")
        x = x + (high - low) * pipe.velocity_decoder(x, sigma, features).float()
    return x
