"""A tiny random pipeline of the real classes, shared by tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from mm import InterleavedPipeline, TextToImagePipeline
from mm.models.codes import CodeHead
from mm.models.connectors import Connector
from mm.models.text import build_text_tokenizer
from mm.models.trunk import Trunk
from mm.models.understanding_encoder import LatentStem, UnderstandingEncoder
from mm.models.velocity import VelocityDecoder
from mm.tokenizers import Autoencoder, Bridge
from mm.training.conversations import number_words

STEPS = 3
NUMBERS = number_words(lambda word: int(build_text_tokenizer().convert_tokens_to_ids(word)))


def tiny_pipeline(*, codes: bool = True, seed: int = 0) -> TextToImagePipeline:
    """Random weights, with the zero-initialized projections filled so that text and time matter."""
    torch.manual_seed(seed)
    order = list(range(16))
    pipe = TextToImagePipeline(
        text_tokenizer=build_text_tokenizer(),
        trunk=Trunk(width=32, depth=2, heads=2),
        velocity_decoder=VelocityDecoder(feature_width=32, width=32, depth=1, heads=2),
        autoencoder=Autoencoder(encoder_widths=(8, 8, 8), decoder_widths=(8, 8, 8), refine_width=4),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        code_head=CodeHead(order=order, feature_width=32, width=32, depth=1, heads=2) if codes else None,
        bridge=Bridge(order=order) if codes else None,
    )
    for part in filter(None, (pipe.trunk, pipe.velocity_decoder, pipe.code_head)):
        for parameter in part.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_reader(*, seed: int = 0) -> dict[str, Any]:
    """Components of a random model that reads and edits, the drawing ones included."""
    parts = dict(tiny_pipeline(seed=seed).components)
    torch.manual_seed(seed)
    parts["trunk"] = Trunk(width=32, depth=2, heads=2, reads=True, max_text=256, number_words=NUMBERS)
    parts["understanding_encoder"] = UnderstandingEncoder(width=16, depth=1, heads=2, text_width=16, text_depth=1)
    parts["understanding_connector"] = Connector(in_channels=16, width=32, hidden=32, counter_keys=8)
    parts["latent_stem"] = LatentStem(width=16, depth=1)
    for part in (parts["trunk"], parts["understanding_connector"]):
        for parameter in part.parameters():
            parameter.data += 0.15 * torch.randn_like(parameter)
    return parts


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(s) for s in seeds]


def draw(pipe: TextToImagePipeline, prompt: Any = "two red cats on grass", **options: Any) -> torch.Tensor:
    options = {"generator": seeded(7)[0], "num_inference_steps": STEPS, "output_type": "pt"} | options
    return pipe(prompt, **options).images


def says(pipe: InterleavedPipeline, monkeypatch: Any, answer: str) -> None:
    """Makes the model give this answer to every question in a conversation."""
    monkeypatch.setattr(type(pipe), "_ask", lambda self, shown, questions, max_words: [answer] * len(questions))
