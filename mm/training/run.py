"""Puts a published model's stages together from its YAML: autoencoder, bridge, judge, latents, drawing, understanding,
stem, counter, joint, crisp.

Design choices
- One YAML a model, one function a stage; command-line flags override single fields, so that a run is its YAML plus the
  flags in its log.
- Everything in the making lives in the state folder; `publish` writes averaged weights as a diffusers folder that
  `TextToImagePipeline.from_pretrained` loads.

This module does not know losses or the loop's inside.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from mm.core.errors import UserError
from mm.models.codes import CodeHead
from mm.models.connectors import Connector
from mm.models.text import build_text_tokenizer
from mm.models.trunk import Trunk
from mm.models.velocity import VelocityDecoder
from mm.tokenizers import Autoencoder, Bridge
from mm.tokenizers.bridge import BINS
from mm.training.drawing import Drawing, DrawingBatch, DrawingConfig, make_batch, words_for
from mm.training.latents import LatentCache, write_shard
from mm.training.loop import Loop, LoopConfig
from mm.training.publishing import publish_drawing


def read_config(name: str) -> dict[str, Any]:
    """The YAML of a published model's name, or of a path."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path(__file__).parent / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in Path(__file__).parent.glob("*.yaml")))
        raise UserError(f"no training config {name!r}; known: {known}, or give a path to a .yaml file")
    return yaml.safe_load(path.read_text())


def write_latents(config: dict[str, Any], state: Path, *, shards: int | None = None) -> None:
    """Renders and encodes the shards that are missing."""
    settings = config["latents"]
    autoencoder = _load(Autoencoder, state / "model" / "autoencoder").to(_device())
    for k in range(settings["shards"] if shards is None else shards):
        write_shard(state / "latents", k, autoencoder, seed=settings["seed"], lessons=settings.get("lessons"))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load(kind: Any, folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no trained {kind.__name__}; run its stage first or use --init-from")
    return kind.from_pretrained(folder).eval()


def _fresh_or_published(kind: Any, name: str, config: dict[str, Any], init_from: Path | None, **more: Any) -> Any:
    if init_from is not None and (init_from / name / "config.json").is_file():
        return _load(kind, init_from / name)
    return kind(**config["models"].get(name, {}), **more)


def build_drawing(config: dict[str, Any], state: Path, settings: DrawingConfig, init_from: Path | None) -> Drawing:
    """The drawing stage's module: fresh, or from published weights."""
    torch.manual_seed(0)
    bridge = _load(Bridge, state / "model" / "bridge")
    return Drawing(
        _fresh_or_published(Trunk, "trunk", config, init_from),
        _fresh_or_published(VelocityDecoder, "velocity_decoder", config, init_from),
        _fresh_or_published(CodeHead, "code_head", config, init_from, order=list(bridge.config.order)),
        bridge,
        settings,
    ).float()


def override(settings: Any, flags: dict[str, Any]) -> Any:
    """A frozen config with the flags that were given (not None) and that it has."""
    names = {f.name for f in dataclasses.fields(settings)}
    return dataclasses.replace(settings, **{k: x for k, x in flags.items() if x is not None and k in names})


def train_drawing(
    config: dict[str, Any], state: Path, *, init_from: Path | None = None, publish_to: Path | None = None, **flags: Any
) -> Loop:
    """Runs (or goes on with) the drawing stage; averaged weights go to `publish_to` at every look and at the end."""
    loop_config = override(LoopConfig(**config["drawing"]["loop"]), flags)
    settings = override(DrawingConfig(**config["drawing"]["stage"]), flags)
    cache = LatentCache(state / "latents")
    tokenizer = build_text_tokenizer()
    module = build_drawing(config, state, settings, init_from)
    loop = Loop(module, state / "drawing", loop_config)

    def batches(step: int) -> DrawingBatch:
        if step % 100 == 0:
            cache.refresh()
        rng = random.Random(f"drawing {loop_config.seed} {step} {loop.accelerator.process_index}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        latents, scenes = cache.draw(loop_config.batch_size, rng)
        words = tokenizer(words_for(scenes, rng, settings), padding=True, return_tensors="pt")
        batch = make_batch(latents, scenes, words.input_ids, words.attention_mask.bool(), generator, settings)
        return _moved(batch, loop.accelerator.device)

    folder = publish_to or state / "model"

    def look(now: Loop) -> None:
        publish_drawing(now.bare, folder)
        judged(now, state)

    loop.run(batches, look)
    return loop


def judged(loop: Loop, state: Path) -> None:
    """Draws a preview grid beside the log and logs its score, where there is a judge."""
    from mm.training.preview import find_judge, judged_preview

    judge = find_judge(state)
    if judge is not None and loop.accelerator.is_main_process:
        autoencoder = _load(Autoencoder, state / "model" / "autoencoder")
        loop.log(**judged_preview(loop.bare, autoencoder, judge, loop.out))


def train_understanding(config: dict[str, Any], state: Path, *, init_from: Path | None = None, **flags: Any) -> Loop:
    """Runs (or goes on with) the understanding stage; the averaged encoder goes into the state's model."""
    from mm.models.understanding import UnderstandingEncoder
    from mm.training import understanding_stage as stage
    from mm.training.talk import READ
    from mm.world.scene import sample_scene

    loop_config = override(LoopConfig(**config["understanding"]["loop"]), flags)
    settings = override(stage.UnderstandingConfig(**config["understanding"]["stage"]), flags)
    tokenizer = build_text_tokenizer()
    torch.manual_seed(0)
    encoder = _fresh_or_published(UnderstandingEncoder, "understanding_encoder", config, init_from).float()
    loop = Loop(stage.Understanding(encoder, settings), state / "understanding", loop_config)

    def batches(step: int) -> stage.UnderstandingBatch:
        rng = random.Random(f"understanding {loop_config.seed} {step} {loop.accelerator.process_index}")
        scenes = [sample_scene(rng, **READ) for _ in range(loop_config.batch_size)]
        length = encoder.config.context_length
        words = tokenizer(stage.captions_for(scenes, rng), padding="max_length", max_length=length, return_tensors="pt")
        return _moved(stage.make_batch(scenes, words.input_ids, loop.accelerator.device), loop.accelerator.device)

    def look(now: Loop) -> None:
        copy.deepcopy(now.bare.encoder).to(torch.bfloat16).save_pretrained(state / "model" / "understanding_encoder")

    loop.run(batches, look)
    return loop


def train_stem(config: dict[str, Any], state: Path, *, init_from: Path | None = None, **flags: Any) -> Loop:
    """Runs (or goes on with) the stem stage on cached latents; the averaged stem goes into the state's model."""
    from mm.models.understanding import LatentStem, UnderstandingEncoder
    from mm.training import stem_stage as stage

    loop_config = override(LoopConfig(**config["stem"]["loop"]), flags)
    settings = override(stage.StemConfig(**config["stem"]["stage"]), flags)
    cache = LatentCache(state / "latents")
    torch.manual_seed(0)
    stem = _fresh_or_published(LatentStem, "latent_stem", config, init_from).float()
    encoder = _load(UnderstandingEncoder, state / "model" / "understanding_encoder").float()
    loop = Loop(stage.Stem(stem, encoder), state / "stem", loop_config)

    def batches(step: int) -> stage.StemBatch:
        rng = random.Random(f"stem {loop_config.seed} {step} {loop.accelerator.process_index}")
        latents, scenes = cache.draw(loop_config.batch_size, rng)
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        return _moved(stage.make_batch(scenes, latents, generator, settings), loop.accelerator.device)

    def look(now: Loop) -> None:
        copy.deepcopy(now.bare.stem).to(torch.bfloat16).save_pretrained(state / "model" / "latent_stem")

    loop.run(batches, look)
    return loop


def train_counter(config: dict[str, Any], state: Path, *, init_from: Path | None = None, **flags: Any) -> Loop:
    """Runs (or goes on with) the counter stage; the averaged counter goes into the connector of the state's model."""
    from mm.models.understanding import LatentStem, UnderstandingEncoder
    from mm.training import counter_stage as stage
    from mm.training import joint_run

    loop_config = override(LoopConfig(**config["counter"]["loop"]), flags)
    settings = override(stage.CounterConfig(**config["counter"]["stage"]), flags)
    encoder = _load(UnderstandingEncoder, state / "model" / "understanding_encoder").float()
    stem = _load(LatentStem, state / "model" / "latent_stem").float()
    torch.manual_seed(0)
    connector = joint_run.find_connector(state / "model", encoder, config["models"]["trunk"]["width"]).float()
    counter = connector.counter
    if counter is None:
        raise UserError(f"{state / 'model' / 'look_connector'} has no counter (alike: 0); take it away to start afresh")
    loop = Loop(stage.Counting(counter), state / "counter", loop_config)
    maker = stage.BlockMaker(encoder, stem, LatentCache(state / "latents"), loop_config.batch_size, settings)
    seed = loop_config.seed + 1000 * loop.accelerator.process_index
    blocks = stage.Blocks(lambda k: maker(k, seed), seed, settings)

    def look(now: Loop) -> None:
        counter.load_state_dict(now.bare.counter.state_dict())
        published: Connector = copy.deepcopy(connector)
        published.to(dtype=torch.bfloat16).save_pretrained(state / "model" / "look_connector")

    loop.run(lambda step: _moved(blocks(step), loop.accelerator.device), look)
    return loop


def train_joint(
    config: dict[str, Any], state: Path, *, init_from: Path | None = None, publish_to: Path | None = None, **flags: Any
) -> Loop:
    """Runs (or goes on with) the joint stage; edit pairs that are missing are written first."""
    from mm.models.understanding import LatentStem, UnderstandingEncoder
    from mm.training import joint_run
    from mm.training.joint import JointConfig

    loop_config = override(LoopConfig(**config["joint"]["loop"]), flags)
    settings = override(JointConfig(**config["drawing"]["stage"] | config["joint"]["stage"]), flags)
    autoencoder = _load(Autoencoder, state / "model" / "autoencoder").to(_device())
    for k in range(config["joint"]["edit_shards"]):
        joint_run.write_edit_shard(state / "edits", k, autoencoder)
    drawing = build_drawing(config, state, settings, init_from)
    encoder = _load(UnderstandingEncoder, state / "model" / "understanding_encoder")
    stem = _load(LatentStem, state / "model" / "latent_stem")
    connector = joint_run.find_connector(state / "model", encoder, config["models"]["trunk"]["width"])
    module = joint_run.build(config, drawing, encoder, stem, connector, settings)
    folder = publish_to or state / "model"
    return joint_run.train(module, state, loop_config, settings, folder, lambda now: judged(now, state))


def train_crisp(
    config: dict[str, Any], state: Path, *, init_from: Path | None = None, publish_to: Path | None = None, **flags: Any
) -> Loop:
    """Runs (or goes on with) the crisp stage; the autoencoder with its averaged decoder goes to `publish_to`."""
    from mm.training import crisp_run

    return crisp_run.train_crisp(
        _load(Autoencoder, state / "model" / "autoencoder"),
        init_from or state / "model",
        state,
        publish_to or state / "model",
        override(LoopConfig(**config["crisp"]["loop"]), flags),
        override(crisp_run.CrispConfig(**config["crisp"]["stage"]), flags),
        shards=config["crisp"]["shards"],
        shard_size=config["crisp"]["shard_size"],
    )


def _moved(batch: Any, device: torch.device) -> Any:
    """A batch of tensors on another device."""
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return type(batch)(**{k: x.to(device) if torch.is_tensor(x) else x for k, x in fields.items()})


def train_autoencoder(config: dict[str, Any], state: Path, **flags: Any) -> None:
    """Runs (or goes on with) the tokenizer stage."""
    from mm.training import tokenizer_stage as stage

    settings = override(stage.TokenizerStageConfig(out=str(state / "autoencoder"), **config["autoencoder"]), flags)
    trainer = stage.Trainer(settings)
    if (trainer.out / "state.safetensors").is_file():
        trainer.resume()
    stage.train(trainer)
    trainer.average.save_pretrained(state / "model" / "autoencoder")


def fit_bridge(config: dict[str, Any], state: Path) -> None:
    """Fits the bridge to latents of fresh scenes; keeps the kind of bins with the smaller error."""
    from mm.world.render import render
    from mm.world.scene import sample_scene

    autoencoder = _load(Autoencoder, state / "model" / "autoencoder")
    rng = random.Random("bridge")
    scenes = [sample_scene(rng) for _ in range(config["bridge"]["scenes"])]
    with torch.no_grad():
        parts = [autoencoder.encode(render(scenes[i : i + 64]).float() / 127.5 - 1) for i in range(0, len(scenes), 64)]
    latents = torch.cat(parts).float()
    bridges = [Bridge.fit(latents, bins=bins) for bins in BINS]
    errors = [float((b.dequantize(b.quantize(latents)) - latents).square().mean()) for b in bridges]
    print(" ".join(f"{bins}: squared error {e:.6f}" for bins, e in zip(BINS, errors, strict=True)), flush=True)
    bridges[errors.index(min(errors))].save_pretrained(state / "model" / "bridge")


def train_judge(config: dict[str, Any], state: Path, **flags: Any) -> None:
    """Runs (or goes on with) the judge's stage; reconstructions join when the autoencoder is there."""
    from mm.training import judge_stage as stage

    settings = stage.JudgeStageConfig(
        out=state / "judge", autoencoder=state / "model" / "autoencoder", **config["judge"]
    )
    stage.JudgeTrainer(override(settings, flags)).run()


def run_stages(
    name: str,
    *,
    stages: list[str],
    state: Path | None = None,
    init_from: Path | None = None,
    publish_to: Path | None = None,
    **flags: Any,
) -> None:
    """Runs the named stages in order, each resuming from `state`.

    `init_from` (a diffusers folder) lends its tokenizers and understanding encoder, and its trunk, heads and connectors
    to start from.
    """
    config = read_config(name)
    state = Path(config["state"]) if state is None else state
    if init_from is not None:
        _borrow(init_from, state / "model")
    for stage in stages:
        if stage == "autoencoder":
            train_autoencoder(config, state, **flags)
        elif stage == "bridge":
            fit_bridge(config, state)
        elif stage == "judge":
            train_judge(config, state, **flags)
        elif stage == "latents":
            write_latents(config, state)
        elif stage == "drawing":
            write_latents(config, state, shards=1)  # enough to begin with, where nobody wrote any
            train_drawing(config, state, init_from=init_from, publish_to=publish_to, **flags)
        elif stage == "understanding":
            train_understanding(config, state, init_from=init_from, **flags)
        elif stage == "stem":
            write_latents(config, state, shards=1)
            train_stem(config, state, init_from=init_from, **flags)
        elif stage == "counter":
            write_latents(config, state, shards=1)
            train_counter(config, state, init_from=init_from, **flags)
        elif stage == "joint":
            write_latents(config, state, shards=1)
            train_joint(config, state, init_from=init_from, publish_to=publish_to, **flags)
        elif stage == "crisp":
            train_crisp(config, state, init_from=init_from, publish_to=publish_to, **flags)
        else:
            known = "autoencoder, bridge, judge, latents, drawing, understanding, stem, counter, joint, crisp"
            raise UserError(f"unknown stage {stage!r}; known: {known}")


def _borrow(source: Path, target: Path) -> None:
    """Copies what later stages leave as it is from published weights, unless the state has its own."""
    reads = ("understanding_encoder", "latent_stem", "look_connector")
    parts = ["autoencoder", "bridge", *(part for part in reads if (source / part / "config.json").is_file())]
    for part in parts:
        if not (source / part / "config.json").is_file():
            raise UserError(f"--init-from {source}: no {part}/config.json there; give a folder such as weights/mm-tiny")
        if not (target / part).exists():
            shutil.copytree(source / part, target / part)
