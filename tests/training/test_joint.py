"""The joint stage on a tiny model: every task's batch, what reaches what, and that steps depend on their seed alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_reader

from mm.core.errors import UserError
from mm.models.connectors import Connector
from mm.models.dialogue import IGNORED
from mm.training import run
from mm.training.counter_stage import find_connector
from mm.training.drawing_stage import Drawing, DrawingBatch
from mm.training.edit_pairs import EditCache, write_edit_shard
from mm.training.joint_losses import EditBatch, Joint, JointConfig, ReadBatch, edit_batch
from mm.training.joint_stage import JointBatches, build_joint, publish_joint
from mm.training.latents import LatentCache, write_shard
from mm.training.stage import StageContext

CONFIG = JointConfig(codes_share=0.5, align_layer=1, codes_tokens=4, nouns_layer=0, relations_layer=0)


@pytest.fixture(scope="module")
def parts():
    return tiny_reader()


@pytest.fixture(scope="module")
def state(parts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("state")
    write_shard(folder / "latents", 0, parts["autoencoder"], size=32)
    write_edit_shard(folder / "edits", 0, parts["autoencoder"], size=32)
    return folder


@pytest.fixture
def module(parts) -> Joint:
    drawing = (parts[name] for name in ("trunk", "velocity_decoder", "code_head", "bridge"))
    return Joint(
        *drawing,
        encoder=parts["understanding_encoder"],
        understanding_connector=parts["understanding_connector"],
        counter=parts["understanding_connector"].counter,
        latent_stem=parts["latent_stem"],
        config=CONFIG,
    )


def batches(state: Path, **shares: float) -> JointBatches:
    return JointBatches(LatentCache(state / "latents"), EditCache(state / "edits"), replace(CONFIG, **shares), 8, 0)


def test_every_task_comes_in_its_share_and_gives_a_loss(state, module):
    made = [batches(state, read_share=0.4, edit_share=0.3)(step) for step in range(24)]
    kinds = {type(batch) for batch in made}
    assert kinds == {DrawingBatch, ReadBatch, EditBatch}
    for batch in made:
        losses = module(batch)
        assert all(torch.isfinite(loss) for loss in losses.values())
        prefix = "edit_" if isinstance(batch, EditBatch) else ""
        names = {"words", "_right"} if isinstance(batch, ReadBatch) else {f"{prefix}align"}
        assert names <= set(losses)


def test_a_step_depends_on_the_seed_and_its_number_alone(state):
    first, second = (batches(state, read_share=0.0, edit_share=1.0) for _ in range(2))
    for step in (3, 1):
        first(step)
    a, b = first(7), second(7)
    assert torch.equal(a.ids_BT, b.ids_BT)
    assert torch.equal(a.noise_BCHW, b.noise_BCHW)
    assert not torch.equal(a.noise_BCHW, second(8).noise_BCHW)


def test_gradients_reach_the_connector_and_text_but_not_the_encoder(state, module):
    used = set()
    for step in range(12):
        batch = batches(state, read_share=1.0, edit_share=0.0)(step)
        module.zero_grad(set_to_none=True)
        module(batch)["words"].backward()
        assert module.trunk.norm_text_out.weight.grad is not None
        assert module.understanding_connector.up.weight.grad.abs().sum() > 0
        used.add("latents" if batch.inputs.pictures is None else "pictures")
    assert used == {"latents", "pictures"}
    assert all(p.grad is None for part in module._frozen for p in part.parameters())
    assert not any("encoder" in name or "stem" in name for name, _ in module.named_parameters())


def test_rows_without_a_source_do_not_see_it(state, module):
    batch = batches(state, read_share=0.0, edit_share=1.0, drop_source=0.5, codes_share=0.0)(0)
    assert batch.keeps_B.any()
    assert not batch.keeps_B.all()
    other = replace(batch, source_BCHW=torch.randn_like(batch.source_BCHW))
    sigma = torch.full((8,), 0.5)
    a, b = (module.trunk(batch.latents_BCHW, sigma, module.prompt(x)) for x in (batch, other))
    same = torch.tensor([torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True)])
    assert torch.equal(same, ~batch.keeps_B)


def test_only_what_the_model_says_is_learned(state):
    batch = batches(state, read_share=1.0, edit_share=0.0)(0)
    tokenizer = batches(state).tokenizer
    placeholder, user = (tokenizer.convert_tokens_to_ids(t) for t in ("<look>", "<user>"))
    said = batch.targets_BT[batch.targets_BT != IGNORED]
    assert len(said)
    assert not (said == placeholder).any()
    assert not (said == user).any()


def test_what_changes_counts_more(state):
    cache = EditCache(state / "edits")
    edits, source, _ = cache.draw(8, random.Random(0))
    target = source.clone()
    target[:, :, :2] += 0.5  # a random tokenizer hardly changes its latents with the picture
    maker = batches(state)
    encode = maker.noisy([e.source for e in edits], source, torch.Generator().manual_seed(0))
    config = replace(CONFIG, drop_words=0.0, drop_source=0.0)
    made = edit_batch(
        edits,
        source,
        target,
        maker.new,
        maker.nouns,
        encode,
        random.Random(1),
        torch.Generator().manual_seed(1),
        config,
    )
    moved = (target - source).abs().mean(1) > 0.1
    assert moved[:, :2].all()
    assert not moved[:, 2:].any()
    ratio = made.weights_BHW[moved].mean() / made.weights_BHW[~moved].mean()
    assert ratio == pytest.approx(1 + config.changed_weight, rel=1e-4)
    assert made.weights_BHW.mean() == pytest.approx(1.0, rel=1e-4)


def test_noun_losses_train_the_text_below_their_readout_in_all_three_tasks(state, module):
    for read, edit, name in ((1.0, 0.0, "read_nouns"), (0.0, 1.0, "edit_nouns"), (0.0, 0.0, "nouns")):
        module.zero_grad(set_to_none=True)
        module(batches(state, read_share=read, edit_share=edit)(3))[name].backward()
        layers = module.trunk.text_layers
        assert layers[0].ff.down.weight.grad.abs().sum() > 0
        assert all(p.grad is None for layer in layers[1:] for p in layer.parameters())
        assert module.noun_readout.readout.weight.grad is not None


def test_noun_corruption_changes_the_input_of_descriptions_and_not_the_targets(state):
    shares = {"read_share": 1.0, "edit_share": 0.0}
    plain, corrupted = (batches(state, **shares, noun_corruption_share=share)(0) for share in (0.0, 1.0))
    assert torch.equal(plain.targets_BT, corrupted.targets_BT)
    changed = plain.ids_BT != corrupted.ids_BT
    nouns = batches(state).nouns
    assert changed.any()
    assert {int(i) for i in plain.ids_BT[changed]} <= set(nouns)
    assert {int(i) for i in corrupted.ids_BT[changed]} <= set(nouns)
    assert not changed.flatten()[plain.nouns.places_N].any()  # the user's words stay


def test_next_noun_and_token_losses_train_the_text_below(state, module):
    module.zero_grad(set_to_none=True)
    losses = module(batches(state, read_share=1.0, edit_share=0.0)(3))
    (losses["next_nouns"] + losses["tokens"]).backward()
    assert module.trunk.text_layers[0].ff.down.weight.grad.abs().sum() > 0
    assert module.next_noun_readout.readout.weight.grad is not None
    assert module.token_readout.readout.weight.grad is not None


def test_a_run_from_published_weights_starts_with_their_connectors_and_encoder(parts, tmp_path):
    """Fresh connectors would make a model that reads forget how."""
    drawing = Drawing(*(parts[name] for name in ("trunk", "velocity_decoder", "code_head", "bridge")), CONFIG)
    sizes = {n: parts["trunk"].config[n] for n in ("vocabulary_size", "width", "depth", "heads", "latent_channels")}
    for name in ("autoencoder", "bridge", "understanding_encoder", "understanding_connector", "latent_stem"):
        parts[name].save_pretrained(tmp_path / "published" / name)
    run.copy_published(tmp_path / "published", tmp_path / "model")
    for name in ("understanding_encoder", "latent_stem", "understanding_connector"):
        assert (tmp_path / "model" / name / "config.json").is_file()
    encoder, stem = parts["understanding_encoder"], parts["latent_stem"]
    connector = find_connector(StageContext(config={"models": {"trunk": sizes}}, state=tmp_path), encoder)
    made = build_joint(sizes, drawing, encoder, stem, connector, CONFIG)
    assert torch.equal(made.understanding_connector.up.weight, parts["understanding_connector"].up.weight)
    assert torch.equal(made.counter.up.weight, parts["understanding_connector"].counter.up.weight)


def test_the_counter_is_published_with_the_connector_and_kept_out_of_the_state(parts, module, tmp_path):
    counter = module.understanding_connector.counter
    module.understanding_connector.counter = None
    assert not any("counter" in name for name in module.state_dict())
    publish_joint(module, tmp_path / "model")
    module.understanding_connector.counter = counter
    again = find_connector(StageContext(config={}, state=tmp_path), parts["understanding_encoder"])
    torch.testing.assert_close(again.counter.up.weight, counter.up.weight, atol=0.01, rtol=0.01)
    with pytest.raises(UserError, match="has no counter"):
        build_joint(
            {"width": 32, "depth": 2, "heads": 2},
            module,
            parts["understanding_encoder"],
            parts["latent_stem"],
            Connector(in_channels=16, width=32),
            CONFIG,
        )


def test_overridden_counts_change_the_tokens_and_the_words(state, module):
    """Where a picture is detokenize of with another number, its tokens are override it; others keep the counter's."""
    batch = batches(state, read_share=1.0, edit_share=0.0, count_override_share=0.5, outside_share=1.0)(0)
    override = batch.tokens.count_override_PS
    assert (override >= 0).all(1).any()
    assert (override < 0).all(1).any()
    tokens = module.understanding_tokens(batch.inputs, override)
    own = module.understanding_tokens(batch.inputs)
    assert torch.equal(tokens[(override < 0).all(1)], own[(override < 0).all(1)])
    assert not torch.allclose(tokens[(override > 0).any(1)], own[(override > 0).any(1)])
    a, b = (
        module(batch)["words"],
        module(replace(batch, tokens=replace(batch.tokens, count_override_PS=override.clamp(max=1))))["words"],
    )
    assert not torch.equal(a, b)


def test_bad_shares_are_named():
    with pytest.raises(ValueError, match="leave nothing to draw"):
        JointConfig(read_share=0.7, edit_share=0.6)
    with pytest.raises(ValueError, match=r"drop_words 2 must lie in \[0, 1\]"):
        JointConfig(drop_words=2)
