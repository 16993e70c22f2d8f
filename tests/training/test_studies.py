"""The studies' parts: pairing, budgets, straight-through tuning, refitting, attention masses."""

import dataclasses
import math
import random

import pytest
import torch

from mm.core.statistics import paired_change
from mm.models import layers
from mm.models.connectors import Connector
from mm.models.understanding_encoder import UnderstandingEncoder
from mm.tokenizers import Autoencoder, Bridge
from mm.training.studies import common, encoders, ett
from mm.training.studies.common import StudyConfig
from mm.world import vocabulary as v
from mm.world.judge import Judge
from mm.world.scene import groups, is_held_out

TINY = StudyConfig(samples=64, drawn=64, pool=64, questions=64, batch_size=16, width=32, depth=2)


@pytest.fixture(scope="module")
def tokenizer() -> tuple[Autoencoder, Bridge]:
    torch.manual_seed(0)
    sizes = {"encoder_widths": (8, 16, 16), "decoder_widths": (16, 16, 8), "refine_width": 8}
    return Autoencoder(latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16, **sizes), Bridge()


@pytest.fixture(scope="module")
def pool() -> common.Pool:
    return common.reading_pool(TINY)


def test_a_budget_below_a_batch_is_refused():
    with pytest.raises(ValueError, match="samples 10 is less than one batch of 32"):
        StudyConfig(samples=10)


def test_a_paired_change_is_the_mean_difference_and_its_interval_that_of_clusters():
    rng = random.Random(0)
    before = [rng.random() < 0.5 for _ in range(4000)]
    after = [b or rng.random() < 0.2 for b in before]
    mean, low, high = paired_change(before, after, range(4000))
    change = [float(a) - float(b) for a, b in zip(after, before, strict=True)]
    assert mean == pytest.approx(sum(change) / 4000)
    spread = 1.96 * math.sqrt(sum((c - mean) ** 2 for c in change) / 4000 / 4000)
    assert (low, high) == pytest.approx((mean - spread, mean + spread), abs=0.2 * spread)
    # ten questions a scene that all change together: the interval is that of the scenes
    ten = [[x for x in verdicts[:400] for _ in range(10)] for verdicts in (before, after)]
    wide = paired_change(*ten, [i for i in range(400) for _ in range(10)])
    assert wide == pytest.approx(paired_change(before[:400], after[:400], range(400)))


def test_unequal_verdicts_are_refused():
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_change([True], [True, False], [0])


def test_the_exam_is_held_out_and_training_is_not(pool):
    paper = common.exam(TINY)
    assert len(paper.asked) >= TINY.questions
    assert all(is_held_out(groups(scene)) for scene in paper.pool.scenes)
    assert not any(is_held_out(groups(scene)) for scene in pool.scenes + common.drawing_pool(TINY).scenes)


def test_a_small_world_is_read_and_asked_about_in_its_own_words():
    config = dataclasses.replace(TINY, small=True)
    paper = common.exam(config)
    for scene in [*common.reading_pool(config).scenes, *paper.pool.scenes]:
        assert {s.object for s in scene.sprites} <= set(common.OBJECTS)
        assert scene.style in common.STYLES
    others = set(v.OBJECTS) - set(common.OBJECTS)
    asked = " ".join(qa.question for _, qa in paper.asked if qa.kind == "existence").replace("?", " ").split()
    assert not others & set(asked)
    assert any(qa.answer == "no" for _, qa in paper.asked if qa.kind == "existence")


def test_taking_the_exam_is_greedy_decoding():
    """Right in one pass = right when every next word is the likeliest one, chosen step by step."""
    trunk = common.small_trunk(TINY)
    paper = common.exam(TINY)
    connector = Connector(in_channels=16, width=32)

    def encode(pictures: torch.Tensor) -> torch.Tensor:
        return connector(pictures.flatten(1)[:, : 64 * 16].unflatten(1, (64, 16)))

    # A few steps, so that some answers are right.
    def loss(step: int) -> torch.Tensor:
        rows = paper.asked[:16]
        words = common.words_of([common.new_dialogue().user(q.question, i).says(q.answer) for i, q in rows])
        return common.reading_loss(trunk, words, encode(paper.pool.pictures[[i for i, _ in rows]].float()))

    common.fit([(trunk, 2e-3), (connector, 2e-3)], loss, 40)
    part = common.Exam(pool=paper.pool, asked=paper.asked[:24])
    verdicts = common.take_exam(trunk, encode, part)
    assert 0 < sum(verdicts)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for (i, qa), right in zip(part.asked, verdicts, strict=True):
            said = common.new_dialogue().user(qa.question, i)
            want = common.new_dialogue().user(qa.question, i).says(qa.answer).ids[len(said.ids) :]
            tokens = encode(paper.pool.pictures[[i]].float() / 127.5 - 1)
            got: list[int] = []
            for _ in want:
                logits, _ = trunk.read(torch.tensor([said.ids + got]), None, tokens)
                got.append(int(logits[0, -1].argmax()))
            assert (got == want) == right


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_tuning_reaches_the_encoder_and_only_alpha_reaches_the_decoder(tokenizer, pool, alpha):
    autoencoder, bridge = tokenizer
    arm = ett.Arm("tuned-1", autoencoder, bridge, common.small_trunk(TINY), TINY)
    rng = random.Random(0)
    pictures, scenes = pool.draw(8, rng)
    for part in (arm.trunk, arm.projector):  # output projections start at zero and would pass nothing on
        for p in part.parameters():
            torch.nn.init.normal_(p, std=0.1)
    autoencoder.zero_grad()
    arm.tuning_loss(pictures, common.reading_words(scenes, rng, TINY), alpha).backward()
    assert all(p.grad is not None for p in autoencoder.encoder.parameters())
    assert max(float(p.grad.abs().max()) for p in autoencoder.encoder.parameters() if p.grad is not None) > 0
    assert any(p.grad is not None for p in autoencoder.decoder.parameters()) == (alpha > 0)


def test_refitting_gives_unit_channels_and_bins_of_the_new_latents(tokenizer, pool):
    import copy

    autoencoder, bridge = (copy.deepcopy(x) for x in tokenizer)
    arm = ett.Arm("tuned-0", autoencoder, bridge, common.small_trunk(TINY), TINY)
    arm.refit(pool)
    latents = common.encoded(autoencoder, pool)
    # measured in fp32, encoded in bf16
    assert latents.std((0, 2, 3)).sub(1).abs().max() < 0.05
    assert latents.mean((0, 2, 3)).abs().max() < 0.1
    assert not any(p.requires_grad for p in autoencoder.parameters())
    assert (arm.bridge(latents) - latents).square().mean() < (bridge(latents) - latents).square().mean()


def test_the_index_table_looks_up_each_channel_in_its_own_rows():
    bridge = Bridge()
    table = ett.IndexTable(bridge, 8)
    codes = torch.randint(64, (2, 16, 8, 8))
    want = sum(table.table.weight[channel * 64 + codes[1, channel, 3, 5]] for channel in range(16))
    assert torch.allclose(table(codes)[1, :, 3, 5], want, atol=1e-5)


def test_unknown_arms_are_named(tokenizer):
    with pytest.raises(ValueError, match=r"unknown arm 'best'; known: indices, frozen"):
        ett.Arm("best", *tokenizer, common.small_trunk(TINY), TINY)


def test_an_arm_trains_through_its_stages_and_starts_from_equal_weights(tokenizer, pool):
    import copy

    encoder = UnderstandingEncoder(width=16, depth=1, heads=2, text_width=16, text_depth=1)
    trunk = ett.reader(TINY, pool, encoder)
    assert not any(p.requires_grad for p in encoder.parameters())
    before = {k: x.clone() for k, x in trunk.state_dict().items()}
    arm = ett.Arm("tuned-0.25", *copy.deepcopy(tokenizer), copy.deepcopy(trunk), TINY)
    encoder = [p.clone() for p in arm.autoencoder.encoder.parameters()]
    lines: list[str] = []
    ett.train_arm(arm, pool, lines.append)
    assert [line.split()[2] for line in lines if line.split()[4] == "0:"] == ["1", "2", "3"]
    assert any(not torch.equal(a, b) for a, b in zip(encoder, arm.autoencoder.encoder.parameters(), strict=True))
    assert all(torch.equal(x, before[k]) for k, x in trunk.state_dict().items())


def test_masses_are_the_attention_that_crosses_modalities():
    masses = encoders.Masses()
    q, k = torch.randn(2, 3, 2, 4, requires_grad=True), torch.randn(2, 5, 2, 4)
    with layers.attention_callback(masses.add):
        layers.attend(q, k, k)
        layers.attend(q, k[:, :3], k[:, :3])  # square: a picture among itself, or words among themselves
    scores = torch.einsum("blhe,bkhe->bhlk", q / 2, k).softmax(-1)
    assert torch.allclose(masses.take(), scores[..., :2].sum(-1).mean()[None])
    masses.understanding_BT = torch.tensor([[True, False, False]] * 2)
    masses.replies_BT = torch.tensor([[False, False, True]] * 2)
    with layers.attention_callback(masses.add):
        layers.attend(q, k[:, :3], k[:, :3])
    scores = torch.einsum("blhe,bkhe->bhlk", q / 2, k[:, :3]).softmax(-1)
    assert torch.allclose(masses.take(), scores[:, :, 2, 0].mean()[None])
    assert not layers._ATTENTION_CALLBACKS


def test_alignment_moves_the_masses_towards_their_targets(tokenizer, pool):
    drawn = common.drawing_pool(TINY)
    pools = (pool, drawn, common.encoded(tokenizer[0], drawn))
    far: dict[bool, float] = {}
    for aligned in (False, True):
        torch.manual_seed(0)
        encoder = UnderstandingEncoder(width=32, depth=1, text_width=32, text_depth=1)
        model = encoders.Model("shared", common.drawing_module(TINY, tokenizer[1]), tokenizer[0], encoder)
        targets = {task: torch.full((TINY.depth,), 0.9) for task in ("read", "draw")} if aligned else None
        found = encoders.train_arm(model, pools, targets, TINY, lambda *_: None)
        far[aligned] = sum(abs(0.9 - x) for row in found.values() for x in row)
    assert far[True] < far[False]


def test_the_judge_scores_a_small_models_drawings(tokenizer):
    """Untrained, nothing is there: every object and colour was asked, and none is credited."""
    module = common.drawing_module(TINY, tokenizer[1])
    verdicts = common.drawing_verdicts(module, tokenizer[0], Judge.from_pretrained("weights/judge"), each=1)
    assert len(verdicts) == len(common.OBJECTS) * len(common.TINTS)
    assert sum(verdicts) < 10
