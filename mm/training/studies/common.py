"""What the studies share: a pool of pictures, a small trunk, equal budgets, paired questions and paired intervals.

Design choices
- Every run of a study has the same pictures with the same words in the same order, and answers the same questions, so
  that differences are paired; intervals are clustered by scene, since questions about one scene are correlated.
- An answer counts when every token of it is the likeliest one after the right ones before it, which is the same as
  greedy decoding giving exactly that answer, in one pass.
- Drawing is measured on a small world (`OBJECTS` in `TINTS`, cartoon style, one object on plain ground): the budgets of
  a study would leave every model at zero on the whole one.
- The noun readout's grounding loss as in the published model's training (`mm.training.readouts`): without it, within
  the budget of a study, questions that need the picture are answered at chance, and encoders cannot be compared.
- Muon and AdamW as in `mm.training.trainer`, but by samples and not by minutes, and without resuming: a run takes
  minutes.

Legend: B batch, T tokens, N questions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from mm.models.dialogue import IGNORED, Dialogue, stack, word_loss
from mm.models.text import build_text_tokenizer
from mm.models.trunk import Trunk
from mm.models.velocity import VelocityDecoder
from mm.training import conversations
from mm.training.drawing_stage import Drawing, DrawingBatch, DrawingConfig, make_batch
from mm.training.optimizers import muon_and_adamw
from mm.training.readouts import NounReadout, captured_outputs
from mm.training.scene_labels import NounLabels, noun_ids, noun_labels
from mm.world import vocabulary as v
from mm.world.captions import group_phrase
from mm.world.judge import Judge
from mm.world.questions import QA, questions
from mm.world.render import render
from mm.world.scene import Group, Scene, Sprite, colour_is_held_out, place, sample_scene

OBJECTS: tuple[str, ...] = v.OBJECTS[::4]
STYLES: tuple[str, ...] = (v.DEFAULT_STYLE, "pixel art")
TINTS: tuple[str | None, ...] = (None, "red", "green", "blue")
NOUNS_WEIGHT = 0.3
DRAWN_BATCH = 32  # many small steps draw better than few large ones


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Budgets of one run: samples read, samples drawn, pictures in the pool, questions asked.

    `small`: pictures to read are of the small world's objects and two styles.
    """

    samples: int = 30_000
    drawn: int = 15_000
    pool: int = 8192
    questions: int = 4000
    batch_size: int = 32  # at small budgets steps count more than the size of one
    width: int = 128
    depth: int = 4
    rate: float = 1e-3
    seed: int = 0
    small: bool = False

    @property
    def objects(self) -> tuple[str, ...]:
        """What stands in the pictures to read."""
        return OBJECTS if self.small else v.OBJECTS

    @property
    def styles(self) -> tuple[str, ...]:
        """How the pictures to read are drawn."""
        return STYLES if self.small else v.STYLES

    def __post_init__(self) -> None:
        for name in ("samples", "pool", "questions"):
            if getattr(self, name) < self.batch_size:
                raise ValueError(f"{name} {getattr(self, name)} is less than one batch of {self.batch_size}")


class Pool:
    """Scenes with their pictures (N, 3, 128, 128) in uint8, picked from by step."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.scenes = list(scenes)
        self.pictures = torch.cat([render(self.scenes[i : i + 64]) for i in range(0, len(self.scenes), 64)])

    def draw(self, n: int, rng: random.Random) -> tuple[torch.Tensor, list[Scene]]:
        """`n` random pictures in [-1, 1] and their scenes."""
        index = [rng.randrange(len(self.scenes)) for _ in range(n)]
        return self.pictures[index].float() / 127.5 - 1, [self.scenes[i] for i in index]


def reading_pool(config: StudyConfig) -> Pool:
    """Scenes to read, as training samples them."""
    rng = random.Random(f"study reading {config.seed}")
    world: dict[str, Any] = {"objects": config.objects, "styles": config.styles}
    return Pool([sample_scene(rng, default_weight=5, pair_share=0.2, **world) for _ in range(config.pool)])


def small_scene(rng: random.Random) -> Scene:
    """One object of the small world, in a colour that training may see."""
    while True:
        name = rng.choice(OBJECTS)
        colour = rng.choice(TINTS)
        sprites = place(rng, [Group(object=name, colour=colour)], v.DEFAULT_STYLE)
        if sprites and not colour_is_held_out(name, colour):
            return Scene(sprites=sprites)


def drawing_pool(config: StudyConfig) -> Pool:
    """Scenes of the small world."""
    rng = random.Random(f"study drawing {config.seed}")
    return Pool([small_scene(rng) for _ in range(config.pool // 2)])


def new_dialogue() -> Dialogue:
    """An empty conversation."""
    return Dialogue(_tokenizer())


@cache
def _tokenizer() -> Any:
    return build_text_tokenizer()


def small_trunk(config: StudyConfig) -> Trunk:
    """The trunk of a run, always from the same random weights; its noun readout is trained with it."""
    torch.manual_seed(config.seed)
    size: dict[str, Any] = {"width": config.width, "depth": config.depth, "heads": 4, "max_text": 256}
    trunk = Trunk(vocabulary_size=1024, text_ratio=3, picture_ratio=3, reads=True, prefix_lm=True, **size)
    trunk.add_module("noun_readout", NounReadout(config.width))
    return trunk


class Words(NamedTuple):
    """Ids, mask and targets (B, T) of conversations, and labels of their nouns."""

    ids: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    nouns: NounLabels


def reading_words(scenes: Sequence[Scene], rng: random.Random, config: StudyConfig) -> Words:
    """One picture's questions and description each."""
    rows = []
    for scene in scenes:
        first = rng.choice(questions(scene, rng, objects=config.objects))
        row = new_dialogue().user(first.question, scene, about=scene).says(first.answer)
        rows.append(conversations.ask(row, scene, rng, most=4, objects=config.objects))
    return words_of(rows)


def words_of(rows: Sequence[Dialogue]) -> Words:
    """Conversations as a batch."""
    ids, mask, targets = stack(rows)
    return Words(
        ids, mask, targets, noun_labels([r.ids for r in rows], [r.about for r in rows], ids.shape[1], _nouns())
    )


def reading_loss(trunk: Trunk, words: Words, understanding: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the replies, and the noun readout's loss at the middle text layer."""
    readout: Any = trunk.noun_readout
    with captured_outputs(trunk.text_layers[len(trunk.text_layers) // 2 - 1]) as states:
        logits, _ = trunk.read(words.ids, words.mask, understanding)
    return word_loss(logits, words.targets) + NOUNS_WEIGHT * readout(states[0], words.nouns)


@cache
def _nouns() -> dict[int, str]:
    return noun_ids(lambda word: int(_tokenizer().convert_tokens_to_ids(word)))


def fit(
    modules: Sequence[tuple[nn.Module, float]],
    loss: Callable[[int], torch.Tensor],
    steps: int,
    *,
    decay: bool = True,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Minimizes `loss(step)`; each module at its own rate, falling to zero over the last third where `decay`."""
    opts = [
        optimizer
        for module, rate in modules
        for optimizer in muon_and_adamw(module, learning_rate=rate, muon_rate=2 * rate, weight_decay=0.01)
    ]
    rates = [o.param_groups[0]["lr"] for o in opts]
    parameters = [p for module, _ in modules for p in module.parameters() if p.requires_grad]
    for step in range(steps):
        factor = min(1.0, (step + 1) / 30) * (min(1.0, (steps - step) / (steps / 3)) if decay else 1.0)
        for optimizer, rate in zip(opts, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            total = loss(step)
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in opts:
            optimizer.step()
        if on_step and (step % 50 == 0 or step == steps - 1):
            on_step(step, float(total.detach()))


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Held-out scenes, their pictures, and questions as (scene, question)."""

    pool: Pool
    asked: list[tuple[int, QA]]


def exam(config: StudyConfig) -> Exam:
    """At least `config.questions` questions on scenes of held-out compositions."""
    rng = random.Random(f"study exam {config.seed}")
    scenes: list[Scene] = []
    asked: list[tuple[int, QA]] = []
    while len(asked) < config.questions:
        scenes.append(sample_scene(rng, held_out=True, objects=config.objects, styles=config.styles))
        asked += [(len(scenes) - 1, qa) for qa in questions(scenes[-1], rng, objects=config.objects)]
    return Exam(pool=Pool(scenes), asked=asked)


@torch.no_grad()
def take_exam(trunk: Trunk, encode: Callable[[torch.Tensor], torch.Tensor], paper: Exam) -> list[bool]:
    """Which questions are answered right, in order. `encode` makes understanding tokens of pictures in [-1, 1]."""
    out: list[bool] = []
    for start in range(0, len(paper.asked), 128):
        part = paper.asked[start : start + 128]
        ids, mask, targets = stack([new_dialogue().user(qa.question, i).says(qa.answer) for i, qa in part])
        pictures = paper.pool.pictures[[i for i, _ in part]].float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = trunk.read(ids, mask, encode(pictures))
        right = (logits.argmax(-1) == targets) | (targets == IGNORED)
        out += right.all(1).tolist()
    return out


def drawing_module(config: StudyConfig, bridge: Any, trunk: Trunk | None = None) -> Drawing:
    """A small model that draws by flow, around `trunk` or a fresh one."""
    from mm.models.codes import CodeHead

    trunk = small_trunk(config) if trunk is None else trunk
    torch.manual_seed(config.seed + 1)
    decoder = VelocityDecoder(feature_width=config.width, width=config.width, depth=1, heads=4, ratio=3)
    head = CodeHead(feature_width=config.width, width=32, depth=1, heads=2)  # not trained: flow alone is compared
    return Drawing(trunk, decoder, head.requires_grad_(False), bridge, DrawingConfig(align_layer=config.depth // 2))


def small_words(scene: Scene, rng: random.Random) -> str:
    """ "a red cat"."""
    sprite = scene.sprites[0]
    return group_phrase(Group(object=sprite.object, colour=sprite.colour), rng, plain=True)


def drawing_batch(latents: torch.Tensor, scenes: Sequence[Scene], rng: random.Random) -> DrawingBatch:
    """A flow batch of small-world scenes, a tenth without words."""
    words = ["" if rng.random() < 0.1 else small_words(scene, rng) for scene in scenes]
    padded = _tokenizer()(words, padding=True, return_tensors="pt")
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    return make_batch(
        latents, scenes, padded.input_ids, padded.attention_mask.bool(), generator, DrawingConfig(codes_share=0.0)
    )


@torch.no_grad()
def encoded(autoencoder: Any, pool: Pool) -> torch.Tensor:
    """Latents (N, 16, 8, 8) of a pool's pictures."""
    with torch.autocast("cpu", torch.bfloat16):
        parts = [autoencoder.encode(p.float() / 127.5 - 1).float() for p in pool.pictures.split(128)]
    return torch.cat(parts)


@torch.no_grad()
def drawing_verdicts(module: Drawing, autoencoder: Any, judge: Judge, each: int = 4) -> list[bool]:
    """For every object and colour of the small world, `each` pictures: is it there?"""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    from mm.pipelines.text_to_image import TextToImagePipeline

    parts = {"trunk": module.trunk.eval(), "velocity_decoder": module.velocity_decoder.eval()}
    pipe = TextToImagePipeline(
        **parts, autoencoder=autoencoder, text_tokenizer=_tokenizer(), scheduler=FlowMatchEulerDiscreteScheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(0)
    wanted = [Sprite(object=o, colour=c, x=64, y=64, size=52) for o in OBJECTS for c in TINTS]
    texts = [small_words(Scene(sprites=(s,)), rng) for s in wanted]
    out: list[bool] = []
    for start in range(0, len(wanted), 8):
        now = slice(start, start + 8)
        seeds = [torch.Generator().manual_seed(10_000 + start * each + k) for k in range(each * len(wanted[now]))]
        made = pipe(texts[now], num_images_per_prompt=each, generator=seeds, output_type="pt").images
        readings = judge.read((made * 255).round().to(torch.uint8))
        asked = [s for s in wanted[now] for _ in range(each)]
        out += [
            r.readable and any(f.object == s.object and f.answers_to(s.colour) for f in r.objects)
            for s, r in zip(asked, readings, strict=True)
        ]
    return out
